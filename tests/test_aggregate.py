"""Laws of reduction: spans change nothing, order changes nothing, and a reducer loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError, PayloadError
from dtrain.compression.spec import CodecSpec

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SHAPES = [("embedding", (256, 128)), ("matrix", (100, 70)), ("norm", (700,)), ("bias", (3,))]
CODEC = Codec(CodecSpec(k=512, aggregate_k=700, aggregate_bits=4), SHAPES)
WEIGHTS = [1.0, 3.5, 2.0]


def payloads(codec: Codec, count: int) -> list[bytes]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=generator) for _, shape in SHAPES]
        found.append(codec.encode(tensors, codec.error_feedback(), decay=1.0, run=RUN, round=1))
    return found


def reduce_spans(codec: Codec, given: list[bytes], shares: list[float]) -> list[bytes]:
    """Every span's exact union."""
    found = []
    for first, count in codec.spans(shares):
        sections = [(i, WEIGHTS[i], codec.cut(p, first, count)) for i, p in enumerate(given)]
        place = {"run": RUN, "round": 1, "first_chunk": first, "num_chunks": count}
        found.append(codec.reduce(sections[::-1], **place))
        codec.check_aggregate(found[-1], **place, num_members=len(given))
    return found


@given(shares=st.lists(st.floats(0, 100), min_size=1, max_size=9).filter(lambda shares: sum(shares) > 0))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_spans_cover_every_chunk_once(shares: list[float]) -> None:
    """Spans follow one another from the first chunk to the last; a share of 0 gets an empty one."""
    spans = CODEC.spans(shares)
    assert len(spans) == len(shares) and spans[0][0] == 0
    assert all(a[0] + a[1] == b[0] for a, b in zip(spans, [*spans[1:], (CODEC.num_chunks, 0)], strict=True))
    assert all(count == 0 for (_, count), share in zip(spans, shares, strict=True) if share == 0)


def test_spans_follow_the_shares() -> None:
    """Equal shares get nearly equal bytes; a double share nearly twice as many."""
    codec = Codec(CodecSpec(k=64), [("t", (4096, 4096)), ("small", (500,))])
    counts = [count for _, count in codec.spans([1, 1, 2])]
    assert abs(counts[0] - counts[1]) <= codec.layout.group
    assert abs(counts[2] - counts[0] - counts[1]) <= 2 * codec.layout.group


@pytest.mark.parametrize("shares", [[1.0], [1.0, 1.0], [0.0, 2.0, 1.0, 5.0], [1.0] * 12])
def test_decoding_is_bit_identical_for_any_division_into_spans(shares: list[float]) -> None:
    """Exact unions over any spans decode to the same bits, and to the weighted mean of what was sent."""
    given_ = payloads(CODEC, 3)
    found = CODEC.decode(reduce_spans(CODEC, given_, shares)[::-1])
    whole = CODEC.decode(reduce_spans(CODEC, given_, [1.0]))
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    single = [CODEC.decode(reduce_spans_single(CODEC, p)) for p in given_]
    for i, tensor in enumerate(whole):
        mean = sum(w * one[i] for w, one in zip(WEIGHTS, single, strict=True)) / sum(WEIGHTS)
        assert torch.allclose(tensor, torch.as_tensor(mean), atol=1e-6)


def reduce_spans_single(codec: Codec, payload: bytes) -> list[bytes]:
    return [codec.reduce([(0, 1.0, payload)], run=RUN, round=1, first_chunk=0, num_chunks=codec.num_chunks)]


def test_order_of_arrival_changes_nothing() -> None:
    """A reducer writes the same bytes in whatever order the sections came."""
    given_ = payloads(CODEC, 3)
    sections = [(i, WEIGHTS[i], p) for i, p in enumerate(given_)]
    place = {"run": RUN, "round": 1, "first_chunk": 0, "num_chunks": CODEC.num_chunks}
    for residuals in ([None, None], [CODEC.residual(0, CODEC.num_chunks) for _ in range(2)]):
        one = CODEC.reduce(sections, residual=residuals[0], **place)
        assert one == CODEC.reduce(sections[::-1], residual=residuals[1], **place)
        assert CODEC.contributors(one) == tuple(enumerate(WEIGHTS))


def test_a_missing_contributor_is_left_out_of_the_mean() -> None:
    """A span without contributor 1 is the mean of the others by their own weights."""
    given_ = payloads(CODEC, 3)
    place = {"run": RUN, "round": 1, "first_chunk": 0, "num_chunks": CODEC.num_chunks}
    without = CODEC.decode([CODEC.reduce([(0, 1.0, given_[0]), (2, 1.0, given_[2])], **place)])
    single = [CODEC.decode(reduce_spans_single(CODEC, given_[i])) for i in (0, 2)]
    for i, tensor in enumerate(without):
        assert torch.equal(tensor, single[0][i] * 0.5 + single[1][i] * 0.5)


