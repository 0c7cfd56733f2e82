"""The timeline of a scenario as a picture: each worker's states as a lane, what happened, and the rounds below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

STATES = {
    "training": "#0072b2",
    "exchanging": "#e69f00",
    "joining": "#cc79a7",
    "waiting": "#bbbbbb",
    "paused": "#888888",
    "finished": "#009e73",
}
"""State -> colour (Okabe and Ito's, which colour-blind people can tell apart)."""
ENDS = ("stop", "start")


def plot_timeline(
    path: Path,
    title: str,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    events: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
    began: float,
) -> None:
    """Draw `path` (.png or .svg). `events` and `rounds` as the summary and the dashboard's format have them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names = list(metrics)
    figure, (lanes, below) = pyplot.subplots(
        2,
        1,
        sharex=True,
        figsize=(11, 1.6 + 0.32 * len(names) + 1.8),
        height_ratios=[0.32 * len(names) + 0.6, 1.8],
    )
    for index, name in enumerate(names):
        for state, start, end in _stretches(metrics[name], began):
            lanes.barh(index, end - start, left=start, height=0.7, color=STATES.get(state, "#dddddd"))
        included = [e["time"] - began for e in metrics[name] if e["event"] == "round" and e["own_included"]]
        lanes.plot(included, [index] * len(included), "|", color="white", markersize=7)
    for event in events:
        at = names.index(event["worker"]) if event["worker"] in names else len(names) - 0.5
        end = event["undone_at_s"]
        lanes.plot([event["at_s"]], [at], "x", color="black", markersize=7)
        if end is not None:
            lanes.plot([event["at_s"], end], [at, at], color="black", linewidth=1)
        lanes.annotate(event["kind"], (event["at_s"], at), (2, 6), textcoords="offset points", fontsize=7)
    lanes.set_yticks(range(len(names)), names)
    lanes.invert_yaxis()
    lanes.set_title(title, loc="left", fontsize=10)
    patches = [Patch(color=colour, label=state) for state, colour in STATES.items()]
    lanes.legend(handles=patches, fontsize=7, ncols=len(STATES), loc="lower right", bbox_to_anchor=(1, 1))
    times = [line["time_s"] for line in rounds]
    below.step(times, [line["contributors"] for line in rounds], where="pre", color="#0072b2")
    below.set_ylim(bottom=0)
    below.set_ylabel("contributors", fontsize=8)
    below.set_xlabel("seconds since the first round began", fontsize=8)
    losses = [(line["time_s"], line["loss"]) for line in rounds if line["loss"] is not None]
    right = below.twinx()
    right.plot([at for at, _ in losses], [loss for _, loss in losses], color="#d55e00", linewidth=1)
    right.set_ylabel("training loss", fontsize=8, color="#d55e00")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _stretches(events: Sequence[Mapping[str, Any]], began: float) -> Iterator[tuple[str, float, float]]:
    """(state, begin, end) of one worker, in seconds since `began`; a life that breaks off ends with its last event."""
    state, since, last = "", 0.0, 0.0
    for event in events:
        at = event["time"] - began
        if event["event"] == "state" or event["event"] in ENDS:
            if state:
                yield state, since, last if event["event"] == "start" else at
            state, since = ("", at) if event["event"] in ENDS else (event["state"], at)
        last = at
    if state:
        yield state, since, last
