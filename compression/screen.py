"""What a reducer takes into its sum: members' sections of one span, judged by each other.

Of updates that many made on the same theta, honest ones point roughly one way: the cosine of one with the sum of all
others is clearly above 0, whatever the noise of each. So before a sum is made

    a weight counts for at most WEIGHT_LIMIT times the median weight     (tokens that were never trained)
    a section longer than NORM_LIMIT times the median norm counts less, one beyond NORM_REFUSED not at all
    one that is nothing beside the others (NORM_EMPTY) does not count
    sections that nearly equal each other share one weight     (copies)
    one that points away from the others does not count, one that hardly points with them counts less

Who is left out keeps its section in its error feedback, as if it had come too late. The verdicts are one reducer's; the
members take the aggregate as it is, so they need not agree on them. Where there is no common direction, or too few
values or members to see one, directions are not judged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.codec import Codec

Floats = npt.NDArray[np.float64]
Section = tuple[int, float, bytes]
"""(index of the member, weight, checked section)"""

MIN_MEMBERS = 5  # fewer say too little about each other
WEIGHT_LIMIT = 4.0
NORM_LIMIT, NORM_REFUSED, NORM_EMPTY = 2.0, 10.0, 0.02
COPY_COSINE = 0.98
ALIGNED = 0.25  # of the median cosine: from here on a section counts in full
NOISE = 2.5  # standard deviations of one by which the median cosine must be above chance; the median itself varies less
BLOCK = 1 << 20  # elements of each section that are decoded at a time


REASONS = {
    "norm": "its update is far longer than the others'",
    "empty": "its update says nothing",
    "against": "its update points away from the others'",
}


@dataclass
class Screened:
    """What goes into the sum, and why the rest does not: `refused` {index of the member: reason}."""

    sections: list[Section]
    refused: dict[int, str] = field(default_factory=dict)


def screen(codec: Codec, sections: Sequence[Section], first_chunk: int, num_chunks: int) -> Screened:
    """Judge the sections of one span. At least one is always kept."""
    if len(sections) < MIN_MEMBERS:
        return Screened(list(sections))
    products, num_values = scalar_products(
        codec, [section for _, _, section in sections], first_chunk, num_chunks
    )
    factors, reasons = judge(products, np.array([weight for _, weight, _ in sections]), num_values)
    kept = [
        (index, float(factor), section)
        for (index, _, section), factor in zip(sections, factors)
        if factor > 0
    ]
    refused = {index: reason for (index, _, _), reason in zip(sections, reasons) if reason}
    return Screened(kept, refused) if kept else Screened(list(sections))


def judge(products: Floats, weights: Floats, num_values: float) -> tuple[Floats, list[str]]:
    """(weight that counts, or 0; reason for each 0 or "") from the sections' scalar products [members, members], their
    weights [members], and how many values that are not 0 a section has.
    """
    norms = np.sqrt(np.diagonal(products))
    median = float(np.median(norms))
    counts = np.minimum(weights, WEIGHT_LIMIT * float(np.median(weights)))
    reasons = [""] * len(norms)

    def refuse(which: npt.NDArray[np.bool_], reason: str) -> None:
        for index in np.flatnonzero(which & (counts > 0)):
            reasons[index], counts[index] = reason, 0.0

    refuse(~np.isfinite(norms) | (norms > NORM_REFUSED * median), "norm")
    refuse(norms <= NORM_EMPTY * median, "empty")
    limited = np.where(
        counts > 0, counts * np.minimum(1.0, NORM_LIMIT * median / np.maximum(norms, 1e-30)), 0.0
    )
    counts[:] = limited / _num_copies(products, norms)
    for _ in range(2):  # the second time without those whom the first has found
        cosines = _cosines(products, norms, counts)
        middle = float(np.median(cosines[counts > 0])) if np.any(counts > 0) else 0.0
        if middle * math.sqrt(max(1.0, num_values)) < NOISE:
            break
        refuse(cosines <= 0, "against")
    else:
        counts *= np.clip(cosines / (ALIGNED * middle), 0.0, 1.0)
    return counts, reasons


def _num_copies(products: Floats, norms: Floats) -> Floats:
    """How many sections are nearly the same as each, itself included."""
    lengths = np.maximum(norms, 1e-30)
    same = products / lengths[:, None] / lengths[None, :] > COPY_COSINE
    np.fill_diagonal(same, True)
    counted: Floats = same.sum(axis=1).astype(np.float64)
    return counted


def _cosines(products: Floats, norms: Floats, counts: Floats) -> Floats:
    """Of each section with the weighted sum of all others, [members]."""
    with_sum = products @ counts
    square = float(counts @ with_sum)
    own = np.diagonal(products)
    others = square - 2 * counts * with_sum + counts**2 * own
    lengths = norms * np.sqrt(np.maximum(others, 0.0))
    found: Floats = (with_sum - counts * own) / np.maximum(lengths, 1e-30)
    return found


def scalar_products(
    codec: Codec, sections: Sequence[bytes], first_chunk: int, num_chunks: int
) -> tuple[Floats, float]:
    """Scalar products [members, members], and the mean number of values that are not 0."""
    products = np.zeros((len(sections), len(sections)))
    num_values = 0
    for first, count in _blocks(codec, first_chunk, num_chunks):
        values = torch.stack([codec.values(codec.cut(section, first, count)) for section in sections])
        products += (values @ values.T).double().numpy()
        num_values += int(torch.count_nonzero(values))
    return products, num_values / len(sections)


def _blocks(codec: Codec, first_chunk: int, num_chunks: int) -> list[tuple[int, int]]:
    """A span in ranges of chunks of about BLOCK elements each, on boundaries of groups."""
    numel = int(codec.layout.offset[first_chunk + num_chunks] - codec.layout.offset[first_chunk])
    parts = max(1, math.ceil(numel / BLOCK))
    if parts == 1:
        return [(first_chunk, num_chunks)]
    end = first_chunk + num_chunks
    edges = {int(edge) for edge in codec.layout.group_edges if first_chunk < edge < end}
    edges |= {max(first_chunk, codec.layout.num_sparse)} if codec.layout.num_sparse < end else set()
    inner = sorted(edges)
    picked = [inner[i * len(inner) // parts] for i in range(parts)] if inner else []
    bounds = sorted({first_chunk, *picked, end})
    return [(begin, after - begin) for begin, after in itertools.pairwise(bounds)]
