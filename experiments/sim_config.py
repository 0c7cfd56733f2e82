"""The sections that only simulations have: the virtual swarm, its network, its machines, its churn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dtrain.experiments.attacks import ATTACKS
from dtrain.experiments.network import PROFILES, Link, profile_links
from dtrain.trainer.config import require, settle_types

MAX_WORKERS = 1024
DATA_SPREADS = ("shared", "split")
SIMULATED_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class SimulateConfig:
    """The swarm and how long it trains."""

    SECTION: ClassVar[str] = "simulate"

    workers: int = 4
    """Virtual workers that begin the run."""
    steps: int = 300
    """Inner steps of each worker in all; rounds = steps / train.inner_steps."""
    eval_every_steps: int = 30
    """Inner steps between two evaluations of theta, rounded to whole rounds; the last round has one in any case."""
    seeds: int = 1
    """Each run is repeated with train.seed = 0, 1, ... (`--seeds`)."""
    target_loss: float = 0.0
    """The summary tells when each run's evaluation loss first fell to this, in nats per token (0 = none)."""
    data: str = "shared"
    """"shared": all draw from the whole text. "split": worker i of n trains on the i-th n-th of it alone."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        for name in ("workers", "steps", "eval_every_steps", "seeds"):
            require(getattr(self, name) >= 1, f"simulate.{name}", "be at least 1", getattr(self, name))
        require(0 <= self.target_loss < 100, "simulate.target_loss", "be from 0 to 100", self.target_loss)
        require(self.workers <= MAX_WORKERS, "simulate.workers", f"be at most {MAX_WORKERS}", self.workers)
        require(self.data in DATA_SPREADS, "simulate.data", f"be one of {', '.join(DATA_SPREADS)}", self.data)


@dataclass(frozen=True)
class NetworkConfig:
    """The workers' connections: a profile of `network.PROFILES`, and figures that replace its own (0 = as there)."""

    SECTION: ClassVar[str] = "network"

    profile: str = "cable"
    """datacenter, fibre, cable, dsl, mobile, or mixed: the last four dealt out in turn."""
    up_mbps: float = 0.0
    """Megabits per second from a worker."""
    down_mbps: float = 0.0
    """Megabits per second to a worker."""
    rtt_ms: float = 0.0
    """Round trip between two workers, in milliseconds."""
    loss: float = 0.0
    """Share of packets that are lost."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        choices = ", ".join(PROFILES)
        require(self.profile in PROFILES, "network.profile", f"be one of {choices}", self.profile)
        assert self.links

    @property
    def links(self) -> tuple[Link, ...]:
        """Dealt out to the workers in turn."""
        given = {name: getattr(self, name) for name in ("up_mbps", "down_mbps", "rtt_ms", "loss")}
        return profile_links(self.profile, {name: value for name, value in given.items() if value})


@dataclass(frozen=True)
class MachinesConfig:
    """How fast the workers train."""

    SECTION: ClassVar[str] = "machines"

    step_time_s: float = 0.1
    """Virtual seconds per inner step on a machine of speed 1."""
    speeds: tuple[float, ...] = (1.0,)
    """Relative speeds, dealt out to the workers in turn."""
    precision: str = "fp32"
    """Of their matrix products: fp32, or bf16, which takes less of this machine's time if it has units for it."""

    def __post_init__(self) -> None:
        choices = ", ".join(SIMULATED_PRECISIONS)
        require(
            self.precision in SIMULATED_PRECISIONS,
            "machines.precision",
            f"be one of {choices}",
            self.precision,
        )
        value, speeds = self.step_time_s, self.speeds
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number and 0 < value < 1e5, "machines.step_time_s", "be a number of seconds above 0", value)
        rule = "be a list of numbers above 0, such as [1, 2, 4]"
        require(isinstance(speeds, (list, tuple)) and len(speeds) > 0, "machines.speeds", rule, speeds)
        fine = all(isinstance(s, (int, float)) and not isinstance(s, bool) and 0 < s < 1e5 for s in speeds)
        require(fine, "machines.speeds", rule, speeds)
        object.__setattr__(self, "speeds", tuple(float(speed) for speed in speeds))


@dataclass(frozen=True)
class ChurnConfig:
    """Workers that come and go, as Poisson processes in virtual time. The first worker stays: it evaluates."""

    SECTION: ClassVar[str] = "churn"

    joins_per_hour: float = 0.0
    """Newcomers per hour."""
    leaves_per_hour: float = 0.0
    """How often per hour each worker leaves for good."""
    crash_share: float = 0.5
    """Share of those who leave that die without a word; the others say goodbye."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        for name in ("joins_per_hour", "leaves_per_hour"):
            require(getattr(self, name) >= 0, f"churn.{name}", "be at least 0", getattr(self, name))
        require(0 <= self.crash_share <= 1, "churn.crash_share", "be between 0 and 1", self.crash_share)


@dataclass(frozen=True)
class AttackConfig:
    """Hostile workers among those that begin the run: the last ones."""

    SECTION: ClassVar[str] = "attack"

    kind: str = ""
    """What they do: one of `attacks.ATTACKS`."""
    attackers: int = 0
    """How many they are."""
    audits: bool = False
    """Whether members audit each other's sums, as real ones always do, where exchange.screens is on: it costs the
    simulation time.
    """

    one_network: bool = False
    """Whether they are all in one network, where everybody else has one of its own."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        choices = ", ".join(ATTACKS)
        require(self.kind in ("", *ATTACKS), "attack.kind", f"be one of {choices}", self.kind)
        require(self.attackers >= 0, "attack.attackers", "be at least 0", self.attackers)
        rule = "be above 0 with an attack.kind, and 0 without"
        require((self.attackers > 0) == bool(self.kind), "attack.attackers", rule, self.attackers)


OWN_SECTIONS: dict[str, type[Any]] = {
    kind.SECTION: kind for kind in (SimulateConfig, NetworkConfig, MachinesConfig, ChurnConfig, AttackConfig)
}
