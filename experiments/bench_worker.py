"""Runs one real `dtrain worker` alone for a few rounds, for benches: what it wrote, and the memory that it took."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.errors import RunError
from dtrain.trainer.metrics import read_metrics

SAMPLE_S = 0.05


@dataclass(frozen=True)
class WorkerRun:
    """What a worker did."""

    events: Sequence[Mapping[str, Any]]
    peak_bytes: int
    """`peak_trainer_bytes`, and the most that the others held beside what they share with it."""
    peak_trainer_bytes: int
    """Most memory that the process which trains held, libraries included."""
    seconds: float

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]


def run_worker(folder: Path, flags: Sequence[str], timeout_s: float = 3600.0) -> WorkerRun:
    """Run `dtrain worker` with these flags in an empty folder. RunError if it fails."""
    command = [sys.executable, "-m", "dtrain.trainer.cli", "worker", "--run-id", "bench", "--name", "bench"]
    command += ["--folder", str(folder / "worker"), "--host", "127.0.0.1", "--no-lan", "--no-relay", *flags]
    env = {**os.environ, "DTRAIN_RUNTIME_DIR": str(folder / "runtime")}
    began, trainer, others = time.monotonic(), 0, 0
    with signals_interrupt(), (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        watched = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                trainer = max(trainer, _most_resident(watched))
                others = max(others, sum(_own(process) for process in _children(watched)))
                if time.monotonic() - began > timeout_s:
                    raise RunError(f"the worker took longer than {timeout_s:.0f} s")
                time.sleep(SAMPLE_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        last = (folder / "worker.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise RunError(f"the worker ended with {process.returncode}: {' '.join(last)}")
    events = read_metrics(folder / "worker" / "metrics.jsonl")
    return WorkerRun(events, trainer + others, trainer, time.monotonic() - began)


def _most_resident(process: psutil.Process) -> int:
    """Most bytes that it held so far by the kernel's count, which misses no short peak (Linux); elsewhere now."""
    try:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _own(process: psutil.Process) -> int:
    """Bytes that it holds beside what it shares with others, such as libraries, which the trainer's figure has."""
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []
