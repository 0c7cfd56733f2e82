"""The metrics file: every event is one line, and a torn line costs only itself."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path

import pytest

from dtrain.trainer.errors import UsageError
from dtrain.trainer.metrics import MetricsLog, read_metrics


def test_events_come_back_in_order(tmp_path: Path) -> None:
    """Readers see an event as soon as it is written, with its time."""
    path = tmp_path / "a" / "metrics.jsonl"
    before = time.time()
    with MetricsLog(path) as log:
        log.write("step", step=1, loss=2.5)
        log.write("round", round=1, contributors=["a", "b"])
        first, second = read_metrics(path)
    assert (first["event"], first["step"], first["loss"]) == ("step", 1, 2.5)
    assert second["contributors"] == ["a", "b"]
    assert before - 0.01 <= first["time"] <= second["time"] <= time.time() + 0.01


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    """A diverged loss must not break every reader: NaN is no JSON."""
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write("step", loss=float("nan"), parts=[1.0, float("inf")], deep={"x": float("-inf")})
    entry = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (entry["loss"], entry["parts"], entry["deep"]) == (None, [1.0, None], {"x": None})


def test_a_torn_line_is_passed_over_and_glued_to_nothing(tmp_path: Path) -> None:
    """A killed worker's half line costs no event before or after it."""
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write("one")
    with path.open("ab") as file:
        file.write(b'{"time": 1, "event": "tor')
    assert [entry["event"] for entry in read_metrics(path)] == ["one"]
    with MetricsLog(path) as log:
        log.write("two")
    assert [entry["event"] for entry in read_metrics(path)] == ["one", "two"]


def test_garbage_is_no_event(tmp_path: Path) -> None:
    """Only JSON objects with an event count."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'[1]\n\n\xff\xfe\n{"a": 1}\n{"event": "ok"}\n')
    assert read_metrics(path) == [{"event": "ok"}]
    assert read_metrics(tmp_path / "missing") == []


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Every line of every thread is whole."""
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        threads = [
            threading.Thread(target=lambda: [log.write("e", text="x" * 500) for _ in range(100)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_metrics(path)) == 400


def test_writing_after_the_end_is_harmless(tmp_path: Path) -> None:
    """Late heartbeats of a worker that stops must not raise."""
    log = MetricsLog(tmp_path / "m.jsonl")
    log.close()
    log.write("late")
    log.close()
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """One line with the path and the flag."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*type --folder"):
        MetricsLog(tmp_path / "file" / "m.jsonl")


def test_a_full_disk_costs_events_and_nothing_else(tmp_path: Path) -> None:
    """No error gets out, half a line is glued to nothing, and when there is room again events are kept again."""
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write("before")
        file, room = log._file, iter([5, 0, 0])

        class Full:
            """A disk with room for five bytes more."""

            closed = False

            def write(self, data: bytes) -> int:
                left = next(room)
                if not left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data[:left])

        log._file = Full()  # type: ignore[assignment]
        for _ in range(3):
            log.write("lost")
        log._file = file
        log.write("after")
    assert [entry["event"] for entry in read_metrics(path)] == ["before", "after"]
