"""The server's process of `dtrain bench dashboard`: the real application on a made-up run."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from dtrain.experiments import dashboard_curves as curves
from dtrain.experiments.dashboard_app import create_app
from dtrain.experiments.dashboard_guard import Access
from dtrain.experiments.dashboard_history import History, open_history
from dtrain.experiments.dashboard_rows import About
from dtrain.experiments.dashboard_run import RunState
from dtrain.experiments.dashboard_stream import Hub, make_server
from dtrain.trainer.bulletin import BulletinView, EvalLine, RoundLine

ABOUT = About("load", "ab" * 32, "tiny", 933_888, "stdlib", "sparseloco", 15, 0, 1024, 10**6)
CURVES = ("eval_loss", "train_loss", "tokens_per_s")
ROUND_TOKENS = 15_360


@dataclass(frozen=True)
class _View:
    peer_id: str
    status: Mapping[str, object]
    age_s: float = 0.1


@dataclass(frozen=True)
class _Watched:
    history: History
    about: About = ABOUT
    invite: str = "dtrain://load"


def serve(connection: Connection, folder: Path, num_points: int, num_workers: int) -> None:
    """Store the points, tell the port, serve until killed."""
    history = open_history(folder, ABOUT.manifest_hash)
    _fill(history, num_points)
    hub = Hub()

    app = create_app(hub=hub, access=Access(), run=_Watched(history))
    first = num_points // len(CURVES)
    begun = threading.Event()
    threading.Thread(target=_play, args=(history, hub, num_workers, first, begun), daemon=True).start()
    begun.wait()  # before the first round there is nothing to paint
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    connection.send(listener.getsockname()[1])
    make_server(app, hub).run(sockets=[listener])


def _fill(history: History, num_points: int) -> None:
    """A noisy descent of `num_points` over three curves."""
    noise = random.Random(0)
    with history.transaction() as db:
        for curve in CURVES:
            count = num_points // len(CURVES)
            curves.append(
                db,
                curve,
                (
                    curves.Point(n, float(n), n, 1e4 * n, 1.5 + 3 / (1 + n / 1e4) + noise.random())
                    for n in range(count)
                ),
            )


def _play(history: History, hub: Hub, num_workers: int, first: int, begun: threading.Event) -> None:
    """A round a second, for ever; `begun` is set after the first."""
    state, round = RunState(ABOUT, history), first
    while True:
        round += 1
        now = time.time()
        work = float(1e4 * first + ROUND_TOKENS * num_workers * (round - first))
        state.hear([_heartbeat(n, round, work) for n in range(num_workers)], set(), now)
        line = RoundLine(round, 0.8, 0.05, 0.1, 0.01, num_workers, True, 2.0, ROUND_TOKENS)
        bulletin = BulletinView(
            now - round, round, 1000 * round, 1000 * round, (line,), (EvalLine(round, 1.9),), (), {}
        )
        state.read({f"12D3KooW{n:0>44}": bulletin for n in range(num_workers)}, {}, now)
        hub.publish(state.snapshot(time.time()).to_dict())
        begun.set()
        time.sleep(max(0.0, now + 1.0 - time.time()))


def _heartbeat(number: int, round: int, work: float) -> _View:
    status: dict[str, object] = {
        "round": round,
        "digest": f"{round:064x}",
        "work": work,
        "state": "training",
        "name": f"worker-{number}",
        "device": "cpu",
        "tokens": ROUND_TOKENS * round,
        "tokens_per_s": 15_000.0,
        "reach": "direct",
    }
    return _View(f"12D3KooW{number:0>44}", status)
