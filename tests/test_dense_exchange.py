"""Laws of dense payloads in an exchange: the same calls as for sparse ones average every element."""

from __future__ import annotations

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SHAPES = [("embedding", (200, 130)), ("bias", (7,)), ("scalar", ()), ("empty", (0, 3))]
WEIGHTS = [1.0, 2.0, 5.0]
MEMBERS = len(WEIGHTS)
RELATIVE_ERROR = {8: 0.02, 16: 1e-3, 32: 1e-6}  # of one payload: half a step of each format


def deltas(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 1e-3 for _, shape in SHAPES]


def exchange(codec: Codec, payloads: list[bytes], residual: torch.Tensor | None) -> list[torch.Tensor]:
    """What every member decodes after reducers with unequal shares have each reduced a span."""
    aggregates = []
    for first, count in codec.spans([1.0, 0.0, 3.0]):
        place = {"run": RUN, "round": 3, "first_chunk": first, "num_chunks": count}
        sections = [(i, WEIGHTS[i], codec.cut(payload, first, count)) for i, payload in enumerate(payloads)]
        for _, _, section in sections:
            codec.check(section, **place)
            assert len(section) <= codec.max_payload_bytes(first, count)
        mine = None if residual is None else residual[codec.layout.elements(first, count)]
        aggregates.append(codec.reduce(sections, residual=mine, **place))
        codec.check_aggregate(aggregates[-1], **place, num_members=MEMBERS)
        assert len(aggregates[-1]) <= codec.max_aggregate_bytes(first, count, MEMBERS)
    return codec.decode(aggregates)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("recompressed", [False, True])
def test_a_dense_exchange_averages_every_element(bits: int, recompressed: bool) -> None:
    """All members get the weighted mean within the format's precision, as union and as recompressed sum."""
    codec = Codec(CodecSpec(kind="dense", dense_bits=bits), SHAPES)
    payloads = [
        codec.encode(deltas(seed), codec.error_feedback(), decay=0.0, run=RUN, round=3)
        for seed in range(MEMBERS)
    ]
    residual = codec.residual(0, codec.num_chunks) if recompressed else None
    for index, found in enumerate(exchange(codec, payloads, residual)):
        parts = [weight * deltas(seed)[index] for seed, weight in enumerate(WEIGHTS)]
        mean = sum(parts, torch.zeros_like(found)) / sum(WEIGHTS)
        allowed = 2 * RELATIVE_ERROR[bits] * sum(float(part.norm()) for part in parts) / sum(WEIGHTS)
        assert float((found - mean).norm()) <= allowed


def test_a_dense_fp32_sum_leaves_nothing_behind() -> None:
    """dense_bits = 32: error feedback and residual stay 0 to the last bit, so recompressing sums is exact."""
    codec = Codec(CodecSpec(kind="dense", dense_bits=32), SHAPES)
    feedbacks = [codec.error_feedback() for _ in range(MEMBERS)]
    payloads = [
        codec.encode(deltas(seed), feedback, decay=0.0, run=RUN, round=3)
        for seed, feedback in enumerate(feedbacks)
    ]
    residual = codec.residual(0, codec.num_chunks)
    summed, union = exchange(codec, payloads, residual), exchange(codec, payloads, None)
    assert all(torch.equal(a, b) for a, b in zip(summed, union, strict=True))
    assert not any(left.any() for left in [*feedbacks, residual])


def test_a_dense_recompressed_sum_costs_one_payload() -> None:
    """A recompressed aggregate is as long as one payload, a union as long as all: the former is for dense runs."""
    codec = Codec(CodecSpec(kind="dense", dense_bits=16), SHAPES)
    place = {"run": RUN, "round": 3, "first_chunk": 0, "num_chunks": codec.num_chunks}
    payload = codec.encode(deltas(0), codec.error_feedback(), decay=0.0, run=RUN, round=3)
    sections = [(i, weight, payload) for i, weight in enumerate(WEIGHTS)]
    summed = codec.reduce(sections, residual=codec.residual(0, codec.num_chunks), **place)
    assert len(summed) < 1.01 * len(payload) and len(codec.reduce(sections, **place)) > 2.9 * len(payload)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_dense_payloads_are_given_back_whole(bits: int) -> None:
    """What the feedback kept plus a span given back is what was there: nothing undelivered is lost."""
    codec = Codec(CodecSpec(kind="dense", dense_bits=bits), SHAPES)
    feedback, whole = codec.error_feedback(), codec.error_feedback()
    payload = codec.encode(deltas(1), feedback, decay=1.0, run=RUN, round=3)
    for first, count in codec.spans([1.0, 1.0]):
        codec.give_back(feedback, payload, first, count)
    exact = Codec(CodecSpec(kind="dense", dense_bits=32), SHAPES)
    sent = exact.encode(deltas(1), whole, decay=1.0, run=RUN, round=3)
    exact.give_back(whole, sent, 0, exact.num_chunks)
    assert torch.allclose(feedback, whole, rtol=0, atol=1e-9)
