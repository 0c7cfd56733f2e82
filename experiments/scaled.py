"""Figures in the largest unit that they reach, short enough for tables of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

BYTES = ((1.0, " B"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"))
SECONDS = ((1.0, " s"), (3600.0, " h"), (86_400.0, " d"))
TOKENS = ((1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
TIMES = ((1.0, "x"),)
"""(size, name) of each unit, ascending."""


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits, or all before the point: "1.49 GB", "95.4 s", "3,366 s"."""
    size, name = next((unit for unit in reversed(units) if value >= unit[0]), units[0])
    value /= size
    return f"{value:,.0f}{name}" if value >= 99.95 else f"{value:#.3g}{name}"
