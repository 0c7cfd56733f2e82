"""Runs one real `dtrain worker` alone for a few rounds, for benches: what it wrote, and the memory that it took."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
    """Most memory that its processes held at one moment."""
    peak_trainer_bytes: int
    """Of that, the process that trains."""
    seconds: float

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]


def run_worker(folder: Path, flags: Sequence[str], timeout_s: float = 3600.0) -> WorkerRun:
    """Run `dtrain worker` with these flags in an empty folder. RunError if it fails."""
    command = [sys.executable, "-m", "dtrain.trainer.cli", "worker", "--run-id", "bench", "--name", "bench"]
    command += ["--folder", str(folder / "worker"), "--host", "127.0.0.1", "--no-lan", "--no-relay", *flags]
    env = {**os.environ, "DTRAIN_RUNTIME_DIR": str(folder / "runtime")}
    began, highest, peak, peak_trainer = time.monotonic(), 0, 0, 0
    with signals_interrupt(), (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        watched = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                processes = [watched, *_children(watched)]
                resident = sum(_resident(process) for process in processes)
                if resident > highest:  # then it is worth the time to look at what is shared
                    highest = resident
                    own, *others = [_memory(process) for process in processes]
                    peak_trainer, peak = max(peak_trainer, own), max(peak, own + sum(others))
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
    return WorkerRun(events, peak, peak_trainer, time.monotonic() - began)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _memory(process: psutil.Process) -> int:
    """Bytes that it takes; of what it shares with others, such as libraries, its part, where the system tells."""
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "pss", info.rss))


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []
