"""`dtrain worker`: finds or begins a run, wires its parts together and trains until told to stop."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.trainer.errors import RunError, UsageError

if TYPE_CHECKING:
    from dtrain.dht.exchange import DhtExchange
    from dtrain.dht.invite import Invite
    from dtrain.trainer.manifest import Manifest
    from dtrain.trainer.signing import SignedManifest
    from dtrain.trainer.worker import Worker

MAX_WORKERS_IN_A_FOLDER = 64
FIND_MANIFEST_S = 20.0

# Flags that set something all peers of a run share, and the manifest key each one sets.
SHARED_FLAGS = {
    "preset": "model.preset",
    "inner_steps": "train.inner_steps",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "seed": "train.seed",
    "start_workers": "exchange.start_workers",
    "matchmaking_s": "exchange.matchmaking_s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain worker --run-id my-first-run"
    parser.add_argument("--run-id", metavar="NAME", help="the run to join, or to begin if nobody has yet")
    parser.add_argument(
        "--invite", metavar="TEXT", help="the dtrain:// line that another worker of the run printed"
    )
    parser.add_argument(
        "--peer",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="libp2p address of a peer to join through",
    )
    machine = parser.add_argument_group("this machine")
    machine.add_argument("--name", help="shown to the others (default: worker-1, worker-2, ...)")
    machine.add_argument("--folder", type=Path, help="where checkpoints go (default: ./dtrain-runs/RUN/NAME)")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    machine.add_argument(
        "--threads", type=int, default=0, help="CPU threads for training; 0 = torch's choice"
    )
    machine.add_argument(
        "--data", type=Path, help="text file to train on (default: Python's own library sources)"
    )
    machine.add_argument(
        "--rounds", type=int, default=0, help="leave after the run's round N; 0 = go on until Ctrl-C"
    )
    machine.add_argument("--eval-every", type=int, default=5, help="rounds between evaluations; 0 = never")
    machine.add_argument("--checkpoint-every", type=int, default=5, help="rounds between checkpoints")
    machine.add_argument("--keep-checkpoints", type=int, default=3, help="checkpoints that stay on disk")
    machine.add_argument("--host", default="0.0.0.0", help="IPv4 address to listen on")
    machine.add_argument("--port", type=int, default=0, help="TCP port to listen on; 0 = any free one")
    shared = parser.add_argument_group("the run (for the first worker; later ones take what the run has)")
    shared.add_argument("--config", type=Path, metavar="RUN.TOML", help="the run's settings")
    shared.add_argument("--preset", help="model size: tiny, small, gpt2 or medium")
    shared.add_argument("--inner-steps", type=int, help="inner steps per round")
    shared.add_argument("--batch-size", type=int, help="sequences per inner step")
    shared.add_argument("--lr", type=float, help="learning rate of the inner steps")
    shared.add_argument("--seed", type=int, help="seed of the first weights and of the data")
    shared.add_argument("--start-workers", type=int, help="workers that must be there before round 1 begins")
    shared.add_argument("--matchmaking-s", type=float, help="longest wait for missing workers, in seconds")


def run(args: argparse.Namespace) -> int:
    """Run the command until the run or the user ends it."""
    started = _command_start()
    invite = _invite(args)
    run_id = _run_id(args, invite)
    proposed = _proposed_manifest(args, run_id)
    with ExitStack() as stack:
        name, folder = stack.enter_context(_worker_folder(args, run_id))
        worker = _start(args, run_id, invite, proposed, name, folder, stack)
        worker.report.started = started
        with _signals(worker):
            worker.run()
    return 0


def _start(
    args: argparse.Namespace,
    run_id: str,
    invite: Invite | None,
    proposed: Manifest | None,
    name: str,
    folder: Path,
    stack: ExitStack,
) -> Worker:
    """Find or begin the run, build the worker, open the run in the exchange."""
    from dtrain.dht import rendezvous
    from dtrain.dht.exchange import DhtExchange, PeerSettings
    from dtrain.dht.process import ExchangeError

    stored = _stored_manifest(folder)
    with ExitStack() as beginning:
        beginning.enter_context(rendezvous.lock())  # two workers started at once must not both begin the run
        peers = list(args.peer) + list(invite.addresses if invite else ())
        if not peers:
            peers = [address for local in rendezvous.find(run_id) for address in local.addresses]
        settings = PeerSettings(folder / "identity.key", args.host, args.port, tuple(peers))
        exchange = DhtExchange(settings)
        stack.callback(exchange.close)
        from dtrain.trainer.settings import MachineSettings  # torch comes in while the network process starts
        from dtrain.trainer.worker import Worker

        try:
            exchange.connect()
            if peers:
                print(f"Connected to the run through {len(peers)} known addresses.", flush=True)
                signed = _find_manifest(exchange, run_id, invite)
            else:
                signed = stored or _begin_run(args, run_id, folder)
        except ExchangeError as error:
            raise (UsageError if not peers or args.peer or invite else RunError)(str(error)) from None
        _check_flags(args, proposed, signed.manifest)
        machine = MachineSettings(
            name=name,
            folder=folder,
            device=args.device,
            threads=args.threads,
            data=args.data,
            max_rounds=args.rounds,
            eval_every=args.eval_every,
            keep_checkpoints=args.keep_checkpoints,
            checkpoint_every=args.checkpoint_every,
        )
        metrics = stack.enter_context(_metrics(folder))
        worker = Worker(signed.manifest, machine, exchange, metrics, _say)
        (folder / "manifest.json").write_text(signed.to_json())
        _open_run(exchange, signed, worker)
    metrics.write(
        "start",
        name=name,
        peer_id=exchange.peer_id,
        device=worker.report.device,
        pid=os.getpid(),
        run_id=run_id,
        manifest_hash=signed.manifest.hash.hex(),
        num_params=worker.codec.num_params,
    )
    _say(
        f"Run {run_id}: {worker.codec.num_params / 1e6:.1f}M parameters on {worker.report.device}; "
        f"you are {name} ({exchange.peer_id[-8:]}). Ctrl-C leaves cleanly."
    )
    _print_invite(exchange, signed)
    return worker


def _open_run(exchange: DhtExchange, signed: SignedManifest, worker: Worker) -> None:
    manifest, terms = signed.manifest, signed.manifest.exchange
    exchange.open_run(
        run_id=manifest.run_id,
        manifest=signed.to_json().encode(),
        manifest_hash=manifest.hash,
        codec=manifest.codec.to_dict(),
        shapes=worker.codec.shapes,
        matchmaking_s=terms.matchmaking_s,
        round_timeout_s=terms.round_timeout_s,
        sender_timeout_s=terms.sender_timeout_s,
        exact_up_to=terms.exact_up_to,
        heartbeat_s=terms.heartbeat_s,
        heartbeat_ttl_s=terms.heartbeat_ttl_s,
    )


# ---------------------------------------------------------------------- which run, which settings


def _invite(args: argparse.Namespace) -> Invite | None:
    if args.invite is None:
        return None
    from dtrain.dht.invite import InviteError, decode

    try:
        return decode(args.invite)
    except InviteError as error:
        raise UsageError(f"--invite: {error}") from None


def _run_id(args: argparse.Namespace, invite: Invite | None) -> str:
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


def _proposed_manifest(args: argparse.Namespace, run_id: str) -> Manifest | None:
    """What --config and the shared flags ask for; None when nothing of the kind was typed."""
    from dtrain.trainer.data import file_sha256
    from dtrain.trainer.manifest import manifest_from_toml, preset_manifest

    overrides: dict[str, object] = {key: getattr(args, flag) for flag, key in SHARED_FLAGS.items()}
    if args.data is not None:
        sha256 = file_sha256(args.data)
        overrides.update({"data.source": "file", "data.name": args.data.name, "data.sha256": sha256})
    if args.config is not None:
        return manifest_from_toml(args.config, {**overrides, "run_id": run_id})
    if all(value is None for value in overrides.values()):
        return None
    preset = overrides.pop("model.preset") or "tiny"
    return preset_manifest(run_id, str(preset), overrides)


def _check_flags(args: argparse.Namespace, proposed: Manifest | None, actual: Manifest) -> None:
    """Refuse flags that contradict the run. Only what was typed is compared, not the defaults around it."""
    if proposed is None:
        return
    from dtrain.trainer.manifest import diff

    typed = {key for flag, key in SHARED_FLAGS.items() if getattr(args, flag) is not None}
    if args.data is not None:
        typed |= {"data.name", "data.sha256"}
    for key, wanted, has in diff(proposed, actual):
        if key != "organizer" and (args.config is not None or key in typed):
            raise UsageError(
                f"the run {actual.run_id} has {key} = {has!r}, you asked for {wanted!r}: "
                "leave that setting out to join, or choose another --run-id to begin a run of your own"
            )


def _find_manifest(exchange: DhtExchange, run_id: str, invite: Invite | None) -> SignedManifest:
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


def _stored_manifest(folder: Path) -> SignedManifest | None:
    """The run's manifest as this folder has it from last time."""
    from dtrain.trainer.signing import SignedManifest

    path = folder / "manifest.json"
    return SignedManifest.from_json(path.read_text()) if path.exists() else None


