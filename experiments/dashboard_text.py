"""Text that other peers supply, made harmless before it is stored or shown."""

from __future__ import annotations

import math

from dtrain.trainer.text import MAX_LINE, MAX_SAMPLE, clean_block, clean_line

__all__ = ["MAX_LINE", "MAX_NAME", "MAX_SAMPLE", "clean_block", "clean_line", "number"]

MAX_NAME = 64


def number(value: object) -> float:
    """A finite number from 0 up to what every reader of JSON holds exactly, 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    return float(value) if math.isfinite(value) and 0 <= value <= 2**53 else 0.0
