"""A dashboard on a made-up run: heartbeats and bulletins as workers send them, the real state, server and page."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from dtrain.experiments.dashboard_app import create_app
from dtrain.experiments.dashboard_guard import Access
from dtrain.experiments.dashboard_history import History, open_history
from dtrain.experiments.dashboard_results import Results
from dtrain.experiments.dashboard_rows import About
from dtrain.experiments.dashboard_run import RunState
from dtrain.experiments.dashboard_stream import Hub, StreamServer, make_server
from dtrain.trainer.bulletin import Bulletin, EvalLine, RoundLine, Sample, unpack_bulletin

ABOUT = About("test", "ab" * 32, "tiny", 933_888, "stdlib", "sparseloco", 15, 0, 1024, 20)
ROUND_TOKENS = 15 * 1024
PEER = "12D3KooW{:0>44}"


@dataclass(frozen=True)
class Heartbeat:
    """See `PeerView`."""

    peer_id: str
    status: dict[str, object]
    age_s: float = 0.5


@dataclass
class Actor:
    """A worker that trains nothing but says what one would."""

    number: int
    name: str
    since: float
    round: int = 0
    state: str = "training"
    bulletin: Bulletin = field(default_factory=Bulletin)
    up: int = 0
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        return PEER.format(self.number)

    def heartbeat(self, work: int) -> Heartbeat:
        status: dict[str, object] = {
            "round": self.round,
            "digest": f"{self.round:064x}",
            "work": float(work),
            "state": self.state,
            "name": self.name,
            "device": "cpu",
            "tokens": self.round * ROUND_TOKENS,
            "tokens_per_s": 4000.0 + 100 * self.number,
            "compute_share": 0.9,
            "loss": 2.5,
            "reach": "direct",
            **self.changes,
        }
        return Heartbeat(self.peer_id, status)


@dataclass(frozen=True)
class Answer:
    """What the application answered."""

    status_code: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Speaks with an ASGI application without a server between."""

    def __init__(self, app: Any, base: str = "http://127.0.0.1:8080"):
        self._app, self._host = app, base.removeprefix("http://")

    def get(
        self, path: str, params: dict[str, object] | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        return asyncio.run(self._ask("GET", path, params or {}, headers or {}, b""))

    def post(self, path: str, json_body: object, headers: dict[str, str] | None = None) -> Answer:
        given = {"content-type": "application/json", **(headers or {})}
        return asyncio.run(self._ask("POST", path, {}, given, json.dumps(json_body).encode()))

    async def _ask(
        self, method: str, path: str, params: dict[str, object], headers: dict[str, str], body: bytes
    ) -> Answer:
        bare, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": bare,
            "raw_path": bare.encode(),
            "query_string": (query or urlencode(params)).encode(),
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in {"host": self._host, **headers}.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8080),
        }
        sent: list[Any] = []
        asked = asyncio.Event()

        async def receive() -> dict[str, object]:
            if asked.is_set():
                await asyncio.Event().wait()  # we do not hang up
            asked.set()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        told = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], told, b"".join(m.get("body", b"") for m in sent[1:]))


class Stage:
    """A run with planned workers. Time passes by `step_s` a call, from a fixed beginning."""

    def __init__(self, folder: Path, about: About = ABOUT, began: float | None = None):
        self.folder, self.about = folder, about
        self.now = time.time() if began is None else began
        self.hub, self.invite = Hub(), "dtrain://" + "x" * 300
        self.actors: dict[str, Actor] = {}
        self.round = self.work = 0
        self.samples: dict[str, Sample] = {}
        self.open()

    def open(self) -> None:
        """(Re)start the dashboard: the history stays."""
        self.history: History = open_history(self.folder, self.about.manifest_hash)
        self.state = RunState(self.about, self.history)
        self.state._opened = self.now  # the stage's clock
        if self.history.meta("stage") == "":
            self.state.began = self.now
            self.history.set_meta("began", str(self.now))
            self.history.set_meta("stage", "1")

    def restart(self) -> None:
        self.history.close()
        self.open()

    def enter(self, *names: str) -> None:
        for name in names:
            self.actors[name] = Actor(len(self.actors) + 1, name, self.now, self.round)

    def tick(self, step_s: float = 1.0) -> dict[str, Any]:
        """Heartbeats and bulletins arrive; the snapshot that results is published."""
        self.now += step_s
        self.state.hear([a.heartbeat(self.work) for a in self.actors.values()], {PEER.format(1)}, self.now)
        notes = {a.peer_id: a.bulletin.pack(a.since, (a.up, a.up)) for a in self.actors.values()}
        bulletins = {peer: unpack_bulletin(note) for peer, note in notes.items()}
        self.state.read({p: b for p, b in bulletins.items() if b is not None}, self.samples, self.now)
        snapshot = self.state.snapshot(self.now).to_dict()
        self.hub.publish(snapshot)
        return snapshot

    def play_round(self, step_s: float = 4.0, loss: float | None = None) -> dict[str, Any]:
        """All that train complete a round."""
        self.round += 1
        active = [actor for actor in self.actors.values() if actor.state == "training"]
        self.work += ROUND_TOKENS * len(active)
        value = 4.6 / self.round**0.3 if loss is None else loss
        for actor in active:
            slow = 1 + 0.1 * actor.number
            line = RoundLine(
                self.round,
                3.0 * slow,
                0.9 - 0.15 * actor.number,
                0.35,
                0.02,
                len(active),
                True,
                value,
                ROUND_TOKENS,
            )
            actor.bulletin.rounds.append(line)
            actor.bulletin.contributions += 1
            actor.round, actor.up = self.round, actor.up + 150_000
            if self.round % 5 == 0:
                actor.bulletin.evals.append(EvalLine(self.round, value - 0.1))
        return self.tick(step_s)


@contextmanager
def served(
    stage: Stage, access: Access, results: Path | None = None, machine: Any = None, port: int = 0
) -> Iterator[tuple[str, StreamServer]]:
    """The address of a real server on loopback, in a thread; ended at the end."""
    listener = socket.create_server(("127.0.0.1", port))

    class Watched:
        history, about, invite = stage.history, stage.about, stage.invite

    app = create_app(
        hub=stage.hub,
        access=access,
        run=Watched(),
        results=None if results is None else Results(results),
        machine=machine,
    )
    server = make_server(app, stage.hub)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        stage.hub.close()
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
