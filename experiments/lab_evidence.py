"""What a scenario's workers have left behind: metrics and signed journals, put together to the run's own history."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.dht import identity
from dtrain.experiments import lab_check
from dtrain.experiments.lab_config import SPLITTING
from dtrain.experiments.lab_director import Happened
from dtrain.experiments.lab_file import Scenario
from dtrain.trainer.exchange import ALONE, DONE
from dtrain.trainer.journal import FILE
from dtrain.trainer.metrics import read_metrics

HEAL_S = 60.0
"""How long after a split the swarm may take to be of one history again."""


@dataclass(frozen=True)
class Round:
    """A round of the run's history, over all workers that completed it."""

    number: int
    """Rounds completed with it."""
    at: float
    """When, Unix seconds: the median of its workers."""
    contributors: int
    loss: float
    tokens: int
    """In the history of the theta that it led to."""
    digest: str
    wait_s: float
    """Until the group had met."""
    meet_s: float
    """The same for the last member to come, who waited for nobody."""
    exchange_s: float
    compute_share: float
    bytes_up: float


class Evidence:
    """All that the workers have left behind."""

    def __init__(self, scenario: Scenario, base: Path, happened: Sequence[Happened]):
        self.scenario, self.happened = scenario, happened
        self.metrics = {
            name: read_metrics(base / "workers" / name / "metrics.jsonl") for name in scenario.names
        }
        self.report = lab_check.Report()
        paths = {name: base / "workers" / name / FILE for name in scenario.names}
        self.journals = lab_check.read_all(paths, _verify, self.report)
        lab_check.check(self.journals, self.report, forks_until=self._forks_until())
        self.peer_ids = {name: journal[0]["peer_id"] for name, journal in self.journals.items() if journal}
        self.rounds = self._rounds()

    def of(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.metrics[name] if event["event"] == kind]

    def _forks_until(self) -> float | None:
        """Until when two histories are allowed: while something splits the swarm, and a while after."""
        may_fork = self.scenario.lab.may_fork
        ends = [one.undone_at or one.at for one in self.happened if may_fork or one.planned.kind in SPLITTING]
        return max(ends) + HEAL_S if ends else None

    def _rounds(self) -> list[Round]:
        by_digest: dict[str, list[dict[str, Any]]] = {}
        for name in self.scenario.names:
            for event in self.of(name, "round"):
                by_digest.setdefault(event["digest"], []).append(event)
        found, tokens = [], 0
        for number, digest, added in self._history():
            tokens += added
            if events := by_digest.get(digest):
                found.append(_round(number, digest, tokens, events))
        return found

    def _history(self) -> list[tuple[int, str, int]]:
        """(rounds completed, digest, tokens added) of the run's own history, oldest first."""
        applied = [
            lab_check.Applied(name, entry)
            for name, journal in self.journals.items()
            for entry in journal
            if entry["kind"] == "settled" and entry["verdict"] in (DONE, ALONE)
        ]
        history = lab_check.history_of(applied)
        added = {(one.key, one.entry["after"]): int(lab_check.work_of(one)) for one in applied}
        return sorted((key[0] + 1, after, added[key, after]) for key, after in history.items())

    def failed_rounds(self) -> list[int]:
        """Rounds in which a worker that lived on made a payload that is not whole in the run's history."""
        kept = {one.digest for one in self.rounds}
        failed = set()
        for journal in self.journals.values():
            for entry in journal:
                if entry["kind"] == "settled" and (entry["returned"] or entry["after"] not in kept):
                    failed.add(entry["round"] + 1)
        return sorted(failed)


def _verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    import base58

    return identity.verify(base58.b58decode(peer_id), message, signature)


def _round(number: int, digest: str, tokens: int, events: Sequence[Mapping[str, Any]]) -> Round:
    def mean(key: str) -> float:
        return statistics.fmean(event[key] for event in events if event[key] is not None)

    return Round(
        number=number,
        at=statistics.median(event["time"] for event in events),
        contributors=max(len(event["contributors"]) for event in events),
        loss=mean("loss"),
        tokens=tokens,
        digest=digest,
        wait_s=mean("wait_s"),
        meet_s=min(event["wait_s"] for event in events),
        exchange_s=mean("exchange_s"),
        compute_share=mean("compute_share"),
        bytes_up=mean("bytes_up"),
    )
