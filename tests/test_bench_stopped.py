"""Benchmarks that are stopped leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from swarm_tools import eventually, our_processes

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.parametrize(
    "command", [("join", "--preset", "tiny", "--workers", "1"), ("pace", "--rates", "100")]
)
def test_a_stopped_benchmark_leaves_nothing(command: tuple[str, ...], tmp_path: Path) -> None:
    """SIGTERM ends the workers and removes the folder they wrote to."""
    bench = subprocess.Popen(
        [sys.executable, "-m", "dtrain.trainer.cli", "bench", *command],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    try:
        [runtime] = eventually(lambda: list(tmp_path.glob("*/worker-1.log")), "no worker is started")
        base = runtime.parent
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 130
    finally:
        bench.kill()
        bench.wait()
    eventually(lambda: not our_processes(base), "a process is left", 10.0)
    assert list(tmp_path.iterdir()) == []
