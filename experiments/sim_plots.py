"""Plots of a result folder: evaluation loss against tokens, bytes and virtual time, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dtrain.experiments import sim_frontier
from dtrain.experiments.memory_links import Floats
from dtrain.experiments.results import PLOTS, ResultFolder, Row
from dtrain.experiments.sim_style import COLOURS, DASHES, MARKERS, save, style

LEGEND_INSIDE = 4  # longer legends stand beside the plot


@dataclass(frozen=True)
class Axis:
    """What a plot has on its x axis."""

    file: str
    field: str
    """Of the lines in rounds.jsonl."""
    label: str
    unit: float
    log: bool = False


AXES = (
    Axis("loss_tokens", "tokens", "tokens trained by all workers (millions)", 1e6),
    Axis("loss_bytes", "bytes_up_per_worker", "megabytes sent per worker", 1e6, log=True),
    Axis("loss_time", "time_s", "virtual time (minutes)", 60.0),
)


@dataclass(frozen=True)
class Curve:
    """Evaluations of all seeds of one label."""

    label: str
    x: Floats
    """[evaluations] mean over the seeds."""
    loss: Floats
    """[seeds, evaluations]"""


def plot_all(folder: ResultFolder) -> list[Path]:
    """Draw every plot of a sweep; the paths of the PNGs."""
    summary = folder.summary()
    rounds = {row["id"]: folder.rounds(row["id"]) for row in summary["rows"]}
    paths = []
    for axis in AXES:
        curves = _curves(summary["rows"], rounds, axis)
        if any(len(curve.x) > 0 for curve in curves):
            paths.append(_plot(curves, axis, summary, folder.path / PLOTS))
    points = sim_frontier.points(summary["rows"])
    if len(points) > 1:
        paths.append(
            sim_frontier.plot(points, str(summary["description"] or summary["name"]), folder.path / PLOTS)
        )
    return paths


def _curves(rows: Sequence[Row], rounds: dict[str, list[Row]], axis: Axis) -> list[Curve]:
    curves = []
    for label in dict.fromkeys(row["label"] for row in rows):
        points = [
            [
                (line[axis.field] / axis.unit, line["eval_loss"])
                for line in rounds[row["id"]]
                if line.get("eval_loss") is not None and line.get(axis.field) and line["round"] > 0
            ]
            for row in rows
            if row["label"] == label
        ]
        length = min(map(len, points))
        table = np.array([entry[:length] for entry in points]).reshape(len(points), length, 2)
        curves.append(Curve(label, table[:, :, 0].mean(axis=0), table[:, :, 1]))
    return curves


def _plot(curves: Sequence[Curve], axis: Axis, summary: Row, place: Path) -> Path:
    beside = len(curves) > LEGEND_INSIDE
    with style():
        figure = Figure(figsize=(9.5 if beside else 7.0, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, curve in enumerate(curves):
            _draw(axes, curve, number)
        axes.set_xlabel(axis.label + (", logarithmic" if axis.log else ""))
        axes.set_ylabel("evaluation loss (nats per token)")
        if axis.log:
            axes.set_xscale("log")
        axes.set_title(_title(summary, curves), fontsize=11, loc="left")
        if beside:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
        else:
            axes.legend(loc="upper right", framealpha=0.9)
        return save(figure, place, axis.file)


def _draw(axes: Axes, curve: Curve, number: int) -> None:
    colour = COLOURS[number % len(COLOURS)]
    mean = curve.loss.mean(axis=0)
    axes.plot(
        curve.x,
        mean,
        label=curve.label,
        color=colour,
        linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        markevery=max(1, len(curve.x) // 10),
        linewidth=1.6,
    )
    if len(curve.loss) > 1:
        axes.fill_between(
            curve.x, curve.loss.min(axis=0), curve.loss.max(axis=0), color=colour, alpha=0.18, linewidth=0
        )


def _title(summary: Row, curves: Sequence[Curve]) -> str:
    seeds = max(len(curve.loss) for curve in curves)
    text = str(summary["description"] or summary["name"])
    return f"{text}\n(mean of {seeds} seeds; the bands span them)" if seeds > 1 else text
