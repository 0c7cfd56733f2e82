"""`dtrain worker`: finds or begins a run, wires its parts together and trains until told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dtrain.trainer.cli_admission import admission_args, show_pass
from dtrain.trainer.cli_flags import add_limit_flags, add_machine_flags, add_run_flags, typed_limits
from dtrain.trainer.cli_folder import worker_folder
from dtrain.trainer.cli_propose import local_model, local_tokenizer
from dtrain.trainer.cli_run import (
    REACH_LINES,
    begin_run,
    check_address,
    check_flags,
    check_rate,
    choose_run_id,
    find_manifest,
    invite_text,
    load_training,
    open_run,
    parse_invite,
    proposed_manifest,
    stored_manifest,
    warm_up_codec,
)
from dtrain.trainer.cli_visible import found_peers, visible_on_the_network
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.voice import Voice

if TYPE_CHECKING:
    from dtrain.dht.exchange import DhtExchange
    from dtrain.trainer.control import Control
    from dtrain.trainer.journal import SignedJournal
    from dtrain.trainer.limits import Limits
    from dtrain.trainer.metrics import Metrics
    from dtrain.trainer.signing import SignedManifest
    from dtrain.trainer.worker import Worker


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
    add_machine_flags(parser)
    add_limit_flags(parser, leave_out=("--threads",))
    add_run_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command until the run or the user ends it."""
    return run_worker(args)


# Shown what will be joined, before anything is; False = the user would rather not.
Approve = Callable[["Worker", Voice], bool]


def run_worker(args: argparse.Namespace, approve: Approve = lambda *_: True) -> int:
    """Run a worker until the run or the user ends it; returns the exit code."""
    started = _command_start()
    check_address(args)
    check_rate(args)
    typed_limits(args)
    run_id = choose_run_id(args, parse_invite(args))
    with ExitStack() as stack:
        session = Session(args, run_id, approve, stack)
        worker = session.start()
        if worker is None:
            return 0
        worker.report.started = started
        with _signals(worker, session.voice):
            worker.run()
        if session.exchange.refused:
            raise RunError(session.exchange.refused)
    return 0


