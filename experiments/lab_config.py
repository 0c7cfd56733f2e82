"""What a scenario file of `dtrain lab` may hold: its sections, each with what its settings mean."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from dtrain.experiments.lab_wire import HomeLink
from dtrain.trainer.config import require, settle_types

MAX_WORKERS = 64
KINDS = {
    "kill": "power cut: every process of the worker is ended by SIGKILL; with seconds it is started again after them",
    "leave": "Ctrl-C; with seconds it is started again after them",
    "join": "a worker that is marked as late is started",
    "freeze": "SIGSTOP to every process of the worker for seconds, as a closed laptop is",
    "cut": "its cable is pulled for seconds",
    "partition": "sides do not reach each other for seconds",
    "move": "its address changes",
    "fill": "its disk is filled for seconds (it needs disk_mb)",
    "bootstrap-dies": "power cut at the bootstrap peer, for good",
}
"""What can happen."""
SPLITTING = ("partition", "cut", "freeze", "move")
"""What may leave workers without the others, so that two histories form for a while."""
FIGURES = (
    "failed_rounds",
    "contributors_mean",
    "compute_share_mean",
    "loss_over_clean",
    "round_s_median",
    "round_time_over_clean",
    "round_time_over_plan",
    "exchange_time_over_plan",
    "recovery_s_max",
    "recovery_rounds_max",
    "rounds_to_contribute_max",
    "discarded_rounds",
    "unrecovered",
    "memory_growth",
    "file_growth",
)
"""Figures of the summary that a bar can be for."""
CLEANS = ("simulated", "measured", "none")


@dataclass(frozen=True)
class LabConfig:
    """[lab]: the swarm and how long it trains."""

    SECTION: ClassVar[str] = "lab"

    workers: int = 8
    """Workers of the swarm, worker-1 and so on; worker-1 begins the run."""
    rounds: int = 20
    """Rounds to train; 0 = for `duration_s`."""
    duration_s: float = 600.0
    """Without rounds: how long, from the first round's beginning."""
    seed: int = 0
    """Of the model, the data, the schedule and the losses of packets."""
    tokens_per_s: float = 0.0
    """Each worker trains as fast as a machine that does so many; 0 = as fast as it can."""
    start_every_s: float = 3.0
    """Time between two workers' starts, so that the machine carries them."""
    checkpoint_every: int = 5
    """Rounds between two checkpoints."""
    bootstrap: bool = False
    """A peer that trains nothing (`dtrain bootstrap`) begins, and all join through it."""
    may_fork: bool = False
    """What happens may make two histories for a while, though nothing splits the network (as when everybody dies)."""
    stall_s: float = 120.0
    """So long without a new round is a deadlock: the scenario has failed."""
    timeout_s: float = 1800.0
    """However it goes, it ends then, and has failed."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        require(1 <= self.workers <= MAX_WORKERS, "lab.workers", f"be 1 to {MAX_WORKERS}", self.workers)
        for name in ("rounds", "seed", "tokens_per_s", "start_every_s", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"lab.{name}", "be at least 0", getattr(self, name))
        for name in ("duration_s", "stall_s", "timeout_s"):
            require(getattr(self, name) > 0, f"lab.{name}", "be above 0 seconds", getattr(self, name))


@dataclass(frozen=True)
class ChurnConfig:
    """[churn]: workers fail at random and come back."""

    SECTION: ClassVar[str] = "churn"

    mtbf_s: float = 0.0
    """Mean seconds between two failures in the swarm (a Poisson process); 0 = no churn."""
    down_s: float = 10.0
    """Mean seconds until a failed worker is started again."""
    kill_share: float = 0.7
    """Share of failures that are power cuts; the others leave."""
    back_s: float = 60.0
    """How long a worker that is started again is left in peace."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        for item in fields(self):
            require(
                getattr(self, item.name) >= 0, f"churn.{item.name}", "be at least 0", getattr(self, item.name)
            )


@dataclass(frozen=True)
class Place:
    """One worker's circumstances; [[places]] sets them for some workers."""

    link: HomeLink = field(default_factory=HomeLink)
    nat: bool = False
    """Behind a router that masquerades and lets nothing in."""
    skew_s: float = 0.0
    """How far its clock is ahead."""
    disk_mb: float = 0.0
    """Size of the disk that its folder is on, in megabytes; 0 = this machine's."""
    late: bool = False
    """It is started by a join event only."""


@dataclass(frozen=True)
class EventRule:
    """[[events]]: something that happens once, or every so many rounds."""

    kind: str
    """One of KINDS."""
    workers: tuple[int, ...] = ()
    """To whom, each at once; none named: to one that the seed chooses."""
    round: int = 0
    """When so many rounds are done."""
    at_s: float = -1.0
    """Or so many seconds after the first round's beginning."""
    every_rounds: int = 0
    """Again and again, after so many rounds more,"""
    until_round: int = 0
    """up to this one."""
    seconds: float = 0.0
    """How long it lasts; see KINDS."""
    sides: tuple[tuple[int, ...], ...] = ()
    """Of a partition: workers by side."""
