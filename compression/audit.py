"""Checking a reducer's sum afterwards: the same sections, summed again by the same code, must give the same bytes.

What a reducer keeps for later (`residual.py`) is part of its next sum, and far too large to be handed around. So each
aggregate commits to it by a hash: the residual is cut into units, each unit's values are a leaf, and `root` is the hash
of all leaves. An auditor opens a few units that nobody knew before, and only there the sum is made again, from the
residual that the reducer had committed to in its sum before. Kernels give equal bits everywhere, so any difference
is a wrong sum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dtrain.compression import wire
from dtrain.compression.codec import Codec
from dtrain.compression.plausible import implausible
from dtrain.compression.screen import MIN_MEMBERS, REASONS, Section, judge, scalar_products

OPENED_BYTES = 256 * 1024  # of a residual, that one audit looks at; at least one unit
LOOKED_BYTES = 1024 * 1024  # of a span's values, that a member compares with its own
BYTES_SHARE = 0.018  # of a round's bytes, for signatures and audits on average; all defences together: 3 %
AUDITS_SHARE = 0.01  # that audits have in any case, however small the payloads beside the signatures
SIGNATURE_BYTES = 220  # with each section and the aggregate that answers it (`dht/seals.py`)
SUSPECTED_BY = 3.0  # members, on average, that audit a sum which looks wrong to them
WEIGHT_SLACK = 0.01  # of its weight by which a section may count for more or less than here
JITTER, NUM_JITTERS = (
    1e-3,
    16,
)  # machines differ in the last bits of a screen's products: how far verdicts may lean


def units(codec: Codec, first_chunk: int, num_chunks: int) -> list[tuple[int, int]]:
    """(first chunk, number of chunks) of each unit of a span: its groups, then its dense chunks."""
    layout = codec.layout
    first_group, end_group, first_dense, end_dense = layout.split(first_chunk, num_chunks)
    groups = [layout.group_chunks(number) for number in range(first_group, end_group)]
    return [(a, b - a) for a, b in groups] + [(chunk, 1) for chunk in range(first_dense, end_dense)]


def leaves(codec: Codec, first_chunk: int, num_chunks: int, values: torch.Tensor) -> list[bytes]:
    """SHA-256 of each unit's values (fp32, chunk order, in units of weight times value)."""
    data = values.contiguous().numpy().view(np.uint8).data
    offset = codec.layout.offset
    base = int(offset[first_chunk])
    return [
        hashlib.sha256(data[4 * (int(offset[a]) - base) : 4 * (int(offset[a + n]) - base)]).digest()
        for a, n in units(codec, first_chunk, num_chunks)
    ]


def root(of_units: Sequence[bytes]) -> bytes:
    """What stands for a whole residual."""
    return hashlib.sha256(b"".join(of_units)).digest()


def opened(codec: Codec, span: tuple[int, int], number: int, max_bytes: int | None = None) -> tuple[int, int]:
    """The range of chunks of a span that the audit with this number looks at: neighbouring units."""
    max_bytes = OPENED_BYTES if max_bytes is None else max_bytes
    of_span = units(codec, *span)
    begin = number % len(of_span)
    end, num_bytes, offset = begin, 0, codec.layout.offset
    while end < len(of_span):
        first, count = of_span[end]
        num_bytes += 4 * int(offset[first + count] - offset[first])
        if end > begin and num_bytes > max_bytes:
            break
        end += 1
    first = of_span[begin][0]
    return first, sum(of_span[end - 1]) - first


def rate(num_members: int, payload_bytes: int, aggregate_bytes: int, opened_bytes: int) -> float:
    """How likely a member shall audit one other reducer after a round, so that all audits and signatures together cost
    BYTES_SHARE.

    An audit takes everybody's sections of a span: about one payload over the number of reducers, times the members.
    """
    pairs = num_members * (num_members - 1)
    round_bytes = (num_members - 1) * (payload_bytes + aggregate_bytes)
    spare = max(BYTES_SHARE * round_bytes - SIGNATURE_BYTES * pairs, AUDITS_SHARE * round_bytes)
    return min(1.0, spare / (payload_bytes + opened_bytes) / pairs)


def is_drawn(ticket: bytes, likely: float) -> bool:
    """Whether 32 bytes that look like chance draw something that is so likely."""
    return int.from_bytes(ticket[:8], "big") < likely * 2.0**64


