"""The frontier: what a run ends at against the bytes that it cost, with published runs beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from dtrain.experiments.results import Row
from dtrain.experiments.sim_style import COLOURS, MARKERS, save, style

RING_BYTES = 8.0
"""Bytes per parameter and step that a worker among many sends in an fp32 ring all-reduce."""


@dataclass(frozen=True)
class Point:
    """One label of a sweep, or a published run."""

    label: str
    bytes_per_param_step: float
    loss: float
    """Evaluation loss at the end, mean over the seeds, nats per token."""
    spread: float = 0.0
    """Half the distance between the seeds' extremes."""
    gap: float | None = None
    """Percent above the data-parallel run with as many workers, None if there is none."""


PUBLISHED = (
    Point("DisTrO, 1.2B, M 32", RING_BYTES / 54, 2.373, gap=100 * (2.373 / 2.449 - 1)),
    Point("OpenDiLoCo, 150M, M 8", RING_BYTES / 500, math.log(13.73), gap=100 * (math.log(13.73, 13.68) - 1)),
    Point("Streaming DiLoCo, 1B", RING_BYTES / 400, 2.45, gap=0.0),
)
"""Runs with a data-parallel control: the DisTrO preliminary report (54 times less than a ring all-reduce), arXiv
2407.07852 (perplexities 13.73 and 13.68, 500 times less), arXiv 2501.18512 (400 times less). Other models, other data:
only the gap to each one's own control can be laid beside ours."""


def points(rows: Sequence[Row]) -> list[Point]:
    """A point per label of a sweep's rows; runs that sent nothing have none."""
    labels: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("bytes_per_param_step"):
            labels.setdefault(row["label"], []).append(row)
    controls: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["strategy"] == "ddp":
            controls.setdefault((row["workers"], row["num_params"]), []).append(row["eval_loss"])
    return [_point(label, mine, controls) for label, mine in labels.items()]


def _point(label: str, rows: Sequence[Row], controls: dict[tuple[int, int], list[float]]) -> Point:
    losses = [row["eval_loss"] for row in rows]
    loss = statistics.fmean(losses)
    control = controls.get((rows[0]["workers"], rows[0]["num_params"]))
    return Point(
        label=label,
        bytes_per_param_step=statistics.fmean(row["bytes_per_param_step"] for row in rows),
        loss=loss,
        spread=(max(losses) - min(losses)) / 2,
        gap=100 * (loss / statistics.fmean(control) - 1) if control else None,
    )


def plot(found: Sequence[Point], title: str, folder: Path) -> Path:
    """Draw frontier.png and .svg: the gap to `ddp` if the sweep has such runs, else the loss itself."""
    by_gap = all(point.gap is not None for point in found)
    with style():
        figure = Figure(figsize=(9.5, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, point in enumerate(found):
            y, spread = point.loss, point.spread
            if by_gap:
                y, spread = point.gap or 0.0, 100 * point.spread / point.loss
            marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
            axes.errorbar(
                [point.bytes_per_param_step],
                [y],
                yerr=[spread] if point.spread else None,
                color=COLOURS[number % len(COLOURS)],
                marker=marker,
                markersize=8,
                linestyle="none",
                label=point.label,
            )
        for number, point in enumerate(PUBLISHED if by_gap else ()):
            axes.plot(
                [point.bytes_per_param_step],
                [point.gap or 0.0],
                color="#777777",
                marker="*+x"[number],
                markersize=10,
                linestyle="none",
                label=f"{point.label} (published)",
            )
        axes.axvline(RING_BYTES, color="#777777", linestyle=":", linewidth=1.2, label="fp32 ring all-reduce")
        axes.set_xscale("log")
        axes.set_xlabel("bytes sent per worker, parameter and inner step, logarithmic")
        axes.set_ylabel(
            "final loss above ddp (%)" if by_gap else "evaluation loss at the end (nats per token)"
        )
        axes.set_title(title, fontsize=11, loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
        return save(figure, folder, "frontier")
