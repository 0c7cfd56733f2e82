"""The run's health in one line, from what its workers say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dtrain.experiments.dashboard_rows import About, Health, RoundLanes, WorkerRow

LATE = 4.0  # a round that takes this many times the usual is late
LATE_AT_LEAST_S = 20.0
PHASES = {
    "training": "training",
    "exchanging": "exchanging",
    "waiting": "waiting for workers",
    "joining": "joining",
    "paused": "paused",
}


def judge(
    about: About,
    workers: Sequence[WorkerRow],
    completions: Sequence[tuple[int, float, int]],
    round_s: float,
    rounds: Sequence[RoundLanes],
    now: float,
) -> Health:
    """`completions` are (round, Unix seconds, tokens), oldest first; `rounds` newest first."""
    live = [worker for worker in workers if worker.state not in ("gone", "left")]
    active = [worker for worker in live if worker.state not in ("finished", "leaving", "stopped")]
    last_round, last_at = (completions[-1][0], completions[-1][1]) if completions else (0, 0.0)
    lanes = rounds[0].lanes if rounds else []
    level, text = _verdict(active, live, workers, last_at, round_s, now)
    return Health(
        level=level,
        text=text,
        round=max([last_round, *(worker.round for worker in workers), *(r.round for r in rounds[:1])]),
        phase=_phase(active),
        workers=len(active),
        contributors=sum(lane.included for lane in lanes),
        last_round_at=last_at,
        last_exchange_s=max((lane.wait_s + lane.exchange_s for lane in lanes), default=0.0),
        round_s=round_s,
        digests=agreement(active),
    )


def _verdict(
    active: Sequence[WorkerRow],
    live: Sequence[WorkerRow],
    workers: Sequence[WorkerRow],
    last_at: float,
    round_s: float,
    now: float,
) -> tuple[str, str]:
    if not active:
        if live:
            return "warning", "The workers have finished"
        return ("bad", "All workers are gone") if workers else ("empty", "Nobody trains this run now")
    if agreement(active) == "differ":
        return "bad", "Workers of one round hold different weights"
    if all(worker.state == "paused" for worker in active):
        return "warning", "All workers are paused"
    if all(worker.state in ("waiting", "joining", "starting") for worker in active):
        return "warning", "Waiting for workers to begin"
    late_s = now - last_at
    if last_at and round_s and late_s > max(LATE_AT_LEAST_S, LATE * round_s):
        return "warning", f"The round under way is late: {late_s:.0f} s, usually {round_s:.0f} s"
    gone = [worker.name for worker in workers if worker.state == "gone"]
    if gone:
        return "warning", f"Training; {', '.join(gone[:3])} dropped out"
    return "good", "Training"


def _phase(active: Sequence[WorkerRow]) -> str:
    """What most workers do."""
    states = Counter(worker.state for worker in active)
    return PHASES.get(states.most_common(1)[0][0], "") if states else ""


def agreement(workers: Sequence[WorkerRow]) -> str:
    """Whether workers of one round hold one theta: "agree", "differ", or "" if no two can be compared."""
    by_round: dict[int, set[str]] = {}
    counts: Counter[int] = Counter()
    for worker in workers:
        if worker.digest and worker.state not in ("joining", "starting"):
            by_round.setdefault(worker.round, set()).add(worker.digest)
            counts[worker.round] += 1
    if any(len(digests) > 1 for digests in by_round.values()):
        return "differ"
    return "agree" if any(count > 1 for count in counts.values()) else ""
