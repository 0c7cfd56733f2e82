"""Which run a worker joins, and whether what was typed agrees with it."""

from __future__ import annotations

import argparse
import ipaddress
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.cli_propose import DATA_FLAGS, MODEL_FLAGS
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.compression.layout import Shapes
    from dtrain.dht.exchange import DhtExchange
    from dtrain.dht.invite import Invite
    from dtrain.trainer.manifest import Manifest
    from dtrain.trainer.signing import SignedManifest
    from dtrain.trainer.voice import Voice

FIND_MANIFEST_S = 20.0

REACH_LINES = {
    "direct": "Others can dial this machine.",
    "relayed": "Nobody can dial this machine directly; others reach it through a relay.",
    "client": "Nobody can dial this machine directly; contributing in client mode.",
}

# Flags that set something all peers of a run share, and the manifest key each one sets.
SHARED_FLAGS = {
    "preset": "model.preset",
    "strategy": "strategy.name",
    "optimizer": "train.optimizer",
    "inner_steps": "train.inner_steps",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "seed": "train.seed",
    "start_workers": "exchange.start_workers",
    "overlap": "exchange.overlap",
    "round_tokens": "exchange.round_tokens",
    "matchmaking_s": "exchange.matchmaking_s",
    "admission": "admission.mode",
}


def check_address(args: argparse.Namespace) -> None:
    """Refuse a --host or --port that cannot exist."""
    try:
        ipaddress.IPv4Address(args.host)
    except ValueError:
        raise UsageError(
            f"--host {args.host} is no IPv4 address: type 0.0.0.0, or one of this machine's"
        ) from None
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port} does not exist: type 1 to 65535, or 0 for any free one")
    if announce := getattr(args, "announce", ""):
        host, _, port = announce.partition(":")
        try:
            good = ipaddress.IPv4Address(host) and ipaddress.IPv4Address(args.host).is_loopback
            good = good and 1 <= int(port) <= 65535
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"--announce {announce} will not do: type HOST:PORT, and --host 127.0.0.1")


def check_rate(args: argparse.Namespace) -> None:
    """Refuse a --newcomer-mbps that cannot be."""
    if not 0 <= args.newcomer_mbps < math.inf:
        raise UsageError(
            f"--newcomer-mbps {args.newcomer_mbps} will not do: type 0 for half of the line, or Mbit/s"
        )


def parse_invite(args: argparse.Namespace) -> Invite | None:
    return None if args.invite is None else decode_invite(args.invite)


def decode_invite(text: str) -> Invite:
    """What an invite says; UsageError for a text that is none."""
    from dtrain.dht.invite import InviteError, decode

    try:
        return decode(text)
    except InviteError as error:
        raise UsageError(str(error)) from None


def choose_run_id(args: argparse.Namespace, invite: Invite | None) -> str:
    from dtrain.trainer.manifest import validate_run_id

    if invite is not None:
        if args.run_id not in (None, invite.run_id):
            raise UsageError(
                f"--run-id {args.run_id} but the invite is for {invite.run_id}: leave --run-id out"
            )
        return validate_run_id(invite.run_id)
    if args.run_id is None:
        raise UsageError("which run? type --run-id NAME, or --invite with an invite you were given")
    return validate_run_id(args.run_id)


def proposed_manifest(args: argparse.Namespace, run_id: str) -> Manifest | None:
    """What --config and the shared flags ask for; None when nothing of the kind was typed."""
    from dtrain.trainer.cli_propose import data_overrides, model_overrides
    from dtrain.trainer.manifest import manifest_from_toml, preset_manifest

    overrides: dict[str, object] = {key: getattr(args, flag) for flag, key in SHARED_FLAGS.items()}
    overrides.update(data_overrides(args) | model_overrides(args))
    if args.config is not None:
        return manifest_from_toml(args.config, {**overrides, "run_id": run_id})
    if all(value is None for value in overrides.values()):
        return None
    preset = overrides.pop("model.preset") or "tiny"
    return preset_manifest(run_id, str(preset), overrides)


def check_flags(args: argparse.Namespace, proposed: Manifest | None, actual: Manifest) -> None:
    """Refuse flags that contradict the run. Only what was typed is compared, not the defaults around it."""
    if proposed is None:
        return
    from dtrain.trainer.manifest import diff

    typed = {key for flag, key in SHARED_FLAGS.items() if getattr(args, flag) is not None}
    if args.data is not None and not actual.data.mix:
        typed |= {"data.name", "data.sha256"}
    if args.tokenizer is not None:
        typed |= {"data.tokenizer_sha256"}
    if args.model is not None:
        typed |= {"model.kind", "model.name", "model.config", "model.weights_sha256"}
    typed |= {key for flag, key in (DATA_FLAGS | MODEL_FLAGS).items() if getattr(args, flag) is not None}
    for key, wanted, has in diff(proposed, actual):
        if key != "organizer" and (args.config is not None or key in typed):
            raise UsageError(
                f"the run {actual.run_id} has {key} = {has!r}, you asked for {wanted!r}: "
                "leave that setting out to join, or choose another --run-id to begin a run of your own"
            )


