"""Whether a span's aggregate looks like what a member would expect from what it sent itself.

A hint, no proof: it costs a member nothing but a look at what it has, and says which sums are worth an audit. One's own
section is in the sum, so both point roughly one way in every span, and their lengths stand in about one proportion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dtrain.compression.codec import Codec

MIN_SPANS = 4  # fewer say too little about each other
CHANCE = 2.0  # standard deviations within which a cosine says nothing
SEEN = 4.0  # by which the spans' median must be above chance
LENGTHS = 8.0  # times shorter or longer than the spans' median


def implausible(codec: Codec, payload: bytes, aggregates: Sequence[bytes]) -> list[bool]:
    """For each of these recompressed aggregates of one round, whether it looks wrong beside the others."""
    if len(aggregates) < MIN_SPANS:
        return [False] * len(aggregates)
    signals, lengths = np.zeros(len(aggregates)), np.zeros(len(aggregates))
    for j, aggregate in enumerate(aggregates):
        ours, theirs = codec.values(codec.cut(payload, *codec.span_of(aggregate))), codec.values(aggregate)
        own, other = float(ours.norm()), float(theirs.norm())
        num_common = int(torch.count_nonzero(ours * theirs))
        cosine = float(torch.dot(ours, theirs)) / max(own * other, 1e-30)
        signals[j] = cosine * max(1, num_common) ** 0.5  # in standard deviations, if signs were chance
        lengths[j] = other / max(own, 1e-30)
    middle, length = float(np.median(signals)), float(np.median(lengths))
    wrong = (lengths > LENGTHS * length) | (lengths < length / LENGTHS)
    if middle > SEEN:
        wrong |= signals < CHANCE
    return [bool(w) for w in wrong]
