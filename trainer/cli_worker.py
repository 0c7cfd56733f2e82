"""`dtrain worker`: finds or begins a run, wires its parts together and trains until told to stop."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.cli_run import (
    begin_run,
    check_address,
    check_flags,
    choose_run_id,
    find_manifest,
    parse_invite,
    proposed_manifest,
    stored_manifest,
)
from dtrain.trainer.errors import RunError, UsageError

if TYPE_CHECKING:
    from dtrain.dht.exchange import DhtExchange
    from dtrain.dht.invite import Invite
    from dtrain.trainer.manifest import Manifest
    from dtrain.trainer.metrics import MetricsLog
    from dtrain.trainer.signing import SignedManifest
    from dtrain.trainer.worker import Worker

MAX_WORKERS_IN_A_FOLDER = 64
NOTICE_AFTER_S = 2.0

REACH_LINES = {
    "direct": "Others can dial this machine.",
    "client": "Nobody can dial this machine directly; contributing in client mode.",
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
    machine.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores but one")
    machine.add_argument(
        "--data", type=Path, help="text file to train on (default: Python's own library sources)"
    )
    machine.add_argument(
        "--rounds", type=int, default=0, help="leave after the run's round N; 0 = go on until Ctrl-C"
    )
    machine.add_argument(
        "--max-tokens-per-s", type=float, default=0.0, help="train no faster than this; 0 = no limit"
    )
    machine.add_argument("--audit", action="store_true", help="check every round that no delta is lost")
    machine.add_argument("--eval-every", type=int, default=5, help="rounds between evaluations; 0 = never")
    machine.add_argument("--checkpoint-every", type=int, default=5, help="rounds a checkpoint; 0 = never")
    machine.add_argument("--keep-checkpoints", type=int, default=3, help="checkpoints that stay on disk")
    machine.add_argument("--host", default="0.0.0.0", help="IPv4 address to listen on")
    machine.add_argument("--port", type=int, default=0, help="TCP port to listen on; 0 = any free one")
    shared = parser.add_argument_group("the run (for the first worker; later ones take what the run has)")
    shared.add_argument("--config", type=Path, metavar="RUN.TOML", help="the run's settings")
    shared.add_argument("--preset", help="model size: tiny, small, gpt2 or medium")
    shared.add_argument("--strategy", help="what travels: sparseloco, diloco, demo or ddp")
    shared.add_argument("--optimizer", help="of the inner steps: adamw, adamw8bit or muon")
    shared.add_argument("--inner-steps", type=int, help="inner steps per round")
    shared.add_argument("--batch-size", type=int, help="sequences per inner step")
    shared.add_argument("--lr", type=float, help="learning rate of the inner steps")
    shared.add_argument("--seed", type=int, help="seed of the first weights and of the data")
    shared.add_argument("--start-workers", type=int, help="workers that must be there before round 1 begins")
    shared.add_argument("--overlap", help="eager: exchange while training goes on; none: take turns")
    shared.add_argument(
        "--round-tokens", type=int, help="a round ends when all have trained so many; 0 = fixed steps"
    )
    shared.add_argument("--matchmaking-s", type=float, help="longest wait for missing workers, in seconds")


def run(args: argparse.Namespace) -> int:
    """Run the command until the run or the user ends it."""
    started = _command_start()
    check_address(args)
    invite = parse_invite(args)
    run_id = choose_run_id(args, invite)
    proposed = proposed_manifest(args, run_id)
    from dtrain.dht.process import ExchangeError

    with ExitStack() as stack:
        name, folder = stack.enter_context(_worker_folder(args, run_id))
        try:
            worker = _start(args, run_id, invite, proposed, name, folder, stack)
        except ExchangeError as error:
            # With no peers or only typed ones, what was typed is what is wrong.
            typed_wrong = args.peer or args.invite or not _found_peers(run_id)
            raise (UsageError if typed_wrong else RunError)(str(error)) from None
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

    stored = stored_manifest(folder)
    with ExitStack() as beginning:
        beginning.enter_context(rendezvous.lock())  # two workers started at once must not both begin the run
        peers = list(args.peer) + list(invite.addresses if invite else ())
        peers = peers or _found_peers(run_id)
        if peers:
            beginning.close()  # the run is there already
        exchange = _connect(args, folder, peers, stack)
        signed = (
            find_manifest(exchange, run_id, invite) if peers else stored or begin_run(args, run_id, folder)
        )
        check_flags(args, proposed, signed.manifest)
        warming = _warm_up(signed.manifest)
        metrics = stack.enter_context(_metrics(folder))
        worker = _build(args, signed, name, folder, exchange, metrics)
        (folder / "manifest.json").write_text(signed.to_json())
        _open_run(exchange, signed, worker)
        warming.join()
    metrics.write(
        "start",
        name=name,
        peer_id=exchange.peer_id,
        device=worker.report.device,
        pid=os.getpid(),
        run_id=run_id,
        manifest_hash=signed.manifest.hash.hex(),
        num_params=worker.codec.num_params,
        reach=exchange.reach,
    )
    exchange.on_change = lambda state, reason: _changed(exchange, metrics, state, reason)
    _say(
        f"Run {run_id}: {worker.codec.num_params / 1e6:.1f}M parameters on {worker.report.device}; "
        f"you are {name} ({exchange.peer_id[-8:]}). Ctrl-C leaves cleanly."
    )
    _print_invite(exchange, signed)
    return worker


def _found_peers(run_id: str) -> list[str]:
    """Addresses of the run's workers on this machine."""
    from dtrain.dht import rendezvous

    return [address for worker in rendezvous.find(run_id) for address in worker.addresses]


def _connect(args: argparse.Namespace, folder: Path, peers: list[str], stack: ExitStack) -> DhtExchange:
    from dtrain.dht.exchange import DhtExchange, PeerSettings

    exchange = DhtExchange(PeerSettings(folder / "identity.key", args.host, args.port, tuple(peers)))
    stack.callback(exchange.close)
    import dtrain.trainer.worker  # noqa: F401  # torch comes in while the network process starts

    exchange.connect()
    if peers:
        _say(f"Connected to the run. {REACH_LINES[exchange.reach]}")
    return exchange


def _changed(exchange: DhtExchange, metrics: MetricsLog, state: str, reason: str) -> None:
    """The network process is being renewed ("lost"), or was ("back")."""
    metrics.write("network", state=state, reason=reason, reach=exchange.reach, addresses=exchange.addresses)
    if state == "lost":
        _say(f"The network is lost: {reason}. Connecting anew.")
    else:
        _say(f"The network is back. {REACH_LINES[exchange.reach]}")


def _warm_up(manifest: Manifest) -> threading.Thread:
    """Compile the codec's kernels in the background, with a word if that takes a while (once per machine)."""
    from dtrain.compression.warm_up import warm_up

    thread = threading.Thread(target=warm_up, args=(manifest.codec,), name="warm-up")
    thread.start()

    def notice() -> None:
        thread.join(NOTICE_AFTER_S)
        if thread.is_alive():
            _say("Compiling the codec for this machine; once only, about 20 s.")

    threading.Thread(target=notice, daemon=True).start()
    return thread


def _build(
    args: argparse.Namespace,
    signed: SignedManifest,
    name: str,
    folder: Path,
    exchange: DhtExchange,
    metrics: MetricsLog,
) -> Worker:
    from dtrain.trainer.settings import MachineSettings
    from dtrain.trainer.worker import Worker

    settings = MachineSettings(
        name=name,
        folder=folder,
        device=args.device,
        threads=args.threads,
        max_tokens_per_s=args.max_tokens_per_s,
        audit=args.audit,
        sample_text=True,
        data=args.data,
        max_rounds=args.rounds,
        eval_every=args.eval_every,
        keep_checkpoints=args.keep_checkpoints,
        checkpoint_every=args.checkpoint_every,
    )
    return Worker(signed.manifest, settings, exchange, metrics, _say)


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
        max_weight=manifest.max_weight,
        heartbeat_s=terms.heartbeat_s,
        heartbeat_ttl_s=terms.heartbeat_ttl_s,
    )


def _print_invite(exchange: DhtExchange, signed: SignedManifest) -> None:
    from dtrain.dht.invite import MAX_ADDRESSES, Invite

    addresses = tuple(exchange.addresses[:MAX_ADDRESSES])
    organizer = bytes.fromhex(signed.manifest.organizer)
    invite = Invite(signed.manifest.run_id, signed.manifest.hash, organizer, addresses)
    _say(f"Others join with:\n  dtrain worker --invite {invite.encode()}")


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
def _metrics(folder: Path) -> Iterator[MetricsLog]:
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
