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


COMMANDS = (("join", "--preset", "tiny", "--workers", "1"), ("pace", "--rates", "100"))


def test_a_stopped_benchmark_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM ends the workers and removes the folder they wrote to."""
    benches = []
    for command in COMMANDS:  # both at once: to come up takes long
        folder = tmp_path / command[0]
        folder.mkdir()
        environment = {**os.environ, "TMPDIR": str(folder)}
        words = [sys.executable, "-m", "dtrain.trainer.cli", "bench", *command]
        benches.append((folder, subprocess.Popen(words, env=environment, start_new_session=True)))
    try:
        for folder, bench in benches:
            [log] = eventually(lambda at=folder: list(at.glob("*/worker-1.log")), "no worker is started")
            bench.send_signal(signal.SIGTERM)
            assert bench.wait(60) == 130
            eventually(lambda at=log.parent: not our_processes(at), "a process is left", 10.0)
            assert list(folder.iterdir()) == []
    finally:
        for _, bench in benches:
            bench.kill()
            bench.wait()
