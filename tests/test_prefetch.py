"""Batches made ahead in a thread: its errors, its end, and the process's."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from dtrain.trainer.errors import RunError
from dtrain.trainer.prefetch import Ahead


def test_an_error_in_the_thread_reaches_who_waits() -> None:
    """Batches are made in a thread; what fails there must not hang the training. A stop ends the waiting."""

    def failing() -> Iterator[int]:
        yield 1
        raise RunError("broken")

    ahead = iter(Ahead(failing, threading.Event()))
    assert next(ahead) == 1
    with pytest.raises(RunError, match="broken"):
        next(ahead)
    stop = threading.Event()
    waiting = Ahead(lambda: iter(()), stop)
    threading.Timer(0.1, stop.set).start()
    assert list(waiting) == []


def test_a_process_ends_well_while_batches_are_made() -> None:
    """A thread that is in torch when the interpreter goes aborts the process, after a run that went well."""
    program = """
import threading, time, torch
from dtrain.trainer.prefetch import RoundsAhead

def batches():
    while True:
        for _ in range(2000):
            torch.zeros(4, 513)[:, 1:].contiguous()
        yield 1

ahead = RoundsAhead(threading.Event())
items = ahead.round(0, batches, 1, batches)
next(items)
del items  # the next round's begin
time.sleep(0.05)
"""
    for close in ("", "ahead.close()\n"):
        done = subprocess.run(
            [sys.executable, "-c", program + close], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
