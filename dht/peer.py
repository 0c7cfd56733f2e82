"""The network process of a worker: DHT node, averager and state transfer in one event loop.

A worker starts it as a child (`dht/start.py`) and talks to it over the socket FD, which is also its lifeline: when
the worker goes, however it goes, the socket closes and this process cleans up and ends. So training never shares a
process with hivemind, never forks, and a crashed network process is simply started again.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from hivemind.utils import get_dht_time

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.compression.warm_up import warm_up
from dtrain.dht import admissions, manifests, notes, rendezvous, streams
from dtrain.dht.archive_desk import ArchiveDesk
from dtrain.dht.audits import open_audits
from dtrain.dht.averager import SwarmAverager
from dtrain.dht.connection import attach
from dtrain.dht.contributions import open_contributions
from dtrain.dht.credit_file import FILE as CREDIT_FILE
from dtrain.dht.distance import Probe, measure_any
from dtrain.dht.door import entry_of
from dtrain.dht.faults import PIECE_BYTES, FaultPlan
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.identity import IdentityError, load_or_create
from dtrain.dht.kept_residual import KeptResidual
from dtrain.dht.matchmaking import LeaderBoard
from dtrain.dht.meeting import Rounds
from dtrain.dht.membership import Contribution
from dtrain.dht.partial_state import NoSpace
from dtrain.dht.passed_rounds import no_rounds
from dtrain.dht.reachability import CLIENT, DIRECT, Witness
from dtrain.dht.receipts import Receipts
from dtrain.dht.streams import StreamError, in_background
from dtrain.dht.swarm_clock import SwarmClock
from dtrain.dht.swarm_view import view_of
from dtrain.dht.terms import RunTerms
from dtrain.dht.transfer import StateTransfer
from dtrain.dht.transport import Traffic, TransportError, patch_hivemind
from dtrain.dht.watchdog import Stuck, within
from dtrain.dht.worker_line import WorkerLine

# The worker's commands, each a method of NetworkPeer.
COMMANDS = {
    *("connect", "distance", "find_manifests", "publish", "prepare", "open_run", "limit", "observe"),
    *("announce", "post", "read_notes", "run_round", "release_residual", "residual_saved"),
    *("fetch_round", "fetch_state", "revoke", "archive", "accuse", "fetch_contribution"),
}
REFUSALS = (TransportError, IdentityError, StreamError, NoSpace)  # their texts are for the user
SHOW_PERIOD_S = 0.25
LEAVE_S = 2.0  # longest wait for our last heartbeat on the way out
Args = dict[str, Any]


class NetworkPeer:
    """Carries out the worker's commands; one method per command, named in `COMMANDS`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._worker = WorkerLine(reader, writer, REFUSALS)
        self._traffic, self._private = Traffic(), Path()
        self._rendezvous_file: Path | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._moved = ""
        self._goodbye = "stopped"  # what we say on the way out, unless our worker says first that it leaves
        self._opened = asyncio.Event()  # the run is
        self._receipts: Receipts | None = None  # of a worker's rounds

    async def serve(self) -> None:
        """Serve the worker until it says "close" or is gone."""
        try:
            if await self._worker.serve(self._carry_out, self._carried_out):
                self._goodbye = "leaving"
        finally:
            await self._clean_up()

    async def _carry_out(self, command: str, args: Args) -> Any:
        if command not in COMMANDS:
            raise ValueError(f"there is no command {command!r:.40}")
        return await getattr(self, command)(args)

    def _carried_out(self) -> None:
        if self._opened.is_set():
            self._show_swarm()  # with the bytes that the command cost

    # ------------------------------------------------------------------ commands

    async def connect(self, args: Args) -> Args:
        """Start the daemon and the DHT node; returns the peer id and the addresses others can join through."""
        self._private = Path(args["private_folder"])
        patch_hivemind(self._private, self._traffic)
        self._identity = identity = load_or_create(Path(args["identity"]))
        how = {name: args[name] for name in ("host", "port", "announce", "passes_on", "relays", "strict")}
        through, before = args["initial_peers"], args["reach_before"]
        (clock := SwarmClock()).install()
        self._connection = await attach(
            identity, self._private, peers=through, before=before, clock=clock, **how
        )
        self._p2p, self._node = self._connection.p2p, self._connection.node
        # Without it we are deaf: end, and be restarted.
        in_background(self._p2p._child.wait()).add_done_callback(lambda _: self._worker.close())
        if self._connection.reach == DIRECT:
            await Witness(self._p2p, self._seen_addresses).open()
            await Probe(self._p2p, clock).open()
        self._tasks += [
            asyncio.create_task(self._connection.keep(self._seen_addresses)),
            asyncio.create_task(self._watch_connection()),
        ]
        made = self._connection
        return {"peer_id": identity.peer_id, "addresses": made.addresses, "reach": made.reach}

    async def distance(self, args: Args) -> Args | None:
        """A peer's clock against ours and the bandwidth to it; None when none answers."""
        found = await measure_any(self._p2p, self._connection.known)
        return None if found is None else vars(found)

    async def find_manifests(self, args: Args) -> list[bytes]:
        """Every manifest that somebody has published under this run id, unchecked."""
        return await manifests.find(self._node, args["run_id"])

    async def publish(self, args: Args) -> None:
        """Keep a run's manifest in the DHT without taking part in the run."""
        task = manifests.publish(self._node, args["run_id"], args["manifest"])
        self._tasks.append(asyncio.create_task(task))

    async def prepare(self, args: Args) -> None:
        """Have the codec's kernels ready, and say how far that is."""
        loop = asyncio.get_running_loop()

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._worker.send, {"event": "compiling", "done": done, "total": total})

        await asyncio.to_thread(warm_up, CodecSpec.from_dict(args["codec"]), tell)

    async def revoke(self, args: Args) -> bool:
        """Hand the organizer's list of revocations to a run's members; whether the DHT has taken it."""
        return await admissions.store(self._node, args["prefix"], "revoked", args["revocations"])

    async def open_run(self, args: Args) -> None:
        """Begin to take part in a run."""
        terms = RunTerms(**args["terms"])
        args["manifest_hash"] = terms.manifest_hash
        spec = CodecSpec.from_dict(args["codec"])
        await asyncio.to_thread(warm_up, spec)
        self._codec = await asyncio.to_thread(Codec, spec, [(n, tuple(s)) for n, s in args["shapes"]])
        self._meet(args, terms.prefix)
        faults = FaultPlan.from_environment(args["worker_pid"])
        if faults:
            streams.PIECE_BYTES = PIECE_BYTES
        self._transfer = StateTransfer.of(args, self._heartbeats, self._worker)
        self._averager = SwarmAverager(
            terms,
            self._codec,
            LeaderBoard(self._node.peer_id, self._heartbeats),
            self._transfer.donor,
            reach=self._connection.reach,
            identity=self._identity,
            residual=await asyncio.to_thread(
                KeptResidual, self._codec, terms.manifest_hash, Path(args["residual_folder"])
            ),
            faults=faults,
            door=self._heartbeats,
        )
        await self._averager.open(self._p2p)
        opened = self._p2p, self._identity, self._averager, self._heartbeats
        self._contributions = await open_contributions(*opened)
        await open_audits(*opened, faults)
        self._receipts = Receipts(
            self._p2p,
            self._identity,
            run=terms.manifest_hash,
            prefix=terms.prefix,
            path=self._identity.path.with_name(CREDIT_FILE),
            traffic=lambda: (self._traffic.up, self._traffic.down),
        )
        await self._receipts.open()
        self._averager.on_round = self._receipts.note
        self._rounds = Rounds(
            self._averager,
            self._heartbeats,
            is_client=self._connection.reach == CLIENT,
            may_be_cut_off=self._connection.may_be_cut_off,
            passed_folder=Path(args["transfer_folder"]) / "passed",
        )
        self._call, self._passed = self._averager.method, self._rounds.passed
        await self._enter(args, terms.manifest_hash)

    async def observe(self, args: Args) -> None:
        """Begin to watch a run without a part in it."""
        self._meet(args, args["prefix"])
        await self._enter(args, args["manifest_hash"])

    async def archive(self, args: Args) -> None:
        """Begin to keep a run's state for newcomers, without a part in its rounds."""
        self._meet(args, args["prefix"])
        self._transfer = StateTransfer.of(args, self._heartbeats, self._worker)
        desk = ArchiveDesk(self._p2p, args, self._transfer.donor, self._heartbeats)
        await desk.open()
        self._call, self._passed = desk.method, no_rounds()
        await self._enter(args, args["manifest_hash"])

    def _meet(self, args: Args, prefix: str) -> None:
        self._prefix = prefix
        ttl_s, poll_s, entry = args["heartbeat_ttl_s"], args["heartbeat_s"], entry_of(args, get_dht_time)
        self._heartbeats = Heartbeats(self._node, prefix, ttl_s=ttl_s, poll_s=poll_s, entry=entry)

    async def _enter(self, args: Args, manifest_hash: bytes) -> None:
        """See who is there, and let others find the run through us."""
        self._tasks.append(
            asyncio.create_task(manifests.publish(self._node, args["run_id"], args["manifest"]))
        )
        await self._heartbeats.open()
        await self._heartbeats.refresh()
        self._opened.set()
        # What is here now stays. The collector's full passes come when a quarter of everything is new: with all of
        # torch in the count, garbage piled up for hundreds of rounds.
        gc.freeze()
        self._show_swarm()  # the worker sees who is there before its next command
        self._tasks.append(asyncio.create_task(self._watch_swarm()))
        us = args["run_id"], args["worker_pid"], str(self._node.peer_id)
        worker = rendezvous.LocalWorker(*us, manifest_hash.hex(), self._connection.addresses)
        self._rendezvous_file = rendezvous.publish(worker)

    async def limit(self, args: Args) -> None:
        """Keep traffic to these rates."""
        self._traffic.limit(up_mbps=args["up_mbps"], down_mbps=args["down_mbps"])

    async def announce(self, args: Args) -> None:
        if self._opened.is_set():
            await self._heartbeats.announce(args["status"])

    async def post(self, args: Args) -> None:
        if self._opened.is_set():
            await notes.post(self._node, self._prefix, args["topic"], args["note"])

    async def read_notes(self, args: Args) -> dict[str, bytes]:
        await self._opened.wait()
        return await notes.read(self._node, self._prefix, args["topic"])

    async def run_round(self, args: Args) -> Args:
        """Take part in a round; the reply's "verdict" is one of trainer/exchange.py's."""
        await self._opened.wait()  # after a restart the worker may ask before it has had us open the run
        fields = ("round", "base_digest", "payload", "weight", "was_sent")
        contribution = Contribution(*(args[name] for name in fields))
        try:
            verdict = await within(self._averager.terms.longest_round_s, self._rounds.run(contribution))
        except Stuck:
            self._worker.close()  # end, and be restarted: the worker asks again
            raise
        return {**verdict, **self._averager.release_residual(all=False)}

    async def release_residual(self, args: Args) -> Args:
        """What we keep for everybody as a reducer; from now on the worker does."""
        return self._averager.release_residual(all=True)

    async def residual_saved(self, args: Args) -> None:
        """Hand-overs up to `saved` are in a checkpoint, those up to `held` in the worker's memory at least."""
        await self._opened.wait()
        self._averager.residual.saved(args["saved"])
        self._averager.residual.take_back(args["held"])

    async def fetch_round(self, args: Args) -> Args | None:
        """A past round from any peer that has it; everything in it checked."""
        await self._opened.wait()
        return await self._rounds.fetch(args["round"], args["unlike"])

    async def accuse(self, args: Args) -> None:
        """The worker has found a peer's work to be bad, when it was at a round."""
        if self._opened.is_set():
            self._averager.repute.observations.accuse(args["peer_id"], args["round"])

    async def fetch_contribution(self, args: Args) -> bytes | None:
        """A member's payload of one of the last rounds, as that member shows it."""
        await self._opened.wait()
        return await self._contributions.fetch(args["peer_id"], args["round"])

    async def fetch_state(self, args: Args) -> Args | None:
        """Download the swarm's state into a file, whose path is in the reply; the worker removes it."""
        await self._opened.wait()
        await self._heartbeats.refresh()
        return await self._transfer.fetch(self._call, self._passed, args["least_work"])

    def _seen_addresses(self) -> list[str]:
        """Of the peers that are there and can be dialled."""
        return self._heartbeats.addresses() if self._opened.is_set() else []

    # ------------------------------------------------------------------ background work

    async def _watch_connection(self) -> None:
        """When it is lost, tell the worker why and end; it starts us again, with the same identity."""
        self._moved = await self._connection.lost()
        self._worker.send({"event": "moved", "reason": self._moved})
        self._worker.close()

    async def _watch_swarm(self) -> None:
        poll = asyncio.create_task(self._heartbeats.poll())
        self._tasks.append(poll)
        while True:
            self._show_swarm()
            await asyncio.sleep(SHOW_PERIOD_S)

    def _show_swarm(self) -> None:
        self._worker.send({"event": "swarm", **view_of(self._heartbeats, self._traffic)})

    async def _clean_up(self) -> None:
        """Say goodbye if there is time, end the daemon, remove every file of ours."""
        for task in self._tasks:
            task.cancel()
        try:
            with suppress(asyncio.TimeoutError):  # somebody of the last rounds is gone
                if self._receipts is not None and self._goodbye == "leaving":
                    await asyncio.wait_for(self._receipts.collect(), LEAVE_S)
            with suppress(Exception):  # leaving anyway
                if self._opened.is_set() and self._heartbeats.announced and not self._moved:
                    goodbye = self._heartbeats.announce({**self._heartbeats.status, "state": self._goodbye})
                    await asyncio.wait_for(goodbye, LEAVE_S)
        finally:
            if self._rendezvous_file is not None:
                self._rendezvous_file.unlink(missing_ok=True)
            if hasattr(self, "_p2p"):
                self._p2p._terminate()
            if self._private != Path():
                shutil.rmtree(self._private, ignore_errors=True)
