"""Finding a run without an address, on this machine and its network, and being found there."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.dht.exchange import DhtExchange
    from dtrain.trainer.signing import SignedManifest
    from dtrain.trainer.voice import Voice


def found_peers(run_id: str, args: argparse.Namespace, voice: Voice) -> list[str]:
    """Addresses of the run's workers on this machine, else on this network."""
    from dtrain.dht import rendezvous

    local = [address for worker in rendezvous.find(run_id) for address in worker.addresses]
    if local or _stays_in(args):
        return local
    from dtrain.dht import lan

    try:
        with voice.waiting(f"Looking for {run_id} on this network"):
            found = lan.find(run_id)
    except lan.LanError as error:
        voice.say(f"{_sentence(str(error))}. If others train {run_id}, join them with dtrain join INVITE.")
        return []
    if len({worker.manifest_hash for worker in found}) > 1:
        raise UsageError(
            f"several runs on this network call themselves {run_id}; join one of them with dtrain join INVITE"
        )
    if found:
        voice.say(f"Found {run_id} on this network ({len(found)} workers).")
    return [address for worker in found for address in worker.addresses]


@contextmanager
def visible_on_the_network(
    exchange: DhtExchange, signed: SignedManifest, args: argparse.Namespace
) -> Iterator[None]:
    """While open, others on this network find the worker by its run's name, if they can dial it."""
    with ExitStack() as stack:
        if not _stays_in(args) and exchange.reach == "direct":
            from dtrain.dht import lan

            manifest = signed.manifest
            try:
                stack.enter_context(
                    lan.published(manifest.run_id, exchange.peer_id, manifest.hash.hex(), exchange.addresses)
                )
            except lan.LanError:
                pass  # nobody there to be found by
        yield


def _stays_in(args: argparse.Namespace) -> bool:
    """Whether this worker has nothing to do with the network around it."""
    return bool(args.no_lan) or ipaddress.IPv4Address(args.host).is_loopback


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