class Session:
    """One run of the command: its parts, which `stack` closes in the end."""

    def __init__(self, args: argparse.Namespace, run_id: str, approve: Approve, stack: ExitStack):
        """Starts what takes long: the network process, and the import of what training needs."""
        from dtrain.trainer.control import Control

        self.args, self.run_id, self.invite = args, run_id, parse_invite(args)
        self._approve, self._stack = approve, stack
        self.name, self.folder = stack.enter_context(worker_folder(args, run_id))
        self.voice = Voice()
        self.control: Control = Control(self.folder)
        stack.callback(self.control.close)
        if limits := typed_limits(args):
            self.control.set_limits(limits)
        self.exchange = self._start_network()
        self._loading = load_training()
        self._invite_text = ""
        with self.voice.waiting("Reading what was typed"):
            self.proposed = proposed_manifest(args, run_id)

    def _start_network(self) -> DhtExchange:
        from dtrain.dht.exchange import DhtExchange
        from dtrain.dht.peer_settings import PeerSettings

        args = self.args
        settings = PeerSettings(
            identity=self.folder / "identity.key",
            host=args.host,
            port=args.port,
            announce=args.announce,
            # What a relay passes on is in no budget: who counts bytes is none.
            passes_on=not args.no_relay and not self.control.limits.bounds_traffic,
            relays=not args.no_relay,
            newcomer_mbps=args.newcomer_mbps,
        )
        exchange = DhtExchange(settings)
        self._stack.callback(exchange.close)
        self.control.used_bytes = exchange.wire_bytes
        return exchange

    def start(self) -> Worker | None:
        """Find or begin the run, build the worker, open the run in the exchange; None if the user declined."""
        from dtrain.dht import rendezvous
        from dtrain.dht.process import ExchangeError

        self._serve_control()
        stored, peers = stored_manifest(self.folder), list[str]()
        try:
            with ExitStack() as beginning:
                beginning.enter_context(rendezvous.lock())  # two started at once must not both begin the run
                peers = list(self.args.peer) + list(self.invite.addresses if self.invite else ())
                peers = peers or found_peers(self.run_id, self.args, self.voice)
                if peers:
                    beginning.close()  # the run is there already
                self._connect(peers)
                return self._join(self._manifest(stored, bool(peers)))
        except ExchangeError as error:
            # With no peers or only typed ones, what was typed is what is wrong.
            typed_wrong = self.args.peer or self.args.invite or not peers
            raise (UsageError if typed_wrong else RunError)(str(error)) from None

    def _serve_control(self) -> None:
        """Others on this machine may see and steer this worker from now on."""
        from dtrain.dht import rendezvous
        from dtrain.trainer.control_server import ControlServer

        folder = rendezvous.folder() / "control"
        server = ControlServer(self.run_id, self.name, self.control, self.voice, folder)
        self._stack.callback(server.close)

    def _connect(self, peers: list[str]) -> None:
        with self.voice.waiting("Connecting to the run" if peers else "Starting the network"):
            self.exchange.connect(peers)
            self._loading.join()
        self._obey_limits()
        if peers:
            self.voice.say(f"Connected to the run. {REACH_LINES[self.exchange.reach]}")

    def _obey_limits(self) -> None:
        def obey(limits: Limits) -> None:
            self.exchange.limit(up_mbps=limits.up_mbps, down_mbps=limits.down_mbps)

        obey(self.control.limits)
        self.control.on_limits = obey

    def _manifest(self, stored: SignedManifest | None, is_there: bool) -> SignedManifest:
        if is_there:
            with self.voice.waiting("Asking for the run's settings"):
                signed = find_manifest(self.exchange, self.run_id, self.invite)
        else:
            signed = stored or begin_run(self.args, self.run_id, self.folder, self.voice)
        check_flags(self.args, self.proposed, signed.manifest)
        return signed

    def _join(self, signed: SignedManifest) -> Worker | None:
        from dtrain.trainer.wandb_log import open_metrics

        exchange = self.exchange
        shown = show_pass(signed.manifest, self.invite, exchange.peer_id, self.folder)
        warming = warm_up_codec(exchange, signed, self.voice)
        metrics = self._stack.enter_context(
            open_metrics(self.folder, self.args.wandb, self.name, signed.manifest.to_dict())
        )
        worker = self._build(signed, metrics)
        (self.folder / "manifest.json").write_text(signed.to_json())
        exchange.on_refused = lambda: worker.stop("not let in")
        admission = admission_args(signed.manifest, shown, self.folder)
        warming.join()
        open_run(exchange, signed, worker.codec.shapes, worker.outer.pieces, admission)
        if not self._approve(worker, self.voice):
            return None
        self._invite_text = invite_text(exchange, signed)
        metrics.write(
            "start",
            name=self.name,
            peer_id=exchange.peer_id,
            device=worker.report.device,
            pid=os.getpid(),
            run_id=self.run_id,
            manifest_hash=signed.manifest.hash.hex(),
            num_params=worker.codec.num_params,
            reach=exchange.reach,
        )
        self._stack.enter_context(visible_on_the_network(exchange, signed, self.args))
        exchange.on_change = lambda state, reason: self._changed(metrics, state, reason)
        self.voice.say(
            f"Run {self.run_id}: {worker.codec.num_params / 1e6:.1f}M parameters on {worker.report.device}; "
            f"you are {self.name} ({exchange.peer_id[-8:]}). Ctrl-C leaves cleanly."
        )
        if signed.manifest.admission.mode == "open":
            self.voice.say(f"Others join with:\n  dtrain join {self._invite_text}")
        return worker

    def _build(self, signed: SignedManifest, metrics: Metrics) -> Worker:
        from dtrain.trainer.settings import MachineSettings
        from dtrain.trainer.worker import Worker

        args, exchange = self.args, self.exchange
        settings = MachineSettings(
            name=self.name,
            folder=self.folder,
            device=args.device,
            precision=args.precision,
            micro_batch=args.micro_batch,
            recompute=args.recompute,
            compile=args.compile,
            threads=args.threads,
            max_tokens_per_s=args.max_tokens_per_s,
            audit=args.audit,
            sample_text=True,
            data=args.data,
            tokenizer=local_tokenizer(args),
            model=local_model(args.model),
            trusted=args.trust_code,
            max_rounds=args.rounds,
            eval_every=args.eval_every,
            keep_checkpoints=args.keep_checkpoints,
            checkpoint_every=args.checkpoint_every,
            checkpoint_to=args.checkpoint_to,
        )
        journal, voice = self._journal() if args.journal else None, self.voice
        with voice.waiting("Getting the text to train on"):
            worker = Worker(
                signed.manifest,
                settings,
                exchange,
                metrics,
                voice.say,
                control=self.control,
                journal=journal,
            )
        if journal is not None:
            journal.write(
                "begin",
                peer_id=exchange.peer_id,
                manifest=signed.manifest.hash.hex(),
                chunks=worker.codec.num_chunks,
            )
        worker.download.bar = worker.report.bar = voice

        def describe() -> dict[str, Any]:
            return {
                **worker.report.snapshot(),
                "folder": str(self.folder.resolve()),
                "num_params": worker.codec.num_params,
                "reach": exchange.reach,
                "invite": self._invite_text,
            }

        self.control.describe = describe
        return worker

    def _journal(self) -> SignedJournal:
        """This worker's journal, signed with its identity."""
        from dtrain.dht import identity
        from dtrain.trainer.journal import FILE, SignedJournal

        own = identity.load_or_create(self.folder / "identity.key")
        journal = SignedJournal(self.folder / FILE, self.exchange.peer_id, own.key.sign, time.time)
        self._stack.callback(journal.close)
        return journal

    def _changed(self, metrics: Metrics, state: str, reason: str) -> None:
        """The network process is being renewed ("lost"), or was ("back")."""
        reach, addresses = self.exchange.reach, self.exchange.addresses
        metrics.write("network", state=state, reason=reason, reach=reach, addresses=addresses)
        if state == "lost":
            self.voice.say(f"The network is lost: {reason}. Connecting anew.")
        else:
            self.voice.say(f"The network is back. {REACH_LINES[reach]}")


@contextmanager
def _signals(worker: Worker, voice: Voice) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to end cleanly; a second one ends at once."""

    def handle(number: int, _: object) -> None:
        if worker.stop_asked:
            raise KeyboardInterrupt
        voice.say("Leaving after the step under way; press Ctrl-C again to leave at once.")
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
