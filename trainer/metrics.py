"""A worker's events, one JSON object a line; what the demo, the dashboard and later analysis read."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from dtrain.trainer.errors import UsageError


class Metrics(Protocol):
    """Where a worker's events go."""

    def write(self, event: str, **fields: Any) -> None:
        """Note an event at this moment."""


class MetricsLog:
    """Appends events to a file. May be used from several threads. A full disk costs events, not the training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._is_torn = False  # the file ends within a line
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror}; type --folder with a folder you own"
            ) from None
        self._end_torn_line()

    def write(self, event: str, **fields: Any) -> None:
        """Append {"time": Unix seconds, "event": event, **fields}; NaN and infinities become null."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        line = json.dumps({key: _plain(value) for key, value in entry.items()}, allow_nan=False)
        with self._lock:
            if not self._file.closed:
                self._append(line.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        whole = b"\n" + line if self._is_torn else line
        try:
            self._is_torn = self._file.write(whole) != len(whole)
        except OSError:
            return  # nothing of it is there

    def close(self) -> None:
        """Close the file; later writes are dropped."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_torn_line(self) -> None:
        """A killed worker may have left half a line: the next event must not be glued to it."""
        if self._file.tell() > 0:
            self._file.seek(-1, 2)
            self._is_torn = self._file.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file, oldest first; torn lines are passed over, a missing file has none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry:
            entries.append(entry)
    return entries


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
