"""Runs that are visible on this network, by multicast DNS: each worker that can be dialled says where it is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from dtrain.dht.addresses import ip_of, is_loopback
from dtrain.dht.roaming import own_addresses

SERVICE = "_dtrain._tcp.local."
BROWSE_S = 1.5  # a worker on the same network answers within this time
INFO_MS = 800
MAX_WORKERS = 64
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{20,80}")
_HASH = re.compile(r"[0-9a-f]{64}")


class LanError(Exception):
    """Discovery does not work here; the message says why and what to do."""


@dataclass(frozen=True)
class LanWorker:
    """A worker on this network, as it says. Unchecked: whoever joins checks the manifest's signature."""

    run_id: str
    peer_id: str
    manifest_hash: str
    addresses: tuple[str, ...]  # libp2p


@contextmanager
def published(run_id: str, peer_id: str, manifest_hash: str, addresses: Sequence[str]) -> Iterator[None]:
    """While open, others on this network find the worker at these libp2p addresses. Raises LanError."""
    ips = sorted({ip for ip in map(ip_of, addresses) if ip and not is_loopback(ip)} & own_addresses())
    if not ips:  # on loopback only, or nobody can dial us
        yield
        return
    ports = [int(a.split("/tcp/")[1].split("/")[0]) for a in addresses if ip_of(a) in ips]
    fields = {"run": run_id, "peer": peer_id, "manifest": manifest_hash}
    info = ServiceInfo(
        SERVICE,
        f"{peer_id[-16:]}.{SERVICE}",  # a name has 63 bytes at most
        port=ports[0],
        properties=fields,
        parsed_addresses=ips,
        server=f"dtrain-{peer_id[-16:].lower()}.local.",
    )
    with _open() as zeroconf, ThreadPoolExecutor(1, thread_name_prefix="lan") as pool:
        known = pool.submit(zeroconf.register_service, info)  # takes a second or two; nobody waits for it
        try:
            yield
        finally:
            if known.exception() is None:
                zeroconf.unregister_service(info)


def find(run_id: str = "", wait_s: float = BROWSE_S) -> list[LanWorker]:
    """Workers on this network, of that run or of any. Raises LanError where discovery does not work."""
    names: set[str] = set()

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed and len(names) < MAX_WORKERS:
            names.add(name)

    with _open() as zeroconf:
        ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
        time.sleep(wait_s)
        found = [_parse(zeroconf.get_service_info(SERVICE, name, INFO_MS)) for name in sorted(names)]
    return [worker for worker in found if worker is not None and run_id in ("", worker.run_id)]


def _parse(info: ServiceInfo | None) -> LanWorker | None:
    """What somebody on the network says; None unless every field is well-formed."""
    if info is None or not info.port:
        return None
    try:
        fields = {key.decode(): (value or b"").decode() for key, value in info.properties.items()}
        run_id, peer_id, manifest_hash = fields["run"], fields["peer"], fields["manifest"]
    except (KeyError, UnicodeDecodeError, AttributeError):
        return None
    fits = _RUN_ID.fullmatch(run_id) and _PEER_ID.fullmatch(peer_id) and _HASH.fullmatch(manifest_hash)
    places = info.parsed_addresses(IPVersion.V4Only)
    if not fits or not places:
        return None
    addresses = tuple(f"/ip4/{ip}/tcp/{info.port}/p2p/{peer_id}" for ip in places)
    return LanWorker(run_id, peer_id, manifest_hash, addresses)


@contextmanager
def _open() -> Iterator[Zeroconf]:
    outward = sorted(ip for ip in own_addresses() if not is_loopback(ip))
    if not outward:
        raise LanError("this machine is on no network, so nobody can be found there")
    try:
        zeroconf = Zeroconf(interfaces=outward, ip_version=IPVersion.V4Only)
    except OSError as error:
        raise LanError(f"this network cannot be searched for runs ({error.strerror})") from None
    try:
        yield zeroconf
    finally:
        zeroconf.close()
