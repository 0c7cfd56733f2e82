"""`dtrain revoke`: take back an invite with everybody who came by it, or shut out one machine."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from dtrain.trainer.cli_admission import issued_tokens, revoke
from dtrain.trainer.cli_invite import invite_of_this_machine
from dtrain.trainer.cli_run import decode_invite, stored_manifest
from dtrain.trainer.errors import RunError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain revoke 3f0c9a4be2d17765"
    parser.add_argument(
        "what",
        metavar="INVITE",
        help="the invite's id (dtrain invite --list) or text, or the peer id of one machine (12D3KooW...)",
    )
    parser.add_argument("--run-id", metavar="NAME", help="the run; not needed where there is only one")


def run(args: argparse.Namespace) -> int:
    """Sign the new list, keep it in the run's folder, and hand it to the members."""
    text, folder = invite_of_this_machine(args)
    signed = stored_manifest(folder)
    if signed is None:
        raise UsageError(
            f"{folder} holds no manifest of the run: type this in the folder that the run began in"
        )
    tokens, peers = _meant(args.what, folder.parent)
    after = revoke(signed, folder.parent, tokens=tokens, peers=peers)
    _publish(signed.manifest.run_id, signed.manifest.hash, list(decode_invite(text).addresses), after.blob)
    what = "machine" if peers else "invite, with everybody who came by it"
    print(f"Revoked: that {what}. The members hear of it within half a minute.")
    return 0


def _meant(what: str, folder: Path) -> tuple[set[bytes], set[bytes]]:
    """(tokens, peers) that the user means."""
    from dtrain.dht.identity import bytes_of, public_key_of

    if public_key_of(bytes_of(what)) is not None:
        return set(), {bytes_of(what)}
    for entry in issued_tokens(folder):
        if entry["id"] == what.lower():
            return {bytes.fromhex(entry["key"])}, set()
    if len(what) > 40:
        token = decode_invite(what).token
        if token is None:
            raise UsageError(
                "that invite has no token: nobody needs it to take part, so it cannot be revoked"
            )
        return {token.grant.key}, set()
    raise UsageError(f"{what[:60]!r} is no invite made in {folder}: dtrain invite --list shows their ids")


def _publish(run_id: str, manifest_hash: bytes, addresses: list[str], blob: bytes) -> None:
    from dtrain.dht.exchange import DhtExchange
    from dtrain.dht.peer_settings import PeerSettings
    from dtrain.dht.process import ExchangeError
    from dtrain.dht.terms import run_prefix

    with tempfile.TemporaryDirectory(prefix="dtrain-revoke-") as scratch:
        settings = PeerSettings(Path(scratch) / "identity.key", initial_peers=tuple(addresses), relays=False)
        exchange = DhtExchange(settings)
        try:
            exchange.connect()
            prefix = run_prefix(run_id, manifest_hash)
            if not exchange.process.command("revoke", prefix=prefix, revocations=blob):
                raise ExchangeError("no peer has taken it")
        except ExchangeError as error:
            raise RunError(
                f"revoked here, but the members have not heard of it ({error}): type the same again, "
                "or start a worker in this folder, which tells them"
            ) from None
        finally:
            exchange.close()