def find_manifest(exchange: DhtExchange, run_id: str, invite: Invite | None) -> SignedManifest:
    """The manifest of a run that others already train."""
    from dtrain.trainer.signing import SignedManifest

    until = time.monotonic() + FIND_MANIFEST_S
    while time.monotonic() < until:
        found: dict[bytes, SignedManifest] = {}
        for blob in exchange.find_manifests(run_id):
            try:
                signed = SignedManifest.from_json(blob)
            except UsageError:
                continue  # somebody's garbage under our key
            if signed.manifest.run_id != run_id:
                continue  # another run's, put there by somebody
            if invite is None or signed.manifest.hash == invite.manifest_hash:
                found[signed.manifest.hash] = signed
        if len(found) > 1:
            raise UsageError(
                f"several runs call themselves {run_id}; join with an --invite, which names one of them"
            )
        if found:
            return found.popitem()[1]
        time.sleep(0.5)
    raise UsageError(
        f"the peers you gave know no run {run_id}"
        + (" with that invite" if invite else "")
        + ": is the name right?"
    )


def run_folder(run_id: str) -> Path:
    """Where this machine keeps what belongs to a run."""
    return Path("dtrain-runs") / run_id


def stored_manifest(folder: Path) -> SignedManifest | None:
    """The run's manifest as this worker's folder has it from last time, else as `dtrain create` left it beside."""
    from dtrain.trainer.signing import SignedManifest

    for path in (folder / "manifest.json", folder.parent / "manifest.json"):
        if path.exists():
            return SignedManifest.from_json(path.read_text())
    return None


def invite_text(exchange: DhtExchange, signed: SignedManifest) -> str:
    """An invite through this peer, or through those that it joined by; without a token."""
    from dtrain.dht.invite import MAX_ADDRESSES, Invite

    addresses = tuple(exchange.addresses[:MAX_ADDRESSES])
    organizer = bytes.fromhex(signed.manifest.organizer)
    return Invite(signed.manifest.run_id, signed.manifest.hash, organizer, addresses).encode()


def begin_run(args: argparse.Namespace, run_id: str, folder: Path, voice: Voice) -> SignedManifest:
    from dtrain.trainer.manifest import preset_manifest
    from dtrain.trainer.signing import OrganizerKey

    manifest = proposed_manifest(args, run_id) or preset_manifest(run_id)
    voice.say(f"Nobody trains {run_id} yet: beginning it.")
    return OrganizerKey.load_or_create(folder.parent / "organizer.key").sign(manifest)


def load_training() -> threading.Thread:
    """Import in the background what training needs: seconds of work, while the network process comes up."""

    def load() -> None:
        # What fails here fails again where it is needed, and is told there; and an import that goes on while a command
        # that was mistyped ends has nothing to tell.
        with suppress(Exception):
            import torch

            from dtrain.compression.kernels import pick

            torch.optim.SGD(
                [torch.zeros(1)], lr=1.0
            )  # a process's first optimizer brings in torch's compiler
            pick.kernel()
            import dtrain.trainer.worker  # noqa: F401

    thread = threading.Thread(target=load, name="loading")
    thread.start()
    return thread


def warm_up_codec(exchange: DhtExchange, signed: SignedManifest, voice: Voice) -> threading.Thread:
    """Have the codec ready: a thread that ends when the network process has it, in which it is compiled if it must be
    (once per machine). This process has it a moment later; whoever needs it sooner waits for it."""
    from dtrain.compression.warm_up import warm_up

    codec = signed.manifest.codec

    def prepare() -> None:
        from dtrain.dht.process import ExchangeError

        with voice.waiting("Preparing the codec, which is compiled once per machine") as update:
            try:
                exchange.prepare(codec.to_dict(), update)
            except ExchangeError:
                pass  # the network process is gone: `open_run` says so
        threading.Thread(target=warm_up, args=(codec,), name="warm-up").start()

    thread = threading.Thread(target=prepare, name="prepare")
    thread.start()
    return thread


def open_run(
    exchange: DhtExchange,
    signed: SignedManifest,
    shapes: Shapes,
    pieces: Sequence[int],
    admission: Mapping[str, object] | None = None,
) -> None:
    """Take part in a run on its manifest's terms; the rest as `DhtExchange.open_run` has it."""
    manifest, terms = signed.manifest, signed.manifest.exchange
    exchange.open_run(
        run_id=manifest.run_id,
        manifest=signed.to_json().encode(),
        manifest_hash=manifest.hash,
        codec=manifest.codec.to_dict(),
        shapes=shapes,
        pieces=pieces,
        admission=admission,
        matchmaking_s=terms.matchmaking_s,
        round_timeout_s=terms.round_timeout_s,
        sender_timeout_s=terms.sender_timeout_s,
        exact_up_to=terms.exact_up_to,
        max_weight=manifest.max_weight,
        screens=terms.screens,
        max_share=manifest.admission.max_share,
        heartbeat_s=terms.heartbeat_s,
        heartbeat_ttl_s=terms.heartbeat_ttl_s,
    )