def test_uncovered_chunks_are_zero() -> None:
    """A lost span leaves zeros in its chunks and nothing else changes."""
    spans = CODEC.spans([1.0, 1.0])
    aggregates = reduce_spans(CODEC, payloads(CODEC, 2), [1.0, 1.0])
    halves = [CODEC.decode([a]) for a in aggregates]
    whole = CODEC.decode(aggregates)
    assert all(torch.equal(a + b, c) for a, b, c in zip(halves[0], halves[1], whole, strict=True))
    assert spans[0][1] and spans[1][1] and not halves[0][3].any() and halves[1][3].any()
    assert not any(t.any() for t in CODEC.decode([]))


def test_overlapping_aggregates_are_refused() -> None:
    """Two aggregates for the same chunks are a mistake of the caller."""
    aggregates = reduce_spans(CODEC, payloads(CODEC, 1), [1.0])
    with pytest.raises(CompressionError, match="overlap"):
        CODEC.decode(aggregates * 2)


def test_a_reducer_keeps_what_it_did_not_send() -> None:
    """Recompressed: mean + residual before = sent + residual after, in every span, over several rounds."""
    given_ = payloads(CODEC, 3)
    for first, count in CODEC.spans([1.0, 2.0]):
        residual = CODEC.residual(first, count)
        place = {"run": RUN, "round": 1, "first_chunk": first, "num_chunks": count}
        sections = [(i, WEIGHTS[i], CODEC.cut(p, first, count)) for i, p in enumerate(given_)]
        mean = CODEC.decode([CODEC.reduce(sections, **place)])
        for _ in range(3):
            before = residual.clone()
            data = CODEC.reduce(sections, residual=residual, **place)
            CODEC.check_aggregate(data, **place, num_members=3)
            sent = CODEC.decode([data])
            total_before = chunk_values(mean, first, count) + before
            total_after = chunk_values(sent, first, count) + residual
            assert torch.allclose(total_before, total_after, atol=1e-6)
        assert residual.abs().max() > 0


def chunk_values(tensors: list[torch.Tensor], first: int, count: int) -> torch.Tensor:
    """Elements of a chunk range in chunk order, as the feedback shows them once all is given back."""
    codec = Codec(CodecSpec(k=512, aggregate_k=700, aggregate_bits=4), SHAPES)
    feedback = codec.error_feedback()
    payload = codec.encode(tensors, feedback, decay=1.0, run=RUN, round=0)
    codec.give_back(feedback, payload, 0, codec.num_chunks)
    return feedback[codec.layout.elements(first, count)]


def test_what_is_given_back_is_kept_again() -> None:
    """After giving a whole payload back the feedback is what it was before sending, up to rounding."""
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(shape, generator=generator) for _, shape in SHAPES]
    everything = CODEC.error_feedback()
    codec_all = Codec(CodecSpec(k=1), SHAPES)
    payload = CODEC.encode(tensors, everything, decay=1.0, run=RUN, round=1)
    kept = everything.clone()
    for first, count in CODEC.spans([1.0, 1.0, 1.0]):
        CODEC.give_back(everything, payload, first, count)
    other = codec_all.error_feedback()
    codec_all.give_back(
        other, codec_all.encode(tensors, other, decay=1.0, run=RUN, round=1), 0, codec_all.num_chunks
    )
    assert torch.allclose(everything, other, atol=2e-6) and not torch.allclose(kept, other, atol=1e-2)


def test_cutting_twice_is_cutting_once() -> None:
    """A cut of a cut equals the cut of the whole, and all cuts check."""
    payload = payloads(CODEC, 1)[0]
    (a, n), (b, m) = CODEC.spans([1.0, 1.0])
    wide = CODEC.cut(payload, a, n + m)
    assert wide == payload
    half = CODEC.cut(payload, b, m)
    assert CODEC.cut(half, b, m) == half
    CODEC.check(half, run=RUN, round=1, first_chunk=b, num_chunks=m)
    with pytest.raises(PayloadError, match="wrong-range"):
        CODEC.cut(half, a, n)
    with pytest.raises(CompressionError, match="group"):
        CODEC.cut(
            Codec(CodecSpec(k=64), SHAPES).encode(
                [torch.zeros(s) for _, s in SHAPES],
                torch.zeros(CODEC.num_params),
                decay=1.0,
                run=RUN,
                round=1,
            ),
            1,
            2,
        )