def _begin_run(args: argparse.Namespace, run_id: str, folder: Path) -> SignedManifest:
    from dtrain.trainer.manifest import preset_manifest
    from dtrain.trainer.signing import OrganizerKey

    manifest = _proposed_manifest(args, run_id) or preset_manifest(run_id)
    _say(f"Nobody trains {run_id} yet: beginning it.")
    return OrganizerKey.load_or_create(folder.parent / "organizer.key").sign(manifest)


def _print_invite(exchange: DhtExchange, signed: SignedManifest) -> None:
    from dtrain.dht.invite import MAX_ADDRESSES, Invite

    addresses = tuple(exchange.addresses[:MAX_ADDRESSES])
    organizer = bytes.fromhex(signed.manifest.organizer)
    invite = Invite(signed.manifest.run_id, signed.manifest.hash, organizer, addresses)
    _say(f"Others join with:\n  dtrain worker --invite {invite.encode()}")


# ---------------------------------------------------------------------- this machine


@contextmanager
def _worker_folder(args: argparse.Namespace, run_id: str) -> Iterator[tuple[str, Path]]:
    """This worker's (name, folder), locked: a second worker in the same place takes the next free name."""
    if args.folder is not None:
        choices = [(args.name or args.folder.name, args.folder)]
    elif args.name is not None:
        choices = [(args.name, Path("dtrain-runs") / run_id / args.name)]
    else:
        names = [f"worker-{n}" for n in range(1, MAX_WORKERS_IN_A_FOLDER + 1)]
        choices = [(name, Path("dtrain-runs") / run_id / name) for name in names]
    for name, folder in choices:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / "lock").open("w")
        except OSError as error:
            raise UsageError(
                f"cannot write to {folder}: {error.strerror}; type --folder with a folder you own"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield name, folder
            return
    raise UsageError(f"another worker is using {choices[0][1]}: type another --folder or --name")


@contextmanager
def _metrics(folder: Path) -> Iterator[Any]:
    from dtrain.trainer.metrics import MetricsLog

    with MetricsLog(folder / "metrics.jsonl") as metrics:
        yield metrics


@contextmanager
def _signals(worker: Worker) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to end cleanly; a second one ends at once."""

    def handle(number: int, _: object) -> None:
        if worker.stop_asked:
            raise KeyboardInterrupt
        _say("Leaving after the step under way; press Ctrl-C again to leave at once.")
        worker.stop("asked to stop")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command_start() -> float:
    """When this process began, as time.time()."""
    import psutil

    return float(psutil.Process().create_time())


def _say(line: str) -> None:
    print(line, flush=True)
