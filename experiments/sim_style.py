"""How plots look: Okabe and Ito's colours, which people with any colour vision can tell apart, and markers beside."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style() -> AbstractContextManager[None]:
    """Within it, figures are drawn in this style."""
    return rc_context({"svg.hashsalt": "dtrain", "font.size": 11, "axes.grid": True, "grid.alpha": 0.3})


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write a figure as PNG and SVG; the PNG's path."""
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata=metadata)
    return folder / f"{name}.png"
