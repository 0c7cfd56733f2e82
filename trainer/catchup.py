"""How a worker that is behind, or on another history, gets back to the swarm's theta."""

from __future__ import annotations

from dtrain.compression.belief import ahead, stand_of
from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.download import DownloadReport
from dtrain.trainer.errors import CheckpointError, RunError
from dtrain.trainer.exchange import ABSENT, Exchange, Outcome, PeerView, can_give
from dtrain.trainer.outer_loop import OuterLoop

REPLAY_AT_MOST = 64  # rounds; peers keep no more
PAUSE_S = 0.5
PATIENCE_S = 120.0  # after this long without any progress we go on with what we have


def catch_up(
    outer: OuterLoop, exchange: Exchange, report: DownloadReport, clock: Clock = SYSTEM_CLOCK
) -> bool:
    """Bring theta to where the others stand; True if anything had to be fetched.

    Which history is the run's is said in `compression/belief.py`. Missed rounds are fetched and replayed where
    they continue our own theta and are fewer bytes than the state; otherwise the state is downloaded, and the rounds
    that passed meanwhile are replayed on it. Returns when nobody visible is ahead. RunError if this machine cannot
    take the state.
    """
    fetched = downloaded = False
    last, have = clock.monotonic(), 0
    while (best := _ahead(outer, exchange)) and clock.monotonic() - last < PATIENCE_S:
        missed = _missed_round(outer, exchange, best, any_number=downloaded)
        if missed is not None and (downloaded or _is_shorter(missed, outer, best)):
            outer.step(missed.aggregates)
            fetched = True
        elif _download(outer, exchange, report):
            fetched = downloaded = True
        elif missed is not None:  # nobody gives a state
            outer.step(missed.aggregates)
            fetched = True
        elif report.have_bytes == have:
            clock.sleep(PAUSE_S)  # who is ahead may be gone: its heartbeat runs out, or another donor appears
            continue
        last, have = clock.monotonic(), report.have_bytes
    return _take_exchanged(outer, exchange) or fetched


def _take_exchanged(outer: OuterLoop, exchange: Exchange) -> bool:
    """Take the round that the others have exchanged but not applied; True if there was one. Under overlap they apply a
    round only when they have trained the next one, and who waits for that comes too late for each."""
    if not any(_training_round(view) > outer.round for view in exchange.swarm() if can_give(view)):
        return False
    outcome = exchange.fetch_round(outer.round)
    if outcome is None or outcome.base_digest != outer.digest:
        return False
    outer.step(outcome.aggregates)
    return True


def _training_round(view: PeerView) -> int:
    number = view.status.get("training_round", 0)
    return number if isinstance(number, int) else 0


def _ahead(outer: OuterLoop, exchange: Exchange) -> PeerView | None:
    """The peer with the most work of those that could hand it on and whose history is the run's rather than ours."""
    views = {view.peer_id: view for view in exchange.swarm() if can_give(view)}
    num_active = sum(view.status["state"] not in ABSENT for view in views.values())
    stands = {peer: stand_of(view.status) for peer, view in views.items() if view.is_believed}
    found = ahead(stands, (float(outer.tokens), outer.digest.hex()), num_active)
    best = min(found, key=lambda peer: (-stands[peer][0], stands[peer][1]), default=None)
    return None if best is None or stands[best][1] == outer.digest.hex() else views[best]


def _num_missed(outer: OuterLoop, best: PeerView) -> int:
    return int(str(best.status["round"])) - outer.round


def _missed_round(
    outer: OuterLoop, exchange: Exchange, best: PeerView, *, any_number: bool
) -> Outcome | None:
    """The next missed round, if somebody has it and it continues our theta; with `any_number` of them also after a
    long download, as those that passed meanwhile are here."""
    missed = _num_missed(outer, best)
    if missed <= 0 or (missed > REPLAY_AT_MOST and not any_number):
        return None
    outcome = exchange.fetch_round(outer.round)
    return outcome if outcome is not None and outcome.base_digest == outer.digest else None


def _is_shorter(missed: Outcome, outer: OuterLoop, best: PeerView) -> bool:
    """Whether replaying costs fewer bytes than the state, going by the first of the missed rounds."""
    round_bytes = sum(len(aggregate) for aggregate in missed.aggregates)
    return _num_missed(outer, best) * round_bytes < sum(outer.pieces)


def _download(outer: OuterLoop, exchange: Exchange, report: DownloadReport) -> bool:
    report.begin()
    state = exchange.fetch_state(report)
    if report.trouble_text:
        raise RunError(report.trouble_text)
    if state is None or state.work < outer.tokens or state.digest == outer.digest:
        return False
    try:
        outer.take_over(state)
    except CheckpointError:
        return False
    return True
