"""What a worker may take of its machine: the user's limits, how they are typed, and where they are kept."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, time
from pathlib import Path

from dtrain.trainer.errors import UsageError

NONE = ("none", "off", "")
_MEGA = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_GIGA = {"mb": 1e-3, "gb": 1.0, "tb": 1e3}


@dataclass(frozen=True)
class Limits:
    """One worker's limits; 0 and "" mean no limit."""

    up_mbps: float = 0.0
    """Megabit per second that leave this machine."""
    down_mbps: float = 0.0
    """Megabit per second that come in."""
    compute_percent: float = 100.0
    """Share of the time in which this machine computes."""
    threads: int = 0
    """CPU threads of training; 0 = as the command said."""
    memory_gb: float = 0.0
    """Memory of the worker's processes together; one that needs more leaves the run."""
    hours: str = ""
    """Local times between which the worker trains, such as "22:00-08:00"."""
    daily_gb: float = 0.0
    """Traffic up and down per calendar day."""
    monthly_gb: float = 0.0
    """Traffic up and down per calendar month."""
    on_battery: bool = True
    """Whether to train while the machine runs on battery."""
    when_idle: bool = False
    """Whether to train only while other programs leave the machine idle."""

    def __post_init__(self) -> None:
        for name in ("up_mbps", "down_mbps", "threads", "memory_gb", "daily_gb", "monthly_gb"):
            if not 0 <= getattr(self, name) < 1e9:
                raise UsageError(f"the limit {name} must be 0 (none) or above, not {getattr(self, name)}")
        if not 1 <= self.compute_percent <= 100:
            raise UsageError(f"the share of computing time must be 1% to 100%, not {self.compute_percent:g}%")
        if self.hours:
            parse_hours(self.hours)

    @property
    def bounds_traffic(self) -> bool:
        return any((self.up_mbps, self.down_mbps, self.daily_gb, self.monthly_gb))

    def may_train_at(self, moment: datetime) -> bool:
        """Whether `moment` (local time) is within the hours."""
        if not self.hours:
            return True
        begin, end = parse_hours(self.hours)
        now = moment.time()
        return begin <= now < end if begin < end else now >= begin or now < end

    def describe(self) -> str:
        """The limits that are set, in one line; "none" if there are none."""
        said = [
            f"up {self.up_mbps:g} Mbit/s" if self.up_mbps else "",
            f"down {self.down_mbps:g} Mbit/s" if self.down_mbps else "",
            f"computing {self.compute_percent:g} % of the time" if self.compute_percent < 100 else "",
            f"{self.threads} threads" if self.threads else "",
            f"memory {self.memory_gb:g} GB" if self.memory_gb else "",
            f"hours {self.hours}" if self.hours else "",
            f"{self.daily_gb:g} GB a day" if self.daily_gb else "",
            f"{self.monthly_gb:g} GB a month" if self.monthly_gb else "",
            "" if self.on_battery else "not on battery",
            "only when idle" if self.when_idle else "",
        ]
        return ", ".join(filter(None, said)) or "none"


def load(path: Path) -> Limits:
    """The limits kept in `path`; none if there is no such file. UsageError if it is damaged."""
    try:
        return Limits(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Limits()
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{path} holds no limits: remove it, and set them again with dtrain limit") from None


def save(limits: Limits, path: Path) -> None:
    """Keep the limits for the next start."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(limits), indent=2) + "\n")
    os.replace(draft, path)


def changed(limits: Limits, changes: dict[str, object]) -> Limits:
    """The limits with some replaced. UsageError for a value that cannot be."""
    known = {field.name for field in fields(Limits)}
    assert changes.keys() <= known
    return replace(limits, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- as typed


def parse_rate(text: str) -> float:
    """ "5mbit", "500kbit" or "none" in megabit per second."""
    return _with_unit(text, _MEGA, "a rate such as 5mbit, 500kbit or none")


def parse_size(text: str) -> float:
    """ "8GB", "500MB" or "none" in gigabytes."""
    return _with_unit(text, _GIGA, "a size such as 8GB, 500MB or none")


def parse_percent(text: str) -> float:
    """ "50%" or "none" (100)."""
    if text.lower() in NONE:
        return 100.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text)
    if match is None or not 1 <= float(match[1]) <= 100:
        raise UsageError(f"{text[:40]!r} will not do: type a share such as 50%, or none")
    return float(match[1])


def parse_count(text: str) -> int:
    """ "4" or "none" (0)."""
    if text.lower() in NONE:
        return 0
    if re.fullmatch(r"\d{1,4}", text) is None:
        raise UsageError(f"{text[:40]!r} will not do: type a number such as 4, or none")
    return int(text)


def parse_yes(text: str) -> bool:
    """ "yes" or "no"."""
    if text.lower() in ("yes", "on", "true"):
        return True
    if text.lower() in ("no", "off", "false"):
        return False
    raise UsageError(f"{text[:40]!r} will not do: type yes or no")


def parse_hours(text: str) -> tuple[time, time]:
    """(begin, end) of "22:00-08:00"."""
    match = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)", text)
    if match is None or match.group(1, 2) == match.group(3, 4):
        raise UsageError(f"{text[:40]!r} will not do: type hours such as 22:00-08:00, or none")
    return time(int(match[1]), int(match[2])), time(int(match[3]), int(match[4]))


def typed_hours(text: str) -> str:
    """Hours as they are kept; "none" becomes ""."""
    if text.lower() in NONE:
        return ""
    begin, end = parse_hours(text)
    return f"{begin:%H:%M}-{end:%H:%M}"


def _with_unit(text: str, units: dict[str, float], what: str) -> float:
    if text.lower() in NONE:
        return 0.0
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([a-z]+)", text.lower())
    if match is None or match[2] not in units or float(match[1]) == 0:
        raise UsageError(f"{text[:40]!r} will not do: type {what}")
    return float(match[1]) * units[match[2]]


Parser = Callable[[str], object]

FLAGS: dict[str, tuple[str, Parser, str, str]] = {
    "--up": ("up_mbps", parse_rate, "RATE", "upload no faster, e.g. 5mbit"),
    "--down": ("down_mbps", parse_rate, "RATE", "download no faster, e.g. 50mbit"),
    "--gpu": (
        "compute_percent",
        parse_percent,
        "SHARE",
        "compute so much of the time (GPU or CPU), e.g. 50%%",
    ),
    "--threads": ("threads", parse_count, "N", "CPU threads for training"),
    "--memory": ("memory_gb", parse_size, "SIZE", "leave the run rather than use more, e.g. 8GB"),
    "--hours": ("hours", typed_hours, "FROM-TO", "train only then (local time), e.g. 22:00-08:00"),
    "--daily": ("daily_gb", parse_size, "SIZE", "traffic per day, e.g. 5GB"),
    "--monthly": ("monthly_gb", parse_size, "SIZE", "traffic per month, e.g. 200GB"),
    "--on-battery": ("on_battery", parse_yes, "YES", "train on battery too: yes or no"),
    "--when-idle": ("when_idle", parse_yes, "YES", "train only while other programs are idle: yes or no"),
}
"""Flag -> (field of Limits, how its text is read, metavar, help). "none" lifts a limit."""
