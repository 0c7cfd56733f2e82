"""What a worker may take of its machine: how limits are typed, kept and held."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.trainer import limits
from dtrain.trainer.budget import TrafficBudget
from dtrain.trainer.control import Control, Machine
from dtrain.trainer.errors import UsageError
from dtrain.trainer.limits import FLAGS, Limits

NIGHT = Limits(hours="22:00-08:00")


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--up", "5mbit", 5.0),
        ("--up", "500 kbit", 0.5),
        ("--down", "1Gbit", 1000.0),
        ("--down", "none", 0.0),
        ("--gpu", "50%", 50.0),
        ("--gpu", "none", 100.0),
        ("--threads", "4", 4),
        ("--memory", "8GB", 8.0),
        ("--daily", "500MB", 0.5),
        ("--monthly", "0.2TB", 200.0),
        ("--hours", "8:00-22:30", "08:00-22:30"),
        ("--hours", "none", ""),
        ("--on-battery", "no", False),
        ("--when-idle", "yes", True),
    ],
)
def test_a_limit_as_typed(flag: str, text: str, value: object) -> None:
    """Units are as people write them, and "none" lifts a limit."""
    assert FLAGS[flag][1](text) == pytest.approx(value)


@given(st.sampled_from(sorted(FLAGS)), st.text(max_size=20))
def test_any_text_is_a_limit_or_refused(flag: str, text: str) -> None:
    """Whatever is typed, the answer is a limit that can be kept, or one line with an example."""
    name, parse, _, _ = FLAGS[flag]
    try:
        changed = limits.changed(Limits(), {name: parse(text)})
    except UsageError as error:
        assert "\n" not in str(error).replace(text, "")
    else:
        assert isinstance(changed, Limits)


@pytest.mark.parametrize(
    ("moment", "may"), [("21:59", False), ("22:00", True), ("03:00", True), ("07:59", True), ("08:00", False)]
)
def test_hours_go_over_midnight(moment: str, may: bool) -> None:
    """ "22:00-08:00" is the night."""
    assert NIGHT.may_train_at(datetime.fromisoformat(f"2026-11-24 {moment}")) is may


def test_limits_are_kept(tmp_path: Path) -> None:
    """A worker that is started again has the limits of before; a changed one leaves the others."""
    Control(tmp_path).set_limits({"up_mbps": 5.0, "hours": "22:00-08:00"})
    Control(tmp_path).set_limits({"compute_percent": 50.0})
    assert Control(tmp_path).limits == Limits(up_mbps=5.0, hours="22:00-08:00", compute_percent=50.0)


def test_a_damaged_limits_file(tmp_path: Path) -> None:
    """Limits that cannot be read are not guessed: training without them could cost the user money."""
    (tmp_path / "limits.json").write_text("{")
    with pytest.raises(UsageError, match="dtrain limit"):
        Control(tmp_path)


class Clock:
    """A clock that the test sets."""

    def __init__(self, moment: str):
        self.moment = datetime.fromisoformat(moment)

    def __call__(self) -> datetime:
        return self.moment

    def set(self, moment: str) -> None:
        self.moment = datetime.fromisoformat(moment)


def test_a_months_traffic_ends_with_the_month(tmp_path: Path) -> None:
    """At 200 GB on the wire the worker holds, also after a restart, and goes on when the next month begins; days
    likewise."""
    clock, used = Clock("2026-11-23 12:00"), [0]
    control = Control(tmp_path, Machine(now=clock))
    control.used_bytes = lambda: used[0]
    control.set_limits({"monthly_gb": 200.0, "daily_gb": 150.0})
    used[0] = 150 * 10**9 - 1
    assert look(control) == ""
    used[0] += 1
    assert "150 GB of today" in look(control) and control.spent
    clock.set("2026-11-24 00:00")
    assert look(control) == "" and not control.spent
    used[0] += 50 * 10**9
    assert "200 GB of this month" in look(control)
    control.close()
    again = Control(tmp_path, Machine(now=clock))
    assert "200 GB of this month" in again.held()
    clock.set("2026-12-01 00:00")
    assert look(again) == "" and again.bytes_this_month == 0


def look(control: Control) -> str:
    """Why it holds, looked at anew."""
    control.note_change()
    control._looked = 0.0
    return control.held()


def test_battery_idle_and_hours(tmp_path: Path) -> None:
    """Each of these holds the worker while it lasts, and its reason is said."""
    clock, battery, busy = Clock("2026-11-24 12:00"), [True], [90.0]
    machine = Machine(now=clock, on_battery=lambda: battery[0], others_percent=lambda: busy[0])
    control = Control(tmp_path, machine)
    assert look(control) == ""
    control.set_limits({"on_battery": False})
    assert "battery" in look(control)
    battery[0] = False
    control.set_limits({"when_idle": True})
    assert "other programs" in look(control)
    busy[0] = 5.0
    control.set_limits({"hours": "22:00-08:00"})
    assert "22:00-08:00" in look(control)
    clock.set("2026-11-24 23:00")
    assert look(control) == ""


def test_too_much_memory_ends_the_worker(tmp_path: Path) -> None:
    """Memory cannot be given back by waiting: the worker leaves, and says why."""
    control, reasons = Control(tmp_path, Machine(memory_gb=lambda: 9.0)), list[str]()
    control.stop_worker = reasons.append
    control.set_limits({"memory_gb": 8.0})
    assert look(control) and "8 GB is your limit" in reasons[0]


def test_a_damaged_traffic_file_counts_from_zero(tmp_path: Path) -> None:
    """The count is for the user's own good; a broken file must not stop the worker."""
    (tmp_path / "traffic.json").write_text("[1")
    budget = TrafficBudget(tmp_path / "traffic.json")
    budget.count(5)
    assert budget.today_bytes == budget.month_bytes == 5