def draw(
    codec: Codec,
    payload: bytes,
    aggregates: Mapping[int, bytes],
    own_index: int,
    num_members: int,
    ticket: bytes,
) -> list[int]:
    """Which reducers' recompressed aggregates a member audits, by index; `ticket` is chance that only it knows.

    What looks wrong beside what it sent itself is audited by a few members at once, the rest now and then.
    """
    indices, number = sorted(aggregates.keys() - {own_index}), number_of(ticket)
    suspects = implausible(_values(codec, payload, aggregates[j], number) for j in indices)
    total = sum(len(aggregate) for aggregate in aggregates.values())
    drawn = []
    for j, is_suspect in zip(indices, suspects, strict=True):
        opened_bytes = 4 * len(codec.residual(*opened(codec, codec.span_of(aggregates[j]), 0)))
        likely = rate(num_members, len(payload), total, opened_bytes)
        chance = hashlib.sha256(ticket + j.to_bytes(4, "big")).digest()
        if is_drawn(chance, SUSPECTED_BY / num_members if is_suspect else likely):
            drawn.append(j)
    return drawn


def _values(codec: Codec, payload: bytes, aggregate: bytes, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a payload and an aggregate say of a part of the aggregate's span, which nobody knows before."""
    first, count = opened(codec, codec.span_of(aggregate), number, LOOKED_BYTES)
    theirs = codec.values(part_of(codec, aggregate, first, count))
    return codec.values(codec.cut(payload, first, count)), theirs


def number_of(ticket: bytes) -> int:
    """Which range of a span the audits drawn by a ticket open; see `opened`."""
    return int.from_bytes(hashlib.sha256(ticket + b"number").digest()[:8], "big")


def recompute(
    codec: Codec,
    aggregate: bytes,
    sections: Mapping[int, bytes],
    before: torch.Tensor,
    first_chunk: int,
    num_chunks: int,
) -> tuple[bool, torch.Tensor]:
    """Whether a range of a checked aggregate is the sum of its contributors' sections, and the residual after it.

    before: the reducer's residual in that range, like the one after it fp32 in units of weight times value.
    """
    head, _ = wire.open_header(aggregate, (wire.RECOMPRESSED,), checksum=False)
    contributors = codec.contributors(aggregate)
    weight = math.fsum(weight for _, weight in contributors)
    left_over = before / weight
    place = first_chunk, num_chunks
    again = codec.reduce(
        [(index, weight, codec.cut(sections[index], *place)) for index, weight in contributors],
        residual=left_over,
        run=head.run,
        round=head.round,
        first_chunk=first_chunk,
        num_chunks=num_chunks,
    )
    same = part_of(codec, again, *place) == part_of(codec, aggregate, *place)
    return same, left_over * weight


def part_of(codec: Codec, aggregate: bytes, first_chunk: int, num_chunks: int) -> bytes:
    """What a checked recompressed aggregate says of a range, whoever contributed; for `Codec.values`."""
    head, body = wire.open_header(aggregate, (wire.RECOMPRESSED,), checksum=False)
    fmt, entries = codec.aggregate_format, head.num_contributors * wire.CONTRIBUTOR_BYTES
    section = fmt.parse(body[entries:], head.first_chunk, head.num_chunks)
    parts = fmt.cut(section, first_chunk, num_chunks)
    return wire.seal(head.kind, head.codec_id, head.run, head.round, (first_chunk, num_chunks), parts)


def miscounted(
    codec: Codec, aggregate: bytes, sections: Sequence[Section], span: tuple[int, int], *, screens: bool
) -> list[int]:
    """Members whose section counts for more or less in an aggregate than it must, or is refused unseen.

    sections: all that the reducer had, with the weights that their senders claim. Where reducers screen, a section
    counts for what the screen makes of it; on the brink of a verdict the reducer may choose.
    """
    found = dict(codec.contributors(aggregate))
    claimed = {index: weight for index, weight, _ in sections}
    refused = codec.refused(aggregate)
    unseen = [index for index, why in refused.items() if why in REASONS and index not in claimed]
    if unseen:
        return unseen
    if not screens or len(sections) < MIN_MEMBERS:
        return [index for index, weight in claimed.items() if found.get(index, 0.0) != weight]
    exact, num_values = scalar_products(codec, [section for _, _, section in sections], *span)
    weights = np.array(list(claimed.values()))
    generator = np.random.default_rng(0)
    verdicts = []
    for number in range(NUM_JITTERS + 1):
        noise = generator.standard_normal(exact.shape) * (JITTER if number else 0.0)
        counts, _ = judge(exact * (1.0 + (noise + noise.T) / 2), weights, num_values)
        verdicts.append(counts if np.any(counts > 0) else weights)
    low, high = np.min(verdicts, axis=0), np.max(verdicts, axis=0)
    return [
        index
        for position, (index, weight) in enumerate(claimed.items())
        if not low[position] - WEIGHT_SLACK * weight
        <= found.get(index, 0.0)
        <= high[position] + WEIGHT_SLACK * weight
    ]
