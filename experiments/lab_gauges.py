"""What the workers take of the machine over time: whether memory or open files grow."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import psutil

from dtrain.experiments.lab_swarm import LabSwarm

PERIOD_S = 20.0
WARM_S = 180.0
"""A process's first minutes, in which it loads and fills its caches, do not count."""
LEAST_SAMPLES = 12


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    age_s: float
    rss_bytes: int
    num_fds: int


class Gauges:
    """`look` as often as you like; it samples every PERIOD_S."""

    def __init__(self, swarm: LabSwarm):
        self._swarm, self._last = swarm, 0.0
        self._samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)
        self._totals: list[int] = []

    def look(self) -> None:
        if time.monotonic() - self._last < PERIOD_S:
            return
        self._last = time.monotonic()
        for worker in self._swarm.workers.values():
            total = 0
            for process in worker.processes():
                try:
                    with process.oneshot():
                        age_s = time.time() - process.create_time()
                        sample = Sample(age_s, process.memory_info().rss, process.num_fds())
                except psutil.Error:
                    continue
                self._samples[worker.name, process.pid].append(sample)
                total += sample.rss_bytes
            if total:
                self._totals.append(total)

    def figures(self) -> dict[str, Any]:
        """Growth from the first to the last third of a process's life, as a share; the median over all processes that
        lived long enough, and the worst."""
        lives = [[one for one in life if one.age_s > WARM_S] for life in self._samples.values()]
        lives = [life for life in lives if len(life) >= LEAST_SAMPLES]
        memory = [_growth([one.rss_bytes for one in life]) for life in lives]
        files = [_growth([one.num_fds for one in life]) for life in lives]
        return {
            "long_lives": len(lives),
            "memory_growth": round(statistics.median(memory), 4) if memory else None,
            "memory_growth_worst": round(max(memory), 4) if memory else None,
            "file_growth": round(statistics.median(files), 4) if files else None,
            "worker_mb": round(statistics.median(self._totals) / 1e6, 1) if self._totals else None,
        }


def _growth(values: list[int]) -> float:
    third = len(values) // 3
    return statistics.fmean(values[-third:]) / statistics.fmean(values[:third]) - 1
