"""How much traffic a worker has had today and this month on the wire, kept over restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

KEEP_DAYS = 62
SAVE_STEP_BYTES = 1_000_000


class TrafficBudget:
    """Bytes up and down by local calendar day, in a small file. `now()` gives the local time."""

    def __init__(self, path: Path, now: Callable[[], datetime] = datetime.now):
        self._path, self._now = path, now
        self._by_day = self._read()
        self._counted, self._unsaved = 0, 0

    def count(self, total_bytes: int) -> None:
        """Take note that the worker has had `total_bytes` since it was started."""
        new = max(0, total_bytes - self._counted)
        self._counted = max(total_bytes, self._counted)
        day = self._now().date().isoformat()
        self._by_day[day] = self._by_day.get(day, 0) + new
        self._unsaved += new
        if self._unsaved >= SAVE_STEP_BYTES:
            self.save()

    @property
    def today_bytes(self) -> int:
        return self._by_day.get(self._now().date().isoformat(), 0)

    @property
    def month_bytes(self) -> int:
        month = self._now().date().isoformat()[:7]
        return sum(count for day, count in self._by_day.items() if day.startswith(month))

    def save(self) -> None:
        """Write the file. A disk that refuses costs the count, not the training."""
        self._unsaved = 0
        kept = dict(sorted(self._by_day.items())[-KEEP_DAYS:])
        draft = self._path.with_suffix(".tmp")
        try:
            draft.write_text(json.dumps(kept, indent=1) + "\n")
            os.replace(draft, self._path)
        except OSError:
            return

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._path.read_text())
            return {str(day): int(count) for day, count in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
