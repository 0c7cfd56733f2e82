"""A scenario while it runs: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dtrain.experiments.demo_table import COLORS
from dtrain.experiments.demo_watch import SwarmView
from dtrain.experiments.lab_swarm import LabSwarm, LabWorker

NEWS_SHOWN = 10
DOWN, FROZEN = "down", "frozen"


class LabTable:
    """Shows the swarm on a console; use as a context manager. `tell` adds a line of news."""

    def __init__(self, console: Console, swarm: LabSwarm):
        self._console, self._swarm = console, swarm
        self._began, self._news, self._told = time.monotonic(), list[str](), 0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LabTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Something happened."""
        line = f"{time.monotonic() - self._began:4.0f} s  {line}"
        self._news.append(line)
        if self._live is None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self) -> None:
        """Draw the present state, or say that another round is done."""
        view = SwarmView([worker.view for worker in self._swarm.workers.values()])
        while self._told < view.rounds_done:
            self._told += 1
            names = view.contributors(self._told)
            loss = view.loss(self._told)
            numbers = " ".join(name.removeprefix("worker-") for name in names)
            rounds = self._swarm.scenario.lab.rounds or "?"
            self.tell(f"round {self._told}/{rounds}: {numbers}" + (f", loss {loss:.3f}" if loss else ""))
        if self._live is not None:
            news = Text("\n".join(self._news[-NEWS_SHOWN:]), style="dim")
            self._live.update(Group(self._table(), news), refresh=True)

    def _table(self) -> RenderableType:
        table = Table(title=self._swarm.scenario.description, title_justify="left")
        for heading in ("worker", "line", "state"):
            table.add_column(heading, no_wrap=True)
        for heading in ("round", "tokens/s", "loss", "MB up", "MB down", "starts"):
            table.add_column(heading, justify="right", no_wrap=True)
        for worker in self._swarm.workers.values():
            view, state = worker.view, state_of(worker)
            table.add_row(
                worker.name,
                line_of(worker),
                Text(state, style=COLORS.get(state, "red" if state in (DOWN, FROZEN) else "dim")),
                str(view.last_round),
                f"{view.tokens_per_s:,.0f}",
                f"{view.loss:.3f}" if view.loss is not None else "",
                f"{view.bytes_up / 1e6:.2f}",
                f"{view.bytes_down / 1e6:.2f}",
                str(len(worker.starts)),
            )
        return table


def state_of(worker: LabWorker) -> str:
    """What the table says of a worker."""
    if worker.process is None:
        return "comes later" if worker.place.late else "not started"
    if not worker.is_running:
        return worker.ends[-1][1] if len(worker.ends) == len(worker.starts) else DOWN
    return FROZEN if worker.is_frozen else worker.view.state


def line_of(worker: LabWorker) -> str:
    """Its connection, such as "20/5 Mbit/s 100 ms 1 % NAT"."""
    link = worker.place.link
    parts = [f"{link.down_mbps:g}/{link.up_mbps:g} Mbit/s"] if link.down_mbps or link.up_mbps else []
    parts += [f"{link.rtt_ms:g} ms"] if link.rtt_ms else []
    parts += [f"{100 * link.loss:g} % loss"] if link.loss else []
    return " ".join([*parts, *(["NAT"] if worker.place.nat else [])])
