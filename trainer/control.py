"""What the user asks of a running worker, and why it holds: pauses, limits, hours, budgets. Safe from any thread.

The worker's loop asks `held()` between rounds and inner steps; commands come from the control service.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from dtrain.trainer import limits as limits_file
from dtrain.trainer.budget import TrafficBudget
from dtrain.trainer.limits import Limits

LOOK_PERIOD_S = 1.0  # between two looks at clock, battery, memory and traffic
BUSY_PERCENT = 30.0  # of all cores, used by other programs: the machine is not idle
GIGA = 1e9


def on_battery() -> bool:
    """Whether this machine runs on battery; False where there is none."""
    sensors = getattr(psutil, "sensors_battery", lambda: None)()
    return sensors is not None and sensors.power_plugged is False


def worker_memory_gb() -> float:
    """Resident memory of this process and its children, in GB."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue
    return float(total) / GIGA


class OthersLoad:
    """How busy other programs keep this machine."""

    def __init__(self) -> None:
        self._last: tuple[float, float, float] | None = None
        self._percent = 0.0

    def percent(self) -> float:
        """CPU time of other processes since the last call, in percent of all cores."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        busy = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0) - idle
        now = (busy, _own_cpu_s(), time.monotonic())
        if self._last is not None and now[2] > self._last[2]:
            others = (now[0] - self._last[0]) - (now[1] - self._last[1])
            passed = (now[2] - self._last[2]) * (psutil.cpu_count() or 1)
            self._percent = 100.0 * max(0.0, others) / passed
        self._last = now
        return self._percent


def _own_cpu_s() -> float:
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


@dataclass
class Machine:
    """What is asked of the machine; tests plant other answers."""

    now: Callable[[], datetime] = datetime.now
    on_battery: Callable[[], bool] = on_battery
    memory_gb: Callable[[], float] = worker_memory_gb
    others_percent: Callable[[], float] = field(default_factory=lambda: OthersLoad().percent)


class Control:
    """One worker's controls. With `folder`, limits and the traffic count are kept there over restarts."""

    def __init__(self, folder: Path | None = None, machine: Machine | None = None):
        self._folder = folder
        self._machine = machine or Machine()
        self.limits = limits_file.load(folder / "limits.json") if folder else Limits()
        self._budget = TrafficBudget(folder / "traffic.json", self._machine.now) if folder else None
        self._changed = threading.Condition()
        self._version = 0
        self._paused = self._finishing = False
        self._looked, self._reason = 0.0, ""
        self.spent = False  # the day's or the month's traffic is used up
        # How many bytes this worker has had on the wire, both ways; how it is stopped; what it says of itself.
        self.used_bytes: Callable[[], int] = lambda: 0
        self.stop_worker: Callable[[str], None] = lambda reason: None
        self.describe: Callable[[], dict[str, Any]] = lambda: {"state": "starting"}
        self.on_limits: Callable[[Limits], None] = lambda limits: None

    # ------------------------------------------------------------------ what the user asks

    def pause(self) -> None:
        """Hand in what the round under way has trained so far, then hold."""
        self._set(paused=True)

    def resume(self) -> None:
        """Undo a pause, and a finish that has not come about yet."""
        self._set(paused=False, finishing=False)

    def finish(self) -> None:
        """Leave after the round under way."""
        self._set(finishing=True)

    def stop(self) -> None:
        """Leave after the inner step or the exchange under way."""
        self.stop_worker("asked to stop")
        self._set()

    def set_limits(self, changes: dict[str, object]) -> None:
        """Replace some limits, and keep them. UsageError for a value that cannot be."""
        with self._changed:
            self.limits = limits_file.changed(self.limits, changes)
            if self._folder is not None:
                limits_file.save(self.limits, self._folder / "limits.json")
        self.on_limits(self.limits)
        self._set()

    def _set(self, paused: bool | None = None, finishing: bool | None = None) -> None:
        with self._changed:
            self._paused = self._paused if paused is None else paused
            self._finishing = self._finishing if finishing is None else finishing
            self._looked = 0.0
            self.note_change()

    # ------------------------------------------------------------------ what the worker's loop asks

    @property
    def finishing(self) -> bool:
        return self._finishing

    @property
    def pausing(self) -> bool:
        return self._paused

    def held(self) -> str:
        """Why the worker must not train now, one line for the user; "" if nothing holds it."""
        if self._paused:
            return "paused by you; dtrain resume goes on"
        now = time.monotonic()
        if not self._looked or now - self._looked > LOOK_PERIOD_S:
            self._looked, self._reason = now, self._look()
        return self._reason

    def _look(self) -> str:
        limits, machine = self.limits, self._machine
        if self._budget is not None:
            self._budget.count(self.used_bytes())
        today = bool(limits.daily_gb) and self.bytes_today >= limits.daily_gb * GIGA
        month = bool(limits.monthly_gb) and self.bytes_this_month >= limits.monthly_gb * GIGA
        self.spent = today or month
        if limits.memory_gb and (used := machine.memory_gb()) > limits.memory_gb:
            self.stop_worker(f"it uses {used:.1f} GB of memory, and {limits.memory_gb:g} GB is your limit")
            return "more memory used than your limit"
        if not limits.may_train_at(machine.now()):
            return f"outside your hours {limits.hours}"
        if today:
            return f"your {limits.daily_gb:g} GB of today are used up; on from midnight"
        if month:
            return f"your {limits.monthly_gb:g} GB of this month are used up; on from the first"
        if not limits.on_battery and machine.on_battery():
            return "on battery; on again with mains power"
        if limits.when_idle and (percent := machine.others_percent()) > BUSY_PERCENT:
            return f"other programs are busy ({percent:.0f} % of the machine)"
        return ""

    def rest_s(self, step_s: float) -> float:
        """How long to rest after an inner step of `step_s` seconds, to keep to the share of computing time."""
        return step_s * (100.0 / self.limits.compute_percent - 1.0)

    @property
    def bytes_today(self) -> int:
        return self._budget.today_bytes if self._budget else self.used_bytes()

    @property
    def bytes_this_month(self) -> int:
        return self._budget.month_bytes if self._budget else self.used_bytes()

    def close(self) -> None:
        """Keep the traffic count for next time."""
        if self._budget is not None:
            self._budget.count(self.used_bytes())
            self._budget.save()

    # ------------------------------------------------------------------ waking who waits

    def note_change(self) -> None:
        """Wake everybody in `wait`: something about the worker is new."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def wait(self, seen: int, timeout_s: float) -> int:
        """Wait until something is newer than version `seen`, at most `timeout_s`; the version then."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > seen, timeout_s)
            return self._version

    def memory_gb(self) -> float:
        return self._machine.memory_gb()
