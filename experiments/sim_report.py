"""What a sweep tells its user: progress while it runs, the summary, the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from dtrain.experiments.results import FORMAT, ResultFolder, Row
from dtrain.experiments.scaled import BYTES, SECONDS, TIMES, TOKENS, scaled
from dtrain.experiments.sim_file import RunSpec, Sweep

VARYING = ("strategy", "workers", "seed", "profile", "overlap", "inner_steps", "num_params")
LINE_PERIOD_S = 10.0


class Progress:
    """A bar with the time that is left, by inner steps; where there is no terminal, a line now and then."""

    def __init__(self, sweep: Sweep, todo: Sequence[RunSpec], console: Console) -> None:
        self._specs = {spec.id: spec for spec in todo}
        self._console, self._done_runs, self._done_steps = console, 0, 0
        self._all_steps = sum(_steps(spec, spec.rounds) for spec in todo)
        self._rounds = dict.fromkeys(self._specs, 0)
        self._began = self._said = time.monotonic()
        there = len(sweep.runs) - len(todo)
        self._intro = f"{sweep.name}: {len(sweep.runs)} runs" + (f", {there} there already" if there else "")
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = RichProgress(*columns, MofNCompleteColumn(), *times, console=console, transient=True)
        self._task = self._bar.add_task("inner steps", total=self._all_steps)

    def __enter__(self) -> Progress:
        self._console.print(self._intro)
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def take(self, event: Mapping[str, Any]) -> None:
        """Something has happened; see `sim_jobs.Report`."""
        spec = self._specs[event["id"]]
        if "round" in event:
            self._done_steps += _steps(spec, event["round"] - self._rounds[spec.id])
            self._rounds[spec.id] = event["round"]
            self._bar.update(self._task, completed=self._done_steps)
            self._say_now_and_then()
            return
        self._done_runs += 1
        text = f"{self._done_runs} of {len(self._specs)}: {spec.label}, seed {spec.seed}"
        self._console.print(text + (f" FAILED: {event['failed']}" if "failed" in event else ""), markup=False)

    def _say_now_and_then(self) -> None:
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < LINE_PERIOD_S:
            return
        share = self._done_steps / self._all_steps
        if not share:  # the evaluation before the first round
            return
        self._said = now
        left_s = (now - self._began) * (1 - share) / share
        self._console.print(f"{100 * share:.0f} % of the inner steps, about {left_s:.0f} s left")


def _steps(spec: RunSpec, rounds: int) -> int:
    return rounds * spec.manifest.train.inner_steps * spec.simulate.workers


def summarize(sweep: Sweep, folder: ResultFolder, failed: Mapping[str, str]) -> Row:
    """What summary.json says; see `results`."""
    rows = [
        row | train_loss(rounds := folder.rounds(spec.id)) | to_target(spec.simulate.target_loss, rounds)
        for spec in sweep.runs
        if (row := folder.row(spec.id)) is not None
    ]
    fields = [name for name in VARYING if len({row[name] for row in rows}) > 1]
    settings = list(dict.fromkeys(key for spec in sweep.runs for key in spec.settings))
    return {
        "format": FORMAT,
        "name": sweep.name,
        "description": sweep.description,
        "finished": len(rows) == len(sweep.runs),
        "runs_total": len(sweep.runs),
        "runs_failed": dict(failed),
        "varied": [*fields, *settings],
        "rows": rows,
    }


def train_loss(rounds: Sequence[Row]) -> Row:
    """{"train_loss": mean training loss of the last tenth of these rounds}; see `results`. {} if there is none."""
    losses = [line["loss"] for line in rounds if "loss" in line]
    last = losses[-max(1, len(losses) // 10) :]
    return {"train_loss": round(statistics.fmean(last), 6)} if last else {}


def to_target(loss: float, rounds: Sequence[Row]) -> Row:
    """{"to_target": where the evaluation loss of these rounds first fell to `loss`}; see `results`. {} without one."""
    if not loss:
        return {}
    before: Row | None = None
    for line in rounds:
        if line.get("eval_loss") is None:
            continue
        if line["eval_loss"] <= loss:
            start = before or line
            fall = start["eval_loss"] - line["eval_loss"]
            share = (start["eval_loss"] - loss) / fall if fall else 1.0
            fields = {
                name: start.get(name, 0) + share * (line.get(name, 0) - start.get(name, 0))
                for name in ("tokens", "time_s", "bytes_up_per_worker")
            }
            return {"to_target": {"loss": loss} | {name: round(value, 3) for name, value in fields.items()}}
        before = line
    return {"to_target": None}


def print_table(sweep: Sweep, folder: ResultFolder, failed: Mapping[str, str], console: Console) -> None:
    """One line per label: the mean over its seeds, and half the distance between the extremes."""
    rows = folder.summary()["rows"]
    table = Table(
        title=f"{sweep.name}: {sweep.description}".rstrip(": "),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("run", overflow="fold")  # the only one that narrow terminals make narrower
    target = sweep.runs[0].simulate.target_loss
    names = [
        "seeds",
        "tokens",
        "eval loss",
        "train\nloss",
        "sent",
        "vs fp32\nring",
        "virtual\ntime",
        "compute",
    ]
    for name in [*names, f"to loss\n{target:g}"] if target else names:
        table.add_column(name, justify="right", no_wrap=True)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for label in labels:
        table.add_row(label, *_cells([row for row in rows if row["label"] == label]))
    console.print(table)
    for label in labels:
        if attacked := [row for row in rows if row["label"] == label and "attackers_out" in row]:
            console.print(f"Put out: {label}: {_put_out(attacked)}", markup=False, highlight=False)
    for text in _remarks(rows):
        console.print(text, highlight=False)
    for run, reason in failed.items():
        console.print(f"Failed: {run}: {reason}", markup=False, highlight=False)
    console.print(f"Results: {folder.path}", highlight=False, soft_wrap=True)


def _cells(rows: Sequence[Row]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in rows)

    losses = [row["eval_loss"] for row in rows]
    loss = f"{statistics.fmean(losses):.3f}"
    if len(rows) > 1:
        loss += f" ±{(max(losses) - min(losses)) / 2:.3f}"
    reached = [row["to_target"] for row in rows if row.get("to_target")]
    target = [scaled(statistics.fmean(e["time_s"] for e in reached), SECONDS)] if reached else ["never"]
    ratio = ""
    if rows[0]["ratio_vs_fp32_allreduce"] is not None:
        ratio = scaled(mean("ratio_vs_fp32_allreduce"), TIMES)
    return [
        str(len(rows)),
        scaled(mean("tokens"), TOKENS),
        loss,
        f"{mean('train_loss'):.3f}" if "train_loss" in rows[0] else "",
        scaled(mean("bytes_up_per_worker"), BYTES),
        ratio,
        scaled(mean("virtual_time_s"), SECONDS),
        f"{100 * mean('compute_share'):.1f} %",
        *(target if "to_target" in rows[0] else []),
    ]


def _put_out(rows: Sequence[Row]) -> str:
    """Attackers of all, by which round the last one, and for what; honest members in rounds of one each."""
    found, by_round = (
        sum(row["attackers_out"] for row in rows),
        [row["attackers_out_by_round"] for row in rows],
    )
    reasons = sorted({reason for row in rows for reason in row["attackers_out_for"]})
    text = f"{found} by round {max(r for r in by_round if r)} ({', '.join(reasons)})" if found else "0"
    honest = sum(row["honest_out_rounds"] for row in rows)
    return f"{text}; {honest} of {sum(row['honest_rounds'] for row in rows)} honest rounds"


def _remarks(rows: Sequence[Row]) -> list[str]:
    remarks = []
    lost = [row for row in rows if row["lost_sections"]]
    if lost:
        remarks.append(
            f"{len(lost)} runs lost parts of payloads that took longer than exchange.sender_timeout_s; "
            "what was lost stays in the error feedback."
        )
    if any(not row["digests_equal"] for row in rows):
        remarks.append("In some rounds workers held different thetas: see digests_equal in the rows.")
    return remarks
