"""What the demo's run came to: figures from the workers' metrics, as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from dtrain.experiments.demo_cast import FINISHED, Member
from dtrain.experiments.demo_watch import SwarmView


@dataclass(frozen=True)
class WorkerResult:
    """One worker at the end."""

    name: str
    device: str
    state: str
    """How it ended: finished, left, killed or failed."""
    joined_round: int | None
    """First round that it contributed to, counted from 1; null if none."""
    left_round: int | None
    """Last round that it contributed to, if it did not stay to the end."""
    tokens: int
    """Tokens that it trained on."""
    bytes_up: int
    bytes_down: int
    digest: str
    """Hash of theta as it last had it."""
    peer_id: str
    joined_from: str
    """Where theta came from: fresh (the run's seed) or peers."""
    first_step_s: float | None
    """Seconds from the command to its first inner step."""
    first_contribution_s: float | None


@dataclass(frozen=True)
class Result:
    """The demo's figures. `to_dict` is what --json writes."""

    rounds: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    digests_equal: bool
    """Of every worker that is there at the end, and in every round of all that completed it."""
    contributors_per_round: list[int]
    ratio_vs_fp32_allreduce: float | None
    """Bytes that fp32 ring all-reduces at each of the same inner steps would have sent, over the bytes sent."""
    workers: list[WorkerResult]
    contributors: list[list[str]]
    """Names of the workers in each round."""
    num_params: int
    inner_steps: int
    longest_wait_s: float
    """The longest that any worker waited for a round's others."""
    round_timeout_s: float
    seconds: float

    @property
    def ok(self) -> bool:
        """The loss fell, and all hold the same theta."""
        before, after = self.eval_loss_before, self.eval_loss_after
        return before is not None and after is not None and after < before and self.digests_equal

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def summarize(members: Sequence[Member], *, round_timeout_s: float, seconds: float) -> Result:
    """Figures of a run that is over."""
    swarm = SwarmView([member.view for member in members])
    rounds = swarm.rounds_done
    contributors = [list(swarm.contributors(number)) for number in range(1, rounds + 1)]
    evaluations = swarm.evaluations()
    after = max(evaluations, default=0)
    present = [member.view for member in members if member.fate == FINISHED]
    one_theta = len({(view.last_round, view.last_digest) for view in present}) == 1
    waits = [done.waited_s for view in swarm.workers for done in view.rounds.values()]
    return Result(
        rounds=rounds,
        eval_loss_before=evaluations.get(0),
        eval_loss_after=evaluations[after] if after else None,
        digests_equal=one_theta and all(len(swarm.digests(n)) == 1 for n in range(1, rounds + 1)),
        contributors_per_round=[len(names) for names in contributors],
        ratio_vs_fp32_allreduce=swarm.ratio(),
        workers=[_worker(member, contributors) for member in members],
        contributors=contributors,
        num_params=max((view.num_params for view in swarm.workers), default=0),
        inner_steps=max((view.inner_steps for view in swarm.workers), default=0),
        longest_wait_s=round(max(waits, default=0.0), 3),
        round_timeout_s=round_timeout_s,
        seconds=round(seconds, 1),
    )


def _worker(member: Member, contributors: list[list[str]]) -> WorkerResult:
    view = member.view
    own = [number for number, names in enumerate(contributors, 1) if view.name in names]
    stayed = member.fate == FINISHED
    return WorkerResult(
        name=view.name,
        device=view.device,
        state=member.fate,
        joined_round=own[0] if own else None,
        left_round=own[-1] if own and not stayed else None,
        tokens=view.tokens,
        bytes_up=view.bytes_up,
        bytes_down=view.bytes_down,
        digest=view.last_digest,
        peer_id=view.peer_id,
        joined_from=view.joined_from,
        first_step_s=view.first_step_s,
        first_contribution_s=view.first_contribution_s,
    )


def print_result(result: Result, console: Console) -> None:
    """The summary, for a terminal of 80 columns."""
    table = Table(title=f"{result.rounds} rounds in {result.seconds:.0f} s", title_justify="left")
    for heading in ("worker", "fate"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rounds", "tokens", "MB up", "MB down"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    for worker in result.workers:
        last = worker.left_round or result.rounds
        table.add_row(
            worker.name,
            worker.state,
            f"{worker.joined_round}-{last}" if worker.joined_round else "none",
            f"{worker.tokens:,}",
            f"{worker.bytes_up / 1e6:.2f}",
            f"{worker.bytes_down / 1e6:.2f}",
            worker.digest[:12],
        )
    console.print(table)
    for label, text in _lines(result):
        console.print(f"[bold]{label:<22}[/bold] {text}", highlight=False)


def _lines(result: Result) -> list[tuple[str, str]]:
    lines = [
        ("evaluation loss", f"{_loss(result.eval_loss_before)} -> {_loss(result.eval_loss_after)}"),
        ("contributors per round", " ".join(map(str, result.contributors_per_round))),
        ("longest wait", f"{result.longest_wait_s:.1f} s (round timeout {result.round_timeout_s:.0f} s)"),
    ]
    if result.ratio_vs_fp32_allreduce is not None:
        lines.append(
            ("bytes sent", f"{result.ratio_vs_fp32_allreduce:.0f}x less than an fp32 ring all-reduce")
        )
        lines.append(("", f"at each of the same inner steps ({result.inner_steps} a round)"))
    same = "all equal" if result.digests_equal else "[red]NOT EQUAL[/red]"
    lines.append(("digests", f"{same}, in every round and at the end"))
    return lines


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
