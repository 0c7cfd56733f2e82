"""Result folders of `dtrain simulate` for the Experiments page: their rows, and their runs' curves."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.experiments.dashboard_text import clean_line
from dtrain.experiments.results import SUMMARY, ResultFolder
from dtrain.trainer.errors import UsageError

AXES = ("round", "tokens", "time_s", "bytes_up_per_worker")
VALUES = ("eval_loss", "loss", "contributors", "wait_s", "exchange_s", "compute_share", "lost_sections")
MAX_FOLDERS, MAX_DEPTH = 500, 3

Column = list[float | None]


class Results:
    """The result folders at or below one folder. What was read is kept until the file changes."""

    def __init__(self, base: Path):
        self.base = base
        self._cache: dict[Path, tuple[float, list[dict[str, Any]]]] = {}
        self._lock = threading.Lock()

    def folders(self) -> list[dict[str, Any]]:
        """Every sweep with its rows, by its path below the base."""
        found = []
        for name, folder in self._found().items():
            try:
                summary = folder.summary()
            except UsageError:
                continue  # just being written, or damaged
            rows = [row for row in summary.get("rows", []) if isinstance(row, dict)]
            found.append(
                {
                    "folder": name,
                    "name": clean_line(summary.get("name")),
                    "description": clean_line(summary.get("description")),
                    "finished": bool(summary.get("finished")),
                    "runs_total": summary.get("runs_total", len(rows)),
                    "varied": [clean_line(key) for key in summary.get("varied", [])],
                    "rows": rows,
                }
            )
        return found

    def curve(self, folder: str, run_id: str, max_points: int = 2000) -> dict[str, Column] | None:
        """The columns of a run's rounds, thinned to about `max_points`; None if there is no such run.

        Stretches are thinned to the rounds with the lowest and the highest evaluation loss, so no spike is lost.
        """
        known = self._found().get(folder)
        if known is None or run_id not in self._run_ids(known):
            return None
        rounds = _thin(self._rounds(known, run_id), max_points)
        return {key: [_finite(line.get(key)) for line in rounds] for key in (*AXES, *VALUES)}

    def _found(self) -> dict[str, ResultFolder]:
        found: dict[str, ResultFolder] = {}
        for depth in range(MAX_DEPTH + 1):
            for path in sorted(self.base.glob("*/" * depth + SUMMARY)):
                name = path.parent.relative_to(self.base).as_posix()
                if len(found) < MAX_FOLDERS:
                    found[name] = ResultFolder(path.parent)
        return found

    @staticmethod
    def _run_ids(folder: ResultFolder) -> set[str]:
        """Ids that the summary names, never what a request says: they become paths."""
        rows = folder.summary().get("rows", [])
        ids = {str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row}
        return {run_id for run_id in ids if "/" not in run_id and run_id not in ("", ".", "..")}

    def _rounds(self, folder: ResultFolder, run_id: str) -> list[dict[str, Any]]:
        path = folder.path / "runs" / run_id / "rounds.jsonl"
        changed = path.stat().st_mtime if path.exists() else 0.0
        with self._lock:
            kept = self._cache.get(path)
            if kept is None or kept[0] != changed:
                rounds = [line for line in folder.rounds(run_id) if isinstance(line, dict)]
                self._cache[path] = kept = (changed, rounds)
        return kept[1]


def _thin(rounds: Sequence[dict[str, Any]], max_points: int) -> Sequence[dict[str, Any]]:
    if len(rounds) <= max_points:
        return rounds
    stretches, kept = max_points // 2, []
    for index in range(stretches):
        part = rounds[index * len(rounds) // stretches : (index + 1) * len(rounds) // stretches]
        valued = [line for line in part if _finite(line.get("eval_loss")) is not None] or part
        low = min(valued, key=lambda line: line.get("eval_loss") or 0.0)
        high = max(valued, key=lambda line: line.get("eval_loss") or 0.0)
        kept += [low] if low is high else sorted((low, high), key=lambda line: line.get("round", 0))
    return kept


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value
