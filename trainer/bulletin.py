"""A worker's bulletin: what those who watch a run want to know beyond the heartbeats, written once a round at most.

Heartbeats are read by everybody several times a second, so they stay small. The bulletin is a record of its own, which
only observers read. It holds the last few rounds, so that one who looks seldom misses none.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

TOPIC = "bulletin"
SAMPLE_TOPIC = "sample"
KEPT = 4  # rounds, evaluations and events
MAX_REASONS, MAX_REASON = 48, 32  # why others are refused, and characters of one reason
MAX_TEXT = 160  # characters of an event
MAX_SAMPLE_TEXT = 600
MAX_BULLETIN_BYTES = 8192
_MAX_COUNT = 2**53  # what JSON's readers hold exactly


@dataclass(frozen=True)
class RoundLine:
    """One round as its worker saw it; the four times are the lanes of a timeline."""

    round: int  # the number of rounds completed with it
    compute_s: float  # inner steps
    wait_s: float  # until the group had met
    exchange_s: float  # from the group's meeting until the last aggregate was there
    apply_s: float  # outer step
    group: int  # contributors of the round
    included: bool  # whether this worker is one of them
    loss: float  # mean training loss of its inner steps, in nats per token
    tokens: int  # its own, in this round

    @property
    def tokens_per_s(self) -> float:
        """Its own tokens over the whole round, waits included."""
        passed_s = self.compute_s + self.wait_s + self.exchange_s + self.apply_s
        return self.tokens / passed_s if passed_s > 0 else 0.0


@dataclass(frozen=True)
class EvalLine:
    """The evaluation loss of theta after a round, in nats per token."""

    round: int
    loss: float


@dataclass(frozen=True)
class EventLine:
    """Something out of the ordinary that happened to this worker."""

    at: float  # Unix seconds
    kind: str  # "problem" or "resync"
    text: str


@dataclass(frozen=True)
class Sample:
    """Text that theta of a round wrote."""

    round: int
    prompt: str
    text: str

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Bulletin:
    """Collects what is to be told; `pack` gives the record."""

    def __init__(self) -> None:
        self.rounds: deque[RoundLine] = deque(maxlen=KEPT)
        self.evals: deque[EvalLine] = deque(maxlen=KEPT)
        self.events: deque[EventLine] = deque(maxlen=KEPT)
        self.contributions = 0  # rounds that this worker is in, since it was started
        self.refused: Mapping[str, int] = {}  # how often it has refused others, by reason, since then

    def event(self, at: float, kind: str, text: str) -> None:
        """Note an event of that moment (Unix seconds)."""
        self.events.append(EventLine(round(at, 1), kind, text[:MAX_TEXT]))

    def pack(self, since: float, traffic: tuple[int, int]) -> bytes:
        """The record's bytes. `since`: Unix seconds of the worker's start; `traffic`: bytes (up, down) since then."""
        entry = {
            "since": round(since),
            "contributions": self.contributions,
            "up": traffic[0],
            "down": traffic[1],
            "rounds": [_rounded(line) for line in self.rounds],
            "evals": [_rounded(line) for line in self.evals],
            "events": [_rounded(line) for line in self.events],
            "refused": _commonest(self.refused),
        }
        return json.dumps(entry, separators=(",", ":")).encode()


@dataclass(frozen=True)
class BulletinView:
    """Another worker's bulletin, checked."""

    since: float
    contributions: int
    up: int
    down: int
    rounds: tuple[RoundLine, ...]
    evals: tuple[EvalLine, ...]
    events: tuple[EventLine, ...]
    refused: Mapping[str, int]


def unpack_bulletin(blob: object) -> BulletinView | None:
    """Read a bulletin from the network; None unless it fits the schema."""
    entry = _load(blob)
    if entry is None:
        return None
    try:
        return BulletinView(
            **{name: _value(int, entry[name]) for name in ("contributions", "up", "down")},
            since=_value(float, entry["since"]),
            rounds=_lines(RoundLine, entry["rounds"]),
            evals=_lines(EvalLine, entry["evals"]),
            events=_lines(EventLine, entry["events"]),
            refused=_counts(entry.get("refused", {})),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def unpack_sample(blob: object) -> Sample | None:
    """Read a sample from the network; None unless it fits the schema."""
    entry = _load(blob)
    try:
        return None if entry is None else _line(Sample, [entry[field.name] for field in fields(Sample)])
    except (KeyError, TypeError, ValueError):
        return None


def _load(blob: object) -> Mapping[str, Any] | None:
    if not isinstance(blob, bytes) or len(blob) > MAX_BULLETIN_BYTES:
        return None
    try:
        entry = json.loads(blob)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _rounded(line: Any) -> list[Any]:
    """A line's values without its keys; floats with three to four digits, NaN as null."""
    values = [getattr(line, field.name) for field in fields(line)]
    return [_short(value) if isinstance(value, float) else value for value in values]


def _short(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _commonest(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_REASONS])


def _counts(values: Any) -> dict[str, int]:
    if not isinstance(values, dict) or len(values) > MAX_REASONS:
        raise ValueError
    if any(len(reason) > MAX_REASON for reason in values):
        raise ValueError
    return {reason: _value(int, count) for reason, count in values.items()}


def _lines(kind: Any, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or len(values) > KEPT:
        raise ValueError
    return tuple(_line(kind, value) for value in values)


def _line(kind: Any, values: Any) -> Any:
    wanted = {"int": int, "float": float, "str": str, "bool": bool}
    if not isinstance(values, list) or len(values) != len(fields(kind)):
        raise ValueError
    return kind(*(_value(wanted[str(field.type)], value) for field, value in zip(fields(kind), values)))


def _value(kind: type, value: Any) -> Any:
    """The value as `kind`; null stands for a float that is not finite. Raises ValueError if it is none."""
    if kind is float and value is None:
        return math.nan
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError
    if isinstance(value, (int, float)) and not 0 <= value <= _MAX_COUNT:
        raise ValueError
    if isinstance(value, str) and len(value) > MAX_SAMPLE_TEXT:
        raise ValueError
    return value
