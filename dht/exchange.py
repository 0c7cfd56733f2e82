"""The `Exchange` over the internet: starts and supervises the network process, and speaks with it for the worker.

Nothing here imports hivemind, so a worker imports torch while its network process, beside it, imports hivemind.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.dht import ipc

CONNECT_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 60.0
STATE_TIMEOUT_S = 24 * 3600.0
CLOSE_TIMEOUT_S = 5.0
RESTART_PAUSE_S = 1.0


class ExchangeError(Exception):
    """The network cannot be used; the message is for the user."""


class ConnectionLost(ExchangeError):
    """The network process died while a command was under way; it is being restarted."""


@dataclass(frozen=True)
class PeerSettings:
    """Where and as whom this machine takes part in the network."""

    identity: Path
    host: str = "0.0.0.0"  # IPv4 address to listen on
    port: int = 0  # TCP; 0 = any free one
    initial_peers: tuple[str, ...] = ()  # libp2p addresses of peers to join through


@dataclass(frozen=True)
class Outcome:
    """See `dtrain.trainer.exchange.Outcome`."""

    verdict: str
    round: int
    base_digest: bytes = b""
    members: tuple[str, ...] = ()
    contributors: tuple[str, ...] = ()
    aggregates: tuple[bytes, ...] = ()
    undelivered: tuple[tuple[int, int], ...] = ()
    problem: str = ""
    wait_s: float = 0.0
    exchange_s: float = 0.0


@dataclass(frozen=True)
class PeerView:
    """See `dtrain.trainer.exchange.PeerView`."""

    peer_id: str
    status: Mapping[str, Any]
    fresh_for_s: float


@dataclass(frozen=True)
class State:
    """See `dtrain.trainer.exchange.State`."""

    round: int
    work: float
    digest: bytes
    blob: bytes | memoryview


@dataclass
class _Pending:
    done: threading.Event = field(default_factory=threading.Event)
    reply: ipc.Message = field(default_factory=dict)


class DhtExchange:
    """One worker's place in the swarm. `connect`, then `open_run`, then the calls of the `Exchange` protocol."""

    def __init__(self, settings: PeerSettings):
        self._settings = settings
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._closing = False
        self._swarm: tuple[float, list[PeerView]] = (time.monotonic(), [])
        self._traffic = self._past_traffic = (0, 0)
        self._on_progress: Callable[[int, int], None] | None = None
        self._provider: Callable[[], Any] | None = None
        self._run: dict[str, Any] | None = None
        self._status: dict[str, Any] | None = None
        self._heartbeat_s = 0.0
        self.peer_id = ""
        self.addresses: list[str] = []
        self._start_process()

    # ------------------------------------------------------------------ the network process

    def _start_process(self) -> None:
        sweep_left_overs()
        self._private = Path(tempfile.mkdtemp(prefix=f"dtrain-{os.getpid()}-"))
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dtrain.dht.peer", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is the worker's to handle
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._connection = ours
        threading.Thread(target=self._listen, args=(ours,), daemon=True, name="network-listener").start()

    def connect(self) -> None:
        """Wait until the network process stands in the DHT. Raises ExchangeError with a line for the user."""
        answer = self._command(
            "connect",
            timeout_s=CONNECT_TIMEOUT_S,
            identity=str(self._settings.identity),
            private_folder=str(self._private),
            host=self._settings.host,
            port=self._settings.port,
            initial_peers=list(self._settings.initial_peers),
        )
        self.peer_id, self.addresses = answer["peer_id"], answer["addresses"]

    def _listen(self, connection: socket.socket) -> None:
        try:
            while True:
                self._receive(ipc.receive(connection))
        except EOFError:
            pass
        for pending in list(self._pending.values()):
            pending.reply = {"lost": True}
            pending.done.set()
        if not self._closing and connection is self._connection and self._run is not None:
            threading.Thread(target=self._restart, daemon=True, name="network-restart").start()

    def _restart(self) -> None:
        """The network process died: start another with the same identity, back into the same run."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._private, ignore_errors=True)
        if self._run is None or self._closing:
            return
        self._past_traffic = self.traffic()
        self._traffic = (0, 0)
        known = [address for view in self._swarm[1] for address in _addresses(view)]
        self._settings = PeerSettings(
            self._settings.identity,
            self._settings.host,
            self._settings.port,
            (*self._settings.initial_peers, *known),
        )
        while not self._closing:
            logging.warning("the network process ended unexpectedly; starting it again")
            self._start_process()
            try:
                self.connect()
                self._command("open_run", **self._run)
                if self._status is not None:
                    self._command("announce", status=self._status)
                return
            except ExchangeError as error:
                logging.warning("the network is not back yet: %s", error)
                self._connection.close()
                self._process.kill()
                time.sleep(RESTART_PAUSE_S)

    def _receive(self, message: ipc.Message) -> None:
        if "id" in message and "ask" not in message:
            pending = self._pending.pop(message["id"], None)
            if pending is not None:
                pending.reply = message
                pending.done.set()
        elif message.get("event") == "swarm":
            self._swarm = (time.monotonic(), [PeerView(*peer) for peer in message["peers"]])
            self._traffic = tuple(message["traffic"])
        elif message.get("event") == "progress" and self._on_progress is not None:
            self._on_progress(message["have"], message["total"])
        elif message.get("ask") == "state":
            threading.Thread(target=self._give_state, args=(message["id"],), daemon=True).start()

    def _send(self, message: ipc.Message) -> None:
        with self._lock:
            try:
                self._connection.sendall(ipc.encode(message))
            except OSError:
                raise ConnectionLost("the network process is gone; it is being restarted") from None

    def _command(self, name: str, *, timeout_s: float = COMMAND_TIMEOUT_S, **args: Any) -> Any:
        pending = _Pending()
        with self._lock:
            self._next_id += 1
            number = self._next_id
            self._pending[number] = pending
        self._send({"do": name, "id": number, "args": args})
        if not pending.done.wait(timeout_s):
            self._pending.pop(number, None)
            raise ExchangeError(f"the network process did not answer {name!r} within {timeout_s:.0f} s")
        if "lost" in pending.reply:
            raise ConnectionLost("the network process is gone; it is being restarted")
        if "error" in pending.reply:
            raise ExchangeError(pending.reply["error"])
        return pending.reply["value"]

    # ------------------------------------------------------------------ finding and opening a run

    def find_manifests(self, run_id: str) -> list[bytes]:
        """Signed manifests that peers have published under this run id, unchecked."""
        found: list[bytes] = self._command("find_manifests", run_id=run_id)
        return found

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
        heartbeat_s: float,
        heartbeat_ttl_s: float,
        publish_locally: bool = True,
    ) -> None:
        """Begin to take part in a run. `manifest` is its signed form, handed to whoever asks for it."""
        self._run = {
            "run_id": run_id,
            "manifest": manifest,
            "codec": dict(codec),
            "shapes": [[name, list(shape)] for name, shape in shapes],
            "terms": {
                "prefix": f"dtrain-{run_id}-{manifest_hash[:8].hex()}",
                "manifest_hash": manifest_hash,
                "matchmaking_s": matchmaking_s,
                "round_timeout_s": round_timeout_s,
                "sender_timeout_s": sender_timeout_s,
                "exact_up_to": exact_up_to,
            },
            "heartbeat_s": heartbeat_s,
            "heartbeat_ttl_s": heartbeat_ttl_s,
            "publish_locally": publish_locally,
            "worker_pid": os.getpid(),
        }
        self._round_limit_s = 2 * matchmaking_s + 2 * round_timeout_s + 2 * sender_timeout_s + 60.0
        self._heartbeat_s = heartbeat_s
        self._command("open_run", **self._run)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def _beat(self) -> None:
        """Repeat the heartbeat from this process, so that it stops when the worker is frozen or dead."""
        while not self._closing:
            time.sleep(self._heartbeat_s)
            self._announce()

    def _announce(self) -> None:
        if self._status is None or self._closing:
            return
        try:
            self._send({"do": "announce", "id": 0, "args": {"status": self._status}})
        except ConnectionLost:
            pass  # said again when the network process is back

    # ------------------------------------------------------------------ the Exchange protocol

    def announce(self, status: Mapping[str, object]) -> None:
        self._status = {**status, "address": self.addresses[0] if self.addresses else ""}
        self._announce()

    def swarm(self) -> Sequence[PeerView]:
        heard, views = self._swarm
        passed = time.monotonic() - heard
        return [view for view in views if view.fresh_for_s > passed]

    def run_round(self, *, round: int, base_digest: bytes, payload: bytes, weight: float) -> Outcome:
        try:
            answer = self._command(
                "run_round",
                timeout_s=self._round_limit_s,
                round=round,
                base_digest=base_digest,
                payload=payload,
                weight=float(weight),
            )
        except ExchangeError as error:
            time.sleep(RESTART_PAUSE_S)
            return Outcome("no-group", round, problem=str(error))
        return _outcome(round, answer)

    def fetch_round(self, round: int) -> Outcome | None:
        try:
            answer = self._command("fetch_round", round=round)
        except ExchangeError:
            return None
        return None if answer is None else _outcome(round, answer)

    def fetch_state(self, on_progress: Callable[[int, int], None]) -> State | None:
        self._on_progress = on_progress
        try:
            answer = self._command("fetch_state", timeout_s=STATE_TIMEOUT_S)
        except ExchangeError:
            return None
        finally:
            self._on_progress = None
        if answer is None:
            return None
        path = Path(answer["path"])
        blob = path.read_bytes()
        path.unlink()
        return State(answer["round"], answer["work"], answer["digest"], blob)

    def serve_state(self, provider: Callable[[], Any]) -> None:
        self._provider = provider

    def _give_state(self, question: int) -> None:
        value = None
        if self._provider is not None:
            state = self._provider()
            path = self._private / f"outgoing-{question}.safetensors"
            path.write_bytes(state.blob)
            value = {"round": state.round, "work": state.work, "digest": state.digest, "path": str(path)}
        self._send({"answer": question, "value": value})

    def traffic(self) -> tuple[int, int]:
        return self._past_traffic[0] + self._traffic[0], self._past_traffic[1] + self._traffic[1]

    def close(self) -> None:
        self._closing = True
        try:
            self._send({"do": "close"})
        except ConnectionLost:
            pass
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        shutil.rmtree(self._private, ignore_errors=True)


def _outcome(round: int, answer: Mapping[str, Any]) -> Outcome:
    fields = {key: value for key, value in answer.items() if key not in ("spans", "undelivered")}
    for key in ("members", "contributors", "aggregates"):
        fields[key] = tuple(fields.get(key, ()))
    undelivered = tuple((first, count) for first, count in answer.get("undelivered", ()))
    return Outcome(**{"round": round, **fields, "undelivered": undelivered})


def _addresses(view: PeerView) -> list[str]:
    address = view.status.get("address")
    return [address] if isinstance(address, str) and address else []


def sweep_left_overs() -> None:
    """Remove the folders of workers that were killed together with their network process."""
    for path in Path(tempfile.gettempdir()).glob("dtrain-*-*"):
        pid = path.name.split("-")[1]
        if not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
