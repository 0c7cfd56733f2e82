"""Whether spans' aggregates look like what a member would expect from what it sent itself.

A hint, no proof: it costs a member nothing but a look at what it has, and says which sums are worth an audit. One's own
section is in the sum, so both point roughly one way in every span, and their lengths stand in about one proportion.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

MIN_SPANS = 4  # fewer say too little about each other
CHANCE = 2.0  # standard deviations within which a cosine says nothing
SEEN = 4.0  # by which the spans' median must be above chance
LENGTHS = 8.0  # times shorter or longer than the spans' median


def implausible(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[bool]:
    """For each span whether its aggregate looks wrong beside the others; a pair has the values of one's own section
    and those of the aggregate in the same place.
    """
    signals, lengths = [], []
    for ours, theirs in pairs:
        own, other = float(ours.norm()), float(theirs.norm())
        num_common = int(torch.count_nonzero(ours * theirs))
        cosine = float(torch.dot(ours, theirs)) / max(own * other, 1e-30)
        signals.append(cosine * max(1, num_common) ** 0.5)  # in standard deviations, if signs were chance
        lengths.append(other / max(own, 1e-30))
    if len(signals) < MIN_SPANS:
        return [False] * len(signals)
    middle, length = float(np.median(signals)), float(np.median(lengths))
    return [
        not length / LENGTHS <= long <= LENGTHS * length or (middle > SEEN and signal < CHANCE)
        for signal, long in zip(signals, lengths, strict=True)
    ]
