"""Waiting for one another at a run's beginning, and at a worker's end."""

from __future__ import annotations

import threading

from dtrain.trainer.clock import Clock
from dtrain.trainer.exchange import ABSENT, Exchange, is_archive, work_of
from dtrain.trainer.outer_loop import OuterLoop
from dtrain.trainer.reporting import Say

POLL_S = 0.1
FINISH_S = 20.0  # longest stay after our last round for workers that still need it from us


def wait_for_start(
    wanted: int, outer: OuterLoop, exchange: Exchange, stop: threading.Event, clock: Clock, say: Say
) -> None:
    """Round 0 begins when `wanted` workers are there, or others have begun it."""
    said = -1
    while outer.round == 0 and not stop.is_set():
        others = exchange.swarm()
        here = 1 + sum(view.status["state"] not in ABSENT for view in others)
        if here >= wanted or any(work_of(view) > 0 for view in others):
            return
        if here != said:
            say(f"Waiting for workers: {here} of {wanted} are here.")
            said = here
        clock.sleep(POLL_S)


def stay_for_the_rest(outer: OuterLoop, exchange: Exchange, stop: threading.Event, clock: Clock) -> None:
    """Stay a moment for those that missed our last round and need it, or our state, to catch up, or to keep it."""
    until = clock.monotonic() + FINISH_S
    while clock.monotonic() < until and not stop.is_set():
        others = exchange.swarm()
        wanting = [view for view in others if view.status["state"] not in ABSENT or is_archive(view)]
        if all(work_of(view) >= outer.tokens for view in wanting):
            return
        clock.sleep(POLL_S)
