"""The lab's workers: real `dtrain worker` processes on hosts of their own, which can be started, ended and frozen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from dtrain.experiments.demo_process import end_with_parent
from dtrain.experiments.demo_watch import WorkerView
from dtrain.experiments.lab_config import Place
from dtrain.experiments.lab_file import Scenario
from dtrain.experiments.lab_places import BOOTSTRAP, Disk, Places, skew_environment

INTERRUPT_S = 20.0
INVITE = re.compile(r"dtrain join (\S+)")
CLI = "dtrain.trainer.cli"


class LabWorker:
    """One worker, over all its lives."""

    def __init__(self, name: str, place: Place, base: Path, places: Places):
        self.name, self.place = name, place
        self.folder, self.log = base / "workers" / name, base / "logs" / f"{name}.log"
        self._runtime, self._places = base / "runtime" / name, places
        self.view = WorkerView(name, self.folder / "metrics.jsonl")
        self.process: subprocess.Popen[bytes] | None = None
        self.starts: list[float] = []  # time.time() of each
        self.ends: list[tuple[float, str]] = []  # time.time() and how
        has_disk = place.disk_mb and "fill" not in places.cannot
        self.disk = Disk(self.folder, place.disk_mb) if has_disk else None
        self.is_frozen = False

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, flags: Sequence[str], command: str = "worker") -> None:
        """Start the process on its host."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._runtime.mkdir(parents=True, exist_ok=True)
        argv = [*self._places.command(self.name), sys.executable, "-m", CLI, command]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DTRAIN_RUNTIME_DIR": str(self._runtime),
            **skew_environment(self._runtime / "skew", self.place.skew_s),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, *self._places.flags(self.name), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd=self._runtime,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._places.started(self.name, self.process.pid)
        self.starts.append(time.time())
        self.view.state, self.is_frozen = "starting", False

    def invite(self) -> str:
        """The invite that it printed last, or ""."""
        found = INVITE.findall(self.log.read_text(errors="replace")) if self.log.exists() else []
        return str(found[-1]) if found else ""

    def kill(self) -> None:
        """A power cut: its process, its network process and its daemon, all at once."""
        for process in self.processes():
            _send(process, signal.SIGKILL)
        self.ended("killed")

    def interrupt(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)

    def freeze(self, is_frozen: bool) -> None:
        for process in self.processes():
            _send(process, signal.SIGSTOP if is_frozen else signal.SIGCONT)
        self.is_frozen = is_frozen

    def ended(self, how: str) -> None:
        if self.process is not None and len(self.ends) < len(self.starts):
            self.ends.append((time.time(), how))

    def processes(self) -> list[psutil.Process]:
        """The worker and all below it, children last."""
        if not self.is_running:
            return []
        assert self.process is not None
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def last_lines(self, count: int = 15) -> str:
        """The end of what it printed."""
        return (
            "\n".join(self.log.read_text(errors="replace").splitlines()[-count:]) if self.log.exists() else ""
        )


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


class LabSwarm:
    """All workers of a scenario, and the bootstrap peer where there is one."""

    def __init__(self, scenario: Scenario, base: Path, places: Places, run_file: Path):
        self.scenario, self._base, self.run_file = scenario, base, run_file
        self.workers = {
            name: LabWorker(name, place, base, places) for name, place in zip(scenario.names, scenario.places)
        }
        self.bootstrap = LabWorker(BOOTSTRAP, Place(), base, places) if scenario.lab.bootstrap else None

    def refresh(self) -> None:
        for worker in self.workers.values():
            worker.view.refresh()

    @property
    def everybody(self) -> list[LabWorker]:
        return [*self.workers.values(), *([self.bootstrap] if self.bootstrap else [])]

    @property
    def rounds_done(self) -> int:
        """Rounds that at least one worker has completed."""
        return max(
            (worker.view.last_round for worker in self.workers.values() if worker.view.rounds), default=0
        )

    def start(self, name: str) -> None:
        """Start a worker, the first time or again."""
        worker, lab = self.workers[name], self.scenario.lab
        flags = ["--run-id", self.scenario.name, "--name", name, "--folder", str(worker.folder)]
        flags += ["--no-lan", "--journal", "--threads", "1", "--device", "cpu"]
        flags += [
            "--max-tokens-per-s",
            str(lab.tokens_per_s),
            "--checkpoint-every",
            str(lab.checkpoint_every),
        ]
        flags += ["--rounds", str(lab.rounds), "--eval-every", str(lab.rounds or 10)]
        invite = self.invite(name)
        flags += ["--invite", invite] if invite else ["--config", str(self.run_file)]
        worker.start(flags)

    def start_bootstrap(self, run_folder: Path) -> None:
        """Start the peer that trains nothing; `run_folder` holds what `dtrain create` made."""
        assert self.bootstrap is not None
        runs = self._base / "runtime" / BOOTSTRAP / "dtrain-runs"
        runs.mkdir(parents=True, exist_ok=True)
        (runs / self.scenario.name).symlink_to(run_folder)
        self.bootstrap.start(["--run-id", self.scenario.name], command="bootstrap")

    def invite(self, newcomer: str) -> str:
        """An invite of somebody who is there, best of one that can be dialled; "" if nobody is."""
        others = [worker for worker in self.everybody if worker.name != newcomer and worker.is_running]
        there = [worker for worker in others if worker.invite() and not worker.is_frozen]
        there.sort(key=lambda worker: (worker.name != BOOTSTRAP, worker.place.nat))
        return there[0].invite() if there else ""

    def stop(self) -> None:
        """End every process: Ctrl-C first, then SIGKILL."""
        running = [worker for worker in self.everybody if worker.is_running]
        for worker in running:
            if worker.is_frozen:
                worker.freeze(False)
            worker.interrupt()
        until = time.monotonic() + INTERRUPT_S
        for worker in running:
            assert worker.process is not None
            try:
                worker.process.wait(max(0.1, until - time.monotonic()))
                worker.ended("stopped")
            except subprocess.TimeoutExpired:
                worker.kill()

    def keep(self) -> None:
        """Bring what is on the workers' own disks to where it stays."""
        for worker in self.workers.values():
            if worker.disk is not None:
                worker.disk.keep()
