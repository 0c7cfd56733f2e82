"""`dtrain doctor [INVITE]`: checks this machine, and with an invite the way to the run, before any download."""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.trainer.cli_run import check_address, decode_invite
from dtrain.trainer.errors import DtrainError

if TYPE_CHECKING:
    from dtrain.dht.invite import Invite
    from dtrain.trainer.doctor import Check

DIAL_S = 5.0
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = (
        "example: dtrain doctor dtrain://lQGi...; exit code 0 = all well, 1 = something must be mended"
    )
    parser.add_argument("invite", metavar="INVITE", nargs="?", help="also check the way to this run")
    parser.add_argument(
        "--json", action="store_true", help="for programs: a list of check, status, detail, fix"
    )
    parser.add_argument("--folder", type=Path, default=Path("dtrain-runs"), help="where checkpoints will go")
    parser.add_argument("--host", default="0.0.0.0", help="IPv4 address that the worker will listen on")
    parser.add_argument("--port", type=int, default=0, help="TCP port that the worker will listen on")
    parser.add_argument("--quick", action="store_true", help="a short speed test only")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a check failed."""
    check_address(args)
    invite = decode_invite(args.invite) if args.invite else None
    found = []
    for check in _checks(args, invite):
        found.append(check)
        if not args.json:
            print(f"{MARKS[check.status]}  {check.check:<13} {check.detail}", flush=True)
            if check.fix:
                print(f"      {'':<13} -> {check.fix}", flush=True)
    if args.json:
        print(json.dumps([asdict(check) for check in found], indent=2))
    failed = sum(check.status == "fail" for check in found)
    if not args.json:
        print(
            f"{failed} to mend before this machine can take part."
            if failed
            else "This machine can take part."
        )
    return 1 if failed else 0


def _checks(args: argparse.Namespace, invite: Invite | None) -> Iterator[Check]:
    from dtrain.trainer import doctor

    yield doctor.python_version()
    yield doctor.packages()
    yield _guarded("accelerator", lambda: doctor.accelerator(0.3 if args.quick else doctor.SPEED_S))
    yield _guarded("training", doctor.training)
    yield doctor.memory()
    yield doctor.disk(args.folder)
    yield (port := doctor.port(args.host, args.port))
    if invite is None:
        return
    yield (bootstrap := doctor.bootstrap({address: _dial(address) for address in _elsewhere(invite)}))
    if doctor.FAIL not in (bootstrap.status, port.status):
        yield from _network_checks(args, invite)


def _network_checks(args: argparse.Namespace, invite: Invite) -> Iterator[Check]:
    """As a peer with an identity of its own, which is gone afterwards."""
    from dtrain.dht.bystander import distance
    from dtrain.dht.exchange import DhtExchange
    from dtrain.dht.peer_settings import PeerSettings
    from dtrain.dht.process import ExchangeError
    from dtrain.trainer import doctor
    from dtrain.trainer.signing import SignedManifest

    with tempfile.TemporaryDirectory(prefix="dtrain-doctor-") as folder:
        settings = PeerSettings(
            Path(folder) / "identity.key", args.host, args.port, initial_peers=invite.addresses
        )
        exchange = DhtExchange(settings)
        try:
            exchange.connect(strict=False)
            yield doctor.reach(exchange.reach, args.port)
            found = distance(exchange)
            yield (clock := doctor.clock(found["skew_s"] if found else None))
            if found:
                yield doctor.bandwidth(found["up_mbps"], found["down_mbps"])
            if clock.status == doctor.FAIL:
                return  # to a clock like that all that the others publish looks expired
            hashes = []
            for blob in exchange.find_manifests(invite.run_id):
                try:
                    hashes.append(SignedManifest.from_json(blob).manifest.hash.hex())
                except DtrainError:
                    continue  # somebody's garbage
            yield doctor.run_settings(hashes, invite.manifest_hash.hex())
        except ExchangeError as error:
            yield doctor.Check("network", doctor.FAIL, str(error), "mend what is above first, then try again")
        finally:
            exchange.close()


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check whose library may be broken in any way."""
    from dtrain.trainer.doctor import FAIL, Check

    try:
        return check()
    except Exception as error:  # a broken driver raises what it likes
        text = " ".join(str(error).split())[:200]
        return Check(name, FAIL, text, "install torch anew, or update the GPU's driver")


def _elsewhere(invite: Invite) -> list[str]:
    """The invite's addresses but for those that mean this very machine on every machine, if there are others."""
    addresses = list(invite.addresses)
    return [address for address in addresses if not address.startswith("/ip4/127.")] or addresses


def _dial(address: str) -> str:
    """ "" if a TCP connection to the libp2p address comes about, else why not."""
    parts: list[Any] = address.split("/")
    try:
        host, port = parts[2], int(parts[4])
        with socket.create_connection((host, port), DIAL_S):
            return ""
    except (IndexError, ValueError):
        return "not an address that this dtrain understands"
    except TimeoutError:
        return f"no answer within {DIAL_S:.0f} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
