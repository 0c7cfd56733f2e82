"""How a worker that is behind, or on another history, gets back to the swarm's theta."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from dtrain.trainer.checkpoint import Checkpoint, unpack
from dtrain.trainer.errors import CheckpointError
from dtrain.trainer.exchange import Exchange, PeerView
from dtrain.trainer.outer import OuterState

REPLAY_AT_MOST = 64  # rounds; beyond that theta itself is the smaller download
PAUSE_S = 0.5
PATIENCE_S = 120.0  # after this long without any donor we go on with what we have


class Follower(Protocol):
    """What catching up needs of a worker."""

    exchange: Exchange
    outer: OuterState

    def outer_step(self, aggregates: Sequence[bytes]) -> int: ...

    def replace_state(self, state: Checkpoint) -> None: ...


def catch_up(worker: Follower, say: Callable[[str], None]) -> bool:
    """Bring theta to where the others stand; True if anything had to be fetched.

    Of two histories the one with more work (tokens) in it is the run's. Missed rounds are fetched and replayed where
    they continue our own theta; otherwise theta is downloaded. Returns when nobody visible is ahead.
    """
    fetched, until = False, time.monotonic() + PATIENCE_S
    while (best := _ahead(worker)) and time.monotonic() < until:
        if _replay(worker, best) or _download(worker, say):
            fetched = True
        else:
            time.sleep(
                PAUSE_S
            )  # whoever is ahead may be gone: its heartbeat runs out, or another donor appears
    return fetched


def _ahead(worker: Follower) -> PeerView | None:
    """The visible peer with the most work, if that is not us or our equal."""
    digest, work = worker.outer.digest().hex(), worker.outer.tokens
    views = [view for view in worker.exchange.swarm() if view.status["state"] != "joining"]
    best = max(views, key=_work, default=None)
    if best is None or _work(best) < work or best.status["digest"] == digest:
        return None
    if _work(best) == work:  # two thetas, equal work: everybody settles on the smaller digest
        return best if str(best.status["digest"]) < digest else None
    return best


def _replay(worker: Follower, best: PeerView) -> bool:
    """Apply the next missed round, if somebody has it and it continues our theta."""
    missed = int(str(best.status["round"])) - worker.outer.round
    if not 0 < missed <= REPLAY_AT_MOST:
        return False
    outcome = worker.exchange.fetch_round(worker.outer.round)
    if outcome is None or outcome.base_digest != worker.outer.digest():
        return False
    worker.outer_step(outcome.aggregates)
    return True


def _download(worker: Follower, say: Callable[[str], None]) -> bool:
    shown = [-1.0]

    def progress(have: int, total: int) -> None:
        if have == total or time.monotonic() - shown[0] > 2.0:
            shown[0] = time.monotonic()
            say(f"Downloading the run's weights: {have / 1e6:.1f} of {total / 1e6:.1f} MB.")

    state = worker.exchange.fetch_state(progress)
    if state is None or state.work < worker.outer.tokens:
        return False
    try:
        checkpoint = unpack(state.blob)
    except CheckpointError as error:
        say(f"a donor's weights are unusable ({error}); trying again")
        return False
    if checkpoint.digest != state.digest:
        return False
    worker.replace_state(checkpoint)
    return True


def _work(view: PeerView) -> float:
    return float(str(view.status.get("work", 0)))
