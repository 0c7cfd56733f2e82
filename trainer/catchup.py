"""How a worker that is behind, or on another history, gets back to the swarm's theta."""

from __future__ import annotations

from collections.abc import Callable

from dtrain.trainer.checkpoint import unpack
from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.errors import CheckpointError
from dtrain.trainer.exchange import Exchange, PeerView, can_give, work_of
from dtrain.trainer.outer_loop import OuterLoop

REPLAY_AT_MOST = 64  # rounds; beyond that theta itself is the smaller download
PAUSE_S = 0.5
PATIENCE_S = 120.0  # after this long without any donor we go on with what we have

Say = Callable[[str], None]


def catch_up(outer: OuterLoop, exchange: Exchange, say: Say, clock: Clock = SYSTEM_CLOCK) -> bool:
    """Bring theta to where the others stand; True if anything had to be fetched.

    Of two histories the one with more work (tokens) in it is the run's. Missed rounds are fetched and replayed where
    they continue our own theta; otherwise theta is downloaded. Returns when nobody visible is ahead.
    """
    fetched, until = False, clock.monotonic() + PATIENCE_S
    while (best := _ahead(outer, exchange)) and clock.monotonic() < until:
        if _replay(outer, exchange, best) or _download(outer, exchange, say, clock):
            fetched = True
        else:
            clock.sleep(PAUSE_S)  # who is ahead may be gone: its heartbeat runs out, or another donor appears
    return fetched


def _ahead(outer: OuterLoop, exchange: Exchange) -> PeerView | None:
    """The peer with the most work of those that could hand it on, if that is not us or our equal."""
    digest = outer.digest.hex()
    views = [view for view in exchange.swarm() if can_give(view)]
    best = min(views, key=lambda view: (-work_of(view), str(view.status["digest"])), default=None)
    if best is None or work_of(best) < outer.tokens or best.status["digest"] == digest:
        return None
    if work_of(best) == outer.tokens:  # two thetas, equal work: everybody settles on the smaller digest
        return best if str(best.status["digest"]) < digest else None
    return best


def _replay(outer: OuterLoop, exchange: Exchange, best: PeerView) -> bool:
    """Apply the next missed round, if somebody has it and it continues our theta."""
    missed = int(str(best.status["round"])) - outer.round
    if not 0 < missed <= REPLAY_AT_MOST:
        return False
    outcome = exchange.fetch_round(outer.round)
    if outcome is None or outcome.base_digest != outer.digest:
        return False
    outer.step(outcome.aggregates)
    return True


def _download(outer: OuterLoop, exchange: Exchange, say: Say, clock: Clock) -> bool:
    shown = [-1.0]

    def progress(have: int, total: int) -> None:
        if have == total or clock.monotonic() - shown[0] > 2.0:
            shown[0] = clock.monotonic()
            say(f"Downloading the run's weights: {have / 1e6:.1f} of {total / 1e6:.1f} MB.")

    state = exchange.fetch_state(progress)
    if state is None or state.work < outer.tokens:
        return False
    try:
        checkpoint = unpack(state.blob)
    except CheckpointError as error:
        say(f"a donor's weights are unusable ({error}); trying again")
        return False
    if checkpoint.digest != state.digest:
        return False
    outer.replace(checkpoint)
    return True
