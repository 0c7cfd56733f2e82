"""How a round ended for this worker, and what others last said: as the network process tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """See `dtrain.trainer.exchange.Outcome`."""

    verdict: str
    round: int
    base_digest: bytes = b""
    members: tuple[str, ...] = ()
    contributors: tuple[str, ...] = ()
    aggregates: tuple[bytes, ...] = ()
    undelivered: tuple[tuple[int, int], ...] = ()
    problem: str = ""
    wait_s: float = 0.0
    exchange_s: float = 0.0


@dataclass(frozen=True)
class PeerView:
    """See `dtrain.trainer.exchange.PeerView`."""

    peer_id: str
    status: Mapping[str, Any]
    age_s: float
    is_believed: bool = True


def outcome_of(round: int, answer: Mapping[str, Any]) -> Outcome:
    """The network process's answer to `run_round` or `fetch_round`."""
    fields = {key: value for key, value in answer.items() if key not in ("spans", "undelivered")}
    for key in ("members", "contributors", "aggregates"):
        fields[key] = tuple(fields.get(key, ()))
    undelivered = tuple((first, count) for first, count in answer.get("undelivered", ()))
    return Outcome(**{"round": round, **fields, "undelivered": undelivered})
