"""Runs a scenario: starts the workers, lets happen what is planned when it is due, and notices when all is over."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.experiments.lab_places import Places
from dtrain.experiments.lab_schedule import Planned
from dtrain.experiments.lab_swarm import CLI, LabSwarm, LabWorker

POLL_S = 0.2
START_S = 240.0
END_S = 45.0  # how long the last are waited for


class Stuck(Exception):
    """The scenario cannot go on; one line says why."""


@dataclass
class Happened:
    """A planned thing that has happened. Times are Unix seconds."""

    planned: Planned
    at: float
    round: int
    undone_at: float | None = None

    def to_dict(self, began: float) -> dict[str, Any]:
        """For the summary; seconds since the first round's beginning."""
        return {
            "kind": self.planned.kind,
            "worker": self.planned.worker,
            "at_s": round(self.at - began, 2),
            "round": self.round,
            "undone_at_s": None if self.undone_at is None else round(self.undone_at - began, 2),
        }


@dataclass
class Director:
    """`play` runs the scenario to its end; then `happened` tells what there was."""

    swarm: LabSwarm
    places: Places
    plan: Sequence[Planned]
    tell: Callable[[str], None]
    show: Callable[[], None]
    tick: Callable[[], None] = lambda: None
    began: float = 0.0
    """When the first round began, Unix seconds; 0 = not yet."""
    happened: list[Happened] = field(default_factory=list)
    _due: list[Planned] = field(default_factory=list)
    _undo: list[Happened] = field(default_factory=list)
    _last_round: int = 0
    _last_progress: float = field(default_factory=time.monotonic)

    def play(self, base: Path) -> None:
        """Until all rounds or all seconds are done. Stuck if that does not come about."""
        lab = self.swarm.scenario.lab
        until, self._due = time.monotonic() + lab.timeout_s, list(self.plan)
        self._bring_in_all(base)
        self._last_progress = time.monotonic()
        while not self._is_over():
            self._turn()
            for happened in [one for one in self._undo if self._is_undone(one)]:
                self._undo.remove(happened)
                self._take_back(happened)
            for planned in [one for one in self._due if self._is_due(one)]:
                self._due.remove(planned)
                self._let_happen(planned)
            self._notice_ends()
            if time.monotonic() - self._last_progress > lab.stall_s:
                raise Stuck(f"no round was completed for {lab.stall_s:.0f} s")
            if time.monotonic() > until:
                raise Stuck(f"not over after {lab.timeout_s:.0f} s")

    def _turn(self) -> None:
        time.sleep(POLL_S)
        self.swarm.refresh()
        self.tick()
        self.show()
        training = any(worker.view.state == "training" for worker in self.swarm.workers.values())
        if not self.began and training:
            self.began = time.time()
        if self.swarm.rounds_done > self._last_round:
            self._last_round, self._last_progress = self.swarm.rounds_done, time.monotonic()

    # ------------------------------------------------------------------ the beginning and the end

    def _bring_in_all(self, base: Path) -> None:
        """One after another, so that the machine carries them; all but the first with an invite."""
        swarm, lab = self.swarm, self.swarm.scenario.lab
        if swarm.bootstrap is not None:
            swarm.start_bootstrap(_create(base, swarm))
            self._wait_for_invite(swarm.bootstrap)
        early = [worker for worker in swarm.workers.values() if not worker.place.late]
        for number, worker in enumerate(early):
            swarm.start(worker.name)
            if number == 0 and swarm.bootstrap is None:
                self._wait_for_invite(worker)
            self._pass_time(lab.start_every_s)

    def _wait_for_invite(self, worker: LabWorker) -> None:
        until = time.monotonic() + START_S
        while not worker.invite():
            self._turn()
            if not worker.is_running or time.monotonic() > until:
                raise Stuck(f"{worker.name} did not start:\n{worker.last_lines()}")

    def _pass_time(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._turn()

    def _is_over(self) -> bool:
        lab = self.swarm.scenario.lab
        if not lab.rounds:
            return bool(self.began) and time.time() - self.began > lab.duration_s
        if self.swarm.rounds_done < lab.rounds:
            return False
        # Who is behind ends by itself; who was only just started again finds nobody any more.
        waited_s = time.monotonic() - self._last_progress
        return waited_s > END_S or not any(worker.is_running for worker in self.swarm.workers.values())

    def _notice_ends(self) -> None:
        """A worker that ends though nobody asked it to, before its rounds are done, is the end of the scenario."""
        for worker in self.swarm.workers.values():
            if worker.process is None or worker.is_running or len(worker.ends) == len(worker.starts):
                continue
            worker.ended("finished" if worker.process.returncode == 0 else "failed")
            if worker.process.returncode and not self._is_late(worker):
                raise Stuck(f"{worker.name} failed:\n{worker.last_lines()}")

    def _is_late(self, worker: LabWorker) -> bool:
        """It was started again when the others had done their rounds, and found nobody."""
        rounds = self.swarm.scenario.lab.rounds
        return bool(rounds) and self.swarm.rounds_done >= rounds and worker.view.state != "training"

    # ------------------------------------------------------------------ what happens

    def _is_due(self, planned: Planned) -> bool:
        if not self.began:
            return False
        if planned.round:
            return self.swarm.rounds_done >= planned.round
        return time.time() - self.began >= planned.at_s

    def _is_undone(self, happened: Happened) -> bool:
        return time.time() - happened.at >= happened.planned.seconds

    def _let_happen(self, planned: Planned) -> None:
        worker = self.swarm.workers.get(planned.worker)
        if worker is not None and planned.kind != "join" and not worker.is_running:
            self.tell(f"{planned.kind} of {planned.worker} is left out: it is not there")
            return
        if planned.kind in self.places.cannot:
            self.tell(f"{planned.kind} of {planned.worker} is left out: it is not modelled here")
            return
        happened = Happened(planned, time.time(), self.swarm.rounds_done)
        self.happened.append(happened)
        self.tell(_sentence(planned, self.swarm.rounds_done))
        if worker is not None:
            self._act(planned, worker)
        elif planned.kind == "partition":
            self.places.partition(planned.sides)
        elif self.swarm.bootstrap is not None:
            self.swarm.bootstrap.kill()
        if planned.seconds:
            self._undo.append(happened)

    def _act(self, planned: Planned, worker: LabWorker) -> None:
        kind = planned.kind
        if kind == "kill":
            worker.kill()
        elif kind == "leave":
            worker.interrupt()
        elif kind == "join":
            self.swarm.start(worker.name)
        elif kind == "freeze":
            worker.freeze(True)
        elif kind == "cut":
            self.places.cut(worker.name, True)
        elif kind == "move":
            self.places.move(worker.name)
        elif kind == "fill":
            assert worker.disk is not None
            worker.disk.fill()

    def _take_back(self, happened: Happened) -> None:
        kind, worker = happened.planned.kind, self.swarm.workers.get(happened.planned.worker)
        rounds = self.swarm.scenario.lab.rounds
        if worker is None:
            self.places.partition([])
        elif kind in ("kill", "leave"):
            if rounds and self.swarm.rounds_done >= rounds:
                return  # there is nothing left to join
            if worker.is_running:  # it takes its time to leave
                self._undo.append(happened)
                return
            self._notice_ends()
            self.swarm.start(worker.name)
        elif kind == "freeze":
            worker.freeze(False)
        elif kind == "cut":
            self.places.cut(worker.name, False)
        elif kind == "fill":
            assert worker.disk is not None
            worker.disk.free()
        happened.undone_at = time.time()
        self.tell(f"{UNDONE[kind]} {happened.planned.worker}".strip())


UNDONE = {
    "kill": "started again:",
    "leave": "started again:",
    "freeze": "thawed:",
    "cut": "connected again:",
    "partition": "the partition is healed",
    "fill": "its disk has room again:",
}
DONE = {
    "kill": "power cut at",
    "leave": "asked to leave:",
    "join": "joins:",
    "freeze": "frozen:",
    "cut": "cable pulled at",
    "move": "address changes:",
    "fill": "disk full at",
    "bootstrap-dies": "power cut at the bootstrap peer",
}


def _sentence(planned: Planned, rounds_done: int) -> str:
    where = f"during round {rounds_done + 1}"
    if planned.kind == "partition":
        sides = " | ".join(" ".join(name.removeprefix("worker-") for name in side) for side in planned.sides)
        return f"the network is split: {sides}, {where}"
    return f"{DONE[planned.kind]} {planned.worker}".strip() + f", {where}"


def _create(base: Path, swarm: LabSwarm) -> Path:
    """The run's folder as its organizer makes it, for a bootstrap peer."""
    command = [sys.executable, "-m", CLI, "create", "--run-id", swarm.scenario.name]
    done = subprocess.run(
        [*command, "--config", str(swarm.run_file)], cwd=base, capture_output=True, text=True
    )
    if done.returncode:
        raise Stuck(f"dtrain create failed: {done.stderr.strip()}")
    return base / "dtrain-runs" / swarm.scenario.name
