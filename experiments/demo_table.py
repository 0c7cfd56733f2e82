"""The demo while it runs: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dtrain.experiments.demo_cast import ALIVE, FAILED, KILLED, Member
from dtrain.experiments.demo_watch import SwarmView

NEWS_SHOWN = 6
COLORS = {
    "training": "green",
    "exchanging": "cyan",
    "waiting": "yellow",
    "joining": "yellow",
    KILLED: "red",
    FAILED: "bold red",
}


class Stage:
    """Shows the swarm on a console; use as a context manager. `tell` adds a line of news."""

    def __init__(self, console: Console, rounds: int):
        self._console, self._rounds = console, rounds
        self._began = time.monotonic()
        self._news: list[str] = []
        self._rounds_told, self._evaluation_told = 0, -1
        # No refresh thread: the demo's loop draws, so a process is never forked beside a running thread.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Stage:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Something happened that the user should notice."""
        line = f"{time.monotonic() - self._began:4.0f} s  {line}"
        self._news.append(line)
        if self._live is None:
            self._console.print(line, highlight=False, markup=False)

    def show(self, members: Sequence[Member]) -> None:
        """Draw the present state, or say that another round is done."""
        swarm = SwarmView([member.view for member in members])
        if self._live is not None:
            news = Text("\n".join(self._news[-NEWS_SHOWN:]), style="dim")
            line = self._swarm_line(swarm, _ends_in_s(members))
            self._live.update(Group(table(members), line, news), refresh=True)
            return
        while self._rounds_told < swarm.rounds_done:
            self._rounds_told += 1
            self.tell(_round_line(swarm, self._rounds_told, self._rounds))
        for number, loss in swarm.evaluations().items():
            if number > self._evaluation_told:
                self._evaluation_told = number
                self.tell(f"evaluation loss {loss:.3f} after round {number}")

    def _swarm_line(self, swarm: SwarmView, ends_in_s: float) -> Text:
        parts = [f"round {swarm.rounds_done}/{self._rounds}, next in {ends_in_s:.0f} s"]
        loss, evaluations, ratio = swarm.loss(swarm.rounds_done), swarm.evaluations(), swarm.ratio()
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if evaluations:
            number, value = list(evaluations.items())[-1]
            parts.append(f"evaluation loss {value:.3f} (round {number})")
        if ratio:
            parts.append(f"{ratio:.0f}x less sent")
        return Text(", ".join(parts), style="bold")


def _ends_in_s(members: Sequence[Member]) -> float:
    """Predicted time to the end of the round's inner steps, by the last worker to end them."""
    at_work = [m.view.round_ends_in_s for m in members if m.running and m.view.state == "training"]
    return max(at_work, default=0.0)


def _round_line(swarm: SwarmView, number: int, rounds: int) -> str:
    loss, names = swarm.loss(number), swarm.contributors(number)
    workers = " ".join(name.removeprefix("worker-") for name in names)
    text = f"round {number}/{rounds}: workers {workers}"
    return text if loss is None else f"{text}, loss {loss:.3f}"


def table(members: Sequence[Member]) -> RenderableType:
    """One row per worker; fits 80 columns."""
    drawn = Table(expand=False)
    drawn.add_column("worker", no_wrap=True)
    drawn.add_column("state", no_wrap=True, min_width=10)
    for heading in ("round", "step", "tokens/s", "loss", "MB up", "MB down"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for member in members:
        view, state = member.view, state_of(member)
        at_work = member.running and view.inner_steps > 0
        drawn.add_row(
            member.name,
            Text(state, style=COLORS.get(state, "dim")),
            str(view.last_round + 1 if at_work else view.last_round) if view.inner_steps else "",
            f"{view.step}/{view.inner_steps}" if at_work else "",
            f"{view.tokens_per_s:,.0f}" if at_work else "",
            f"{view.loss:.3f}" if view.loss is not None else "",
            f"{view.bytes_up / 1e6:.2f}" if view.bytes_up else "",
            f"{view.bytes_down / 1e6:.2f}" if view.bytes_down else "",
        )
    return drawn


def state_of(member: Member) -> str:
    """What the table says of a worker: its fate once it has one, until then what it does."""
    if member.process is None:
        return "comes later" if member.late else "not started"
    return member.view.state if member.fate == ALIVE else member.fate
