"""What the dashboard shows of a run: the snapshot that the page, the API and the metrics are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class About:
    """What does not change while a run lasts."""

    run_id: str
    manifest_hash: str = ""  # hex
    preset: str = ""
    num_params: int = 0
    data: str = ""
    strategy: str = ""
    inner_steps: int = 0
    round_tokens: int = 0  # 0 = rounds of a fixed number of inner steps
    tokens_per_step: int = 0  # of one worker
    target_rounds: int = 0
    heartbeat_ttl_s: float = 10.0


@dataclass(frozen=True)
class WorkerRow:
    """A worker that is there, or was a moment ago."""

    id: str  # peer id
    name: str
    device: str
    state: str  # what it says, or "gone"
    reach: str  # direct, relayed or client; "" = it does not say
    round: int  # rounds completed
    lag: int  # rounds behind the foremost
    loss: float  # of its last inner steps, nats per token
    tokens: int  # trained by it, all its life
    tokens_per_s: float
    share: float  # of all workers' tokens per second, 0 to 1
    up_bytes: int  # since it was started
    down_bytes: int
    contributions: int  # rounds that it is in
    round_share: float  # inner steps' part of its time, 0 to 1
    digest: str  # first characters of theta's
    age_s: float  # of its last heartbeat
    mine: bool  # runs on this machine
    refused: Mapping[str, int] = field(
        default_factory=dict
    )  # others and what they sent, by reason, since its start


@dataclass(frozen=True)
class Lane:
    """One worker's part of a round, in seconds."""

    id: str
    name: str
    compute_s: float
    wait_s: float
    exchange_s: float
    apply_s: float
    included: bool


@dataclass(frozen=True)
class RoundLanes:
    """The timeline of one round."""

    round: int
    lanes: list[Lane]


@dataclass(frozen=True)
class Contributor:
    """A line of the contributors' board: everybody who ever was in this run, as far as this dashboard saw."""

    id: str
    name: str
    tokens: int
    contributions: int
    first_seen: float  # Unix seconds
    live: bool
    mine: bool


@dataclass(frozen=True)
class EventRow:
    """Something that happened."""

    id: int
    at: float
    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by all workers since this dashboard began to count, and what an fp32 ring all-reduce at each of the
    same inner steps would have sent."""

    up_bytes: int = 0
    down_bytes: int = 0
    counted_up_bytes: int = 0
    allreduce_bytes: float = 0.0
    ratio: float | None = None


@dataclass(frozen=True)
class SampleRow:
    """Text that theta wrote."""

    round: int
    at: float
    name: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Health:
    """The run in one line."""

    level: str  # good, warning, bad, empty
    text: str
    round: int = 0
    phase: str = ""
    workers: int = 0
    contributors: int = 0  # of the last round
    last_round_at: float = 0.0  # Unix seconds; 0 = none seen
    last_exchange_s: float = 0.0  # the slowest worker's, meeting included
    round_s: float = 0.0  # median of the last rounds
    digests: str = ""  # agree, differ, or "" while nobody can compare


@dataclass(frozen=True)
class Snapshot:
    """Everything that the run page shows but the curves."""

    at: float  # Unix seconds
    about: About
    health: Health
    connection: str  # one line when the observer's own connection is in trouble, else ""
    eval_loss: tuple[int, float] | None = None  # (round, nats per token)
    train_loss: tuple[int, float] | None = None
    tokens: int = 0  # in theta's history
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    sample: SampleRow | None = None
    workers: list[WorkerRow] = field(default_factory=list)
    rounds: list[RoundLanes] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    board: list[Contributor] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
