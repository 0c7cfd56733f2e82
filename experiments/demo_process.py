"""The demo's worker processes: real `dtrain worker` commands, and none of them left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from dtrain.experiments.signals import signals_held

INTERRUPT_S = 15.0  # how long a worker may take to leave after Ctrl-C
TERMINATE_S = 5.0  # and after the second signal, which asks it to drop everything
GONE_S = 8.0  # a network process ends by itself when its worker is gone
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class DemoProcess:
    """One `dtrain worker`, or another command for a run, started in a session of its own: a terminal's Ctrl-C
    reaches the demo only."""

    def __init__(self, run_id: str, name: str, base: Path, flags: Sequence[str], command: str = "worker"):
        self.name, self.folder, self.log = name, base / name, base / f"{name}.log"
        arguments = ["--run-id", run_id, "--folder", str(self.folder)]
        if command == "worker":
            arguments += ["--name", name, "--host", "127.0.0.1", "--threads", "1"]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # the workers share the processor
            "DTRAIN_RUNTIME_DIR": str(base / "runtime"),  # a run of ours is no business of the user's own
        }
        self.started = time.monotonic()
        try:
            with self.log.open("wb") as log, signals_held():
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "dtrain.trainer.cli", command, *arguments, *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
        except KeyboardInterrupt:  # it came while the process was being made: nobody else knows of it yet
            if "process" in vars(self):
                stop_all([self])
            raise

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if one ended it."""
        return self.process.poll()

    def interrupt(self) -> None:
        """What Ctrl-C in its terminal does."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like from outside."""
        self.process.kill()

    def last_lines(self, count: int = 15) -> str:
        """The end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def end_with_parent() -> None:
    """In the child: get SIGTERM if the demo is killed. Elsewhere than on Linux the workers just finish their rounds."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_all(workers: Sequence[DemoProcess]) -> None:
    """End every process: Ctrl-C first, then SIGTERM, then SIGKILL. Ctrl-C meanwhile goes straight to SIGKILL."""
    children = _descendants(workers)
    try:
        for number, patience_s in ((signal.SIGINT, INTERRUPT_S), (signal.SIGTERM, TERMINATE_S)):
            running = [worker for worker in workers if worker.exit_code is None]
            for worker in running:
                worker.process.send_signal(number)
            _wait(running, patience_s)
    finally:
        children += _descendants(workers)
        for worker in workers:
            if worker.exit_code is None:
                worker.kill()
                worker.process.wait()
        _, left = psutil.wait_procs(children, timeout=GONE_S)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def _wait(workers: Sequence[DemoProcess], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    for worker in workers:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def _descendants(workers: Sequence[DemoProcess]) -> list[psutil.Process]:
    found = []
    for worker in workers:
        if worker.exit_code is None:
            try:
                found += psutil.Process(worker.process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                pass
    return found
