"""The `Exchange` over the internet, as a worker sees it; the work is done in its network process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dtrain.dht import ipc
from dtrain.dht.address_book import FILE, AddressBook
from dtrain.dht.hand_overs import HandOvers
from dtrain.dht.outcome import Outcome, PeerView, outcome_of
from dtrain.dht.peer_settings import PeerSettings
from dtrain.dht.process import RESTART_PAUSE_S, ConnectionLost, ExchangeError, NetworkProcess
from dtrain.dht.running_counts import RunningCounts
from dtrain.dht.state_files import Provider, State, StateFiles, Watch
from dtrain.dht.terms import run_prefix
from dtrain.dht.tokens import reason_text

CONNECT_TIMEOUT_S = 180.0  # every step of it has a limit of its own
OPEN_TIMEOUT_S = 600.0  # on a machine's first run the codec is compiled meanwhile
RESTARTED_S = 10.0  # how long a round waits for a new network process before it says so
DIED = "its process ended unexpectedly"
STATE_TIMEOUT_S = 24 * 3600.0


class DhtExchange:
    """One worker's place in the swarm: `connect`, `open_run`, then the calls of the `Exchange` protocol."""

    def __init__(self, settings: PeerSettings):
        """Starts the network process; `connect` waits for it."""
        self._settings, self._through = settings, settings.initial_peers
        self._interrupted = b""  # the payload that was under way when a network process died
        self._swarm: tuple[float, list[PeerView]] = (time.monotonic(), [])
        self._address_book = AddressBook(settings.identity.parent / FILE)  # to find back by
        self._carried = RunningCounts()  # bytes: "up", "down", and "wire" for what both took there
        self._state_files = StateFiles(settings.identity.parent / "transfer")
        self._status: dict[str, Any] | None = None
        self._run: dict[str, Any] = {}
        self._handed = HandOvers()
        self._accused: dict[str, int] = {}  # in which round
        self._closing, self._open = threading.Event(), threading.Event()
        self._heartbeat_ttl_s, self.peer_id = 0.0, ""
        self.reach = ""  # "direct", "relayed" or "client": how others can call us; known once connected
        self.addresses: list[str] = []  # where others can join: here if they can call us, then where we did
        # Called with ("lost" or "back", why) around a renewal of the network process.
        self.on_change: Callable[[str, str], None] = lambda state, reason: None
        self._on_compiling: Callable[[int, int], None] = lambda done, total: None
        self._moved, self._refusals = "", RunningCounts()
        self.refused = ""  # a line for the user: why the others do not let this peer in
        self.on_refused: Callable[[], None] = lambda: None  # called once, when that is known
        self._rates = {"up_mbps": 0.0, "down_mbps": 0.0}
        self.process = NetworkProcess(self._hear, self._reply)
        self.process.on_death = lambda: self.on_change("lost", DIED)

    def connect(self, through: Sequence[str] = (), *, strict: bool = True) -> None:
        """Wait until the network process stands in the DHT, through these peers and then those of last time too if any
        are given. Raises ExchangeError with a line for the user; unless `strict`, connections with peers are enough."""
        self._through += tuple(through)
        known = self._address_book.addresses() if self._through or self.reach else []
        answer = self.process.command(
            "connect",
            timeout_s=CONNECT_TIMEOUT_S,
            identity=str(self._settings.identity),
            private_folder=str(self.process.private_folder),
            host=self._settings.host,
            port=self._settings.port,
            announce=self._settings.announce,
            initial_peers=[*self._through, *known],
            reach_before=self.reach,
            passes_on=self._settings.passes_on,
            relays=self._settings.relays,
            strict=strict,
        )
        self.peer_id, self.addresses, self.reach = answer["peer_id"], answer["addresses"], answer["reach"]
        self.process.set_up = self._come_back

    def limit(self, *, up_mbps: float, down_mbps: float) -> None:
        """Keep traffic to these megabits per second from now on, also over restarts of the network process."""
        self._rates = {"up_mbps": up_mbps, "down_mbps": down_mbps}
        self._tell("limit", **self._rates)

    def find_manifests(self, run_id: str) -> list[bytes]:
        """Signed manifests that peers have published under this run id, unchecked."""
        try:
            found: list[bytes] = self.process.command("find_manifests", run_id=run_id)
            return found
        except ConnectionLost:
            return []  # it is being restarted

    def prepare(self, codec: Mapping[str, object], progress: Callable[[int, int], None]) -> None:
        """Have the codec ready in the network process. On a machine's first run that is where it is compiled, and then
        on disk for this process; `progress(done, total)` follows it. Raises ExchangeError."""
        self._on_compiling = progress
        self.process.command("prepare", timeout_s=OPEN_TIMEOUT_S, codec=dict(codec))

    def open_run(
        self,
        *,
        run_id: str,
        manifest: bytes,
        manifest_hash: bytes,
        codec: Mapping[str, object],
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        matchmaking_s: float,
        round_timeout_s: float,
        sender_timeout_s: float,
        exact_up_to: int,
        max_weight: float,
        screens: bool = False,
        max_share: float = 1.0,
        heartbeat_s: float,
        heartbeat_ttl_s: float,
        pieces: Sequence[int] = (),
        admission: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to take part in a run. `manifest` is its signed form, for whoever asks for it; `pieces` are the lengths
        in bytes of the pieces of the trainer's state (none: it gives none); `admission` as in `dht/door.py`."""
        self._state_files.sweep()
        self._run = {
            "run_id": run_id,
            "manifest": manifest,
            "admission": dict(admission or {}),
            "codec": dict(codec),
            "shapes": [[name, list(shape)] for name, shape in shapes],
            "pieces": list(pieces),
            "transfer_folder": str(self._state_files.folder),
            "residual_folder": str(self._settings.identity.parent / "reducer"),
            "newcomer_mbps": self._settings.newcomer_mbps,
            "terms": {
                "prefix": run_prefix(run_id, manifest_hash),
                "manifest_hash": manifest_hash,
                "matchmaking_s": matchmaking_s,
                "round_timeout_s": round_timeout_s,
                "sender_timeout_s": sender_timeout_s,
                "exact_up_to": exact_up_to,
                "max_weight": float(max_weight),
                "screens": screens,
                "max_share": max_share,
            },
            "heartbeat_s": heartbeat_s,
            "heartbeat_ttl_s": heartbeat_ttl_s,
            "worker_pid": os.getpid(),
        }
        self._round_limit_s = 2 * matchmaking_s + 2 * round_timeout_s + 2 * sender_timeout_s + 60.0
        self._begin(heartbeat_s, heartbeat_ttl_s)

    def _begin(self, heartbeat_s: float, heartbeat_ttl_s: float) -> None:
        """Enter the run as `_run` has it, now and after each restart; from the first `announce` on others hear us."""
        self._heartbeat_ttl_s = heartbeat_ttl_s
        try:
            self._enter_run()
        except ConnectionLost:  # as when the relay is gone that it came through: the next one enters the run
            if not self._open.wait(OPEN_TIMEOUT_S):
                raise
        self._open.set()
        threading.Thread(target=self._beat, args=(heartbeat_s,), daemon=True, name="heartbeat").start()

    def _enter_run(self) -> None:
        self.process.command("open_run", timeout_s=OPEN_TIMEOUT_S, **self._run)

    def _come_back(self) -> None:
        """A new network process takes the place of one that died: same identity, same run."""
        self._open.clear()
        self._carried.begin_anew()
        self._refusals.begin_anew()
        reason, self._moved = self._moved or DIED, ""
        self.connect()
        self.limit(**self._rates)
        if not self._run:
            return  # there is none yet
        self._enter_run()
        if self._handed.num_saved is not None:
            self.process.command("residual_saved", **self._handed.told())
        for peer_id, round in list(self._accused.items()):
            self._tell("accuse", peer_id=peer_id, round=round)
        if self._status is not None:
            self.announce(self._status)  # reach and address may be others now
        self._open.set()
        self.on_change("back", reason)

    def _beat(self, period_s: float) -> None:
        """Repeat the heartbeat from this process, so that it stops when the worker is frozen or dead."""
        while not self._closing.wait(period_s):
            self._announce()

    def _announce(self) -> None:
        if self._status is not None:
            self._tell("announce", status=self._status)

    def _tell(self, name: str, **args: Any) -> None:
        try:
            self.process.tell(name, **args)
        except ConnectionLost:
            pass  # what matters is said again when the network process is back

    def _hear(self, message: ipc.Message) -> None:
        if message["event"] == "swarm":
            self._swarm = (time.monotonic(), [PeerView(*peer) for peer in message["peers"]])
            for view in self._swarm[1]:
                self._address_book.hear(view.peer_id, view.status.get("address"))
            self._carried.hear(message["traffic"])
            self._refusals.hear(message.get("refusals"))
            if message.get("refused") and not self.refused:
                self.refused = reason_text(message["refused"])
                self.on_refused()
        elif message["event"] == "moved":
            self._moved = message["reason"]
            self.process.ends_on_purpose = True
            self.on_change("lost", self._moved)
        elif message["event"] == "compiling":
            self._on_compiling(message["done"], message["total"])
        else:
            self._state_files.hear(message)

    def _reply(self, question: str) -> Any:
        """The network process asks for a snapshot of our state, for a newcomer."""
        assert question == "state"
        return self._state_files.write()

    # ------------------------------------------------------------------ the Exchange protocol

    def announce(self, status: Mapping[str, object]) -> None:
        address = self.addresses[0] if self.addresses and self.reach != "client" else ""
        self._status = {**status, "address": address, "reach": self.reach}
        self._announce()

    def post(self, topic: str, note: bytes) -> None:
        self._tell("post", topic=topic, note=note)

    def posted(self, topic: str) -> dict[str, bytes]:
        """Everybody's note under a topic by peer id, unchecked. Raises ExchangeError."""
        notes: dict[str, bytes] = self.process.command("read_notes", topic=topic)
        return notes

    def swarm(self) -> Sequence[PeerView]:
        heard, views = self._swarm
        passed = time.monotonic() - heard
        if passed > self._heartbeat_ttl_s:
            return []
        return [replace(view, age_s=view.age_s + passed) for view in views]

    def release_residual(self, *, all: bool) -> tuple[int, Sequence[tuple[int, int, bytes]]]:
        if all and (answer := self._ask("release_residual")) is not None:  # else it stays on the disk
            self._handed.hear(answer)
        return self._handed.take()

    def residual_saved(self, number: int) -> None:
        self._ask("residual_saved", **self._handed.saved(number))  # said again to a new network process

    def run_round(self, *, round: int, base_digest: bytes, payload: bytes, weight: float) -> Outcome:
        said = {"round": round, "base_digest": base_digest, "payload": payload, "weight": float(weight)}
        while True:
            contribution = {**said, "was_sent": payload == self._interrupted}
            try:
                answer = self.process.command("run_round", timeout_s=self._round_limit_s, **contribution)
                self._handed.hear(answer)
                return outcome_of(round, answer)
            except ConnectionLost as error:
                self._interrupted = payload
                self._closing.wait(RESTART_PAUSE_S)
                if self._closing.is_set() or not self._open.wait(RESTARTED_S):
                    return Outcome("no-group", round, problem=str(error))
            except ExchangeError as error:
                return Outcome("no-group", round, problem=str(error))

    def accuse(self, peer_id: str, reason: str) -> None:
        logging.warning("%s is accused: %s", peer_id, reason)
        self._accused[peer_id] = round = int((self._status or {}).get("round", 0))
        self._tell("accuse", peer_id=peer_id, round=round)

    def fetch_contribution(self, peer_id: str, round: int) -> bytes | None:
        payload: bytes | None = self._ask("fetch_contribution", peer_id=peer_id, round=round)
        return payload

    def fetch_round(self, round: int, unlike: Sequence[bytes] = ()) -> Outcome | None:
        answer = self._ask("fetch_round", round=round, unlike=list(unlike))
        return None if answer is None else outcome_of(round, answer)

    def _ask(self, name: str, **args: Any) -> Any:
        """The command's answer, None if there is none."""
        try:
            return self.process.command(name, **args)
        except ExchangeError:
            return None

    def fetch_state(self, watch: Watch) -> State | None:
        answer = self._fetch_state(watch)
        return None if answer is None else self._state_files.read(answer)

    def _fetch_state(self, watch: Watch, least_work: float = 0.0) -> dict[str, Any] | None:
        """As `StateTransfer.fetch` has it."""
        if self.refused:
            watch.trouble(self.refused)
            return None
        self._state_files.watch = watch
        try:
            answer: dict[str, Any] | None = self.process.command(
                "fetch_state", timeout_s=STATE_TIMEOUT_S, least_work=least_work
            )
            return answer
        except ConnectionLost:
            return None  # what is here already is kept; the next call goes on from there
        except ExchangeError as error:
            watch.trouble(str(error))
            return None
        finally:
            self._state_files.watch = None

    def serve_state(self, provider: Provider) -> None:
        self._state_files.provider = provider

    def refusals(self) -> Mapping[str, int]:
        return self._refusals.total()

    def traffic(self) -> tuple[int, int]:
        carried = self._carried.total()
        return carried["up"], carried["down"]

    def wire_bytes(self) -> int:
        return self._carried.total()["wire"]

    def close(self) -> None:
        self._closing.set()
        self._open.set()
        self.process.close()
