"""The Triton programs, run by Triton's interpreter on the CPU: the same laws as for the other kernels."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the programs are defined
pytest.importorskip("triton")

from dtrain.compression import wire
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels import cuda
from dtrain.compression.kernels.cuda import CudaKernel
from dtrain.compression.kernels.reference import ReferenceKernel
from dtrain.compression.spec import CodecSpec

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SHAPES = [("blocks", (64, 128)), ("odd", (70, 61)), ("run", (5000,)), ("norm", (300,))]


def make(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) ** 3 for _, shape in SHAPES]
    if seed == 1:
        tensors = [t.round() for t in tensors]  # many ties and zeros
        tensors[0][:, 64:] *= 1e-12  # out of reach of its group's exponent
    return tensors


@pytest.mark.parametrize(("k", "bits"), [(64, 2), (64, 1), (33, 4), (600, 2), (64, 16)])
def test_triton_equals_the_reference_to_the_bit(k: int, bits: int) -> None:
    """Payloads, error feedback and decoded sums are the same."""
    spec = CodecSpec(k=k, value_bits=bits)
    fast = Codec(spec, SHAPES, kernel=CudaKernel(ReferenceKernel()))
    plain = Codec(spec, SHAPES, kernel=ReferenceKernel())
    kept = [codec.error_feedback() for codec in (fast, plain)]
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": fast.num_chunks}
    payloads = []
    for seed in range(2):
        one, two = (
            codec.encode(make(seed), feedback, decay=0.9, run=RUN, round=0)
            for codec, feedback in zip((fast, plain), kept, strict=True)
        )
        assert torch.equal(*kept)
        assert one == two
        payloads.append((seed, 1.0 + seed, one))
    union = plain.reduce(payloads, **place)
    assert all(torch.equal(a, b) for a, b in zip(fast.decode([union]), plain.decode([union]), strict=True))


def test_triton_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group by group instead of all at once: the same bytes, feedback and sums."""
    codec = Codec(CodecSpec(k=512), SHAPES, kernel=CudaKernel(ReferenceKernel()))
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": codec.num_chunks}
    found = []
    for elements in (1 << 27, 1 << 12):
        monkeypatch.setattr(cuda, "PART_ELEMENTS", elements)
        feedback = codec.error_feedback()
        payload = codec.encode(make(1), feedback, decay=1.0, run=RUN, round=0)
        found.append((payload, feedback, *codec.decode([codec.reduce([(0, 1.0, payload)], **place)])))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_triton_refuses_what_the_reference_refuses() -> None:
    """Spoiled groups that nobody checked before: the same named reason, or the same values."""
    shapes = [("matrix", (64, 64)), ("run", (4200,))]
    fast, plain = (
        Codec(CodecSpec(k=40, value_bits=4), shapes, kernel=kernel)
        for kernel in (CudaKernel(ReferenceKernel()), ReferenceKernel())
    )
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _, shape in shapes]
    payload = plain.encode(tensors, plain.error_feedback(), decay=1.0, run=RUN, round=0)
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": plain.num_chunks}
    reasons = set()
    for i in range(24):
        data = bytearray(payload)
        at = int(torch.randint(wire.HEADER_BYTES + 2, len(data), (), generator=generator))
        data[at if i % 3 else wire.HEADER_BYTES + 2 + i // 12] ^= 1 << (i % 8)
        union = plain.reduce([(0, 1.0, bytes(data))], **place)
        found = [decoded(codec, union) for codec in (fast, plain)]
        if isinstance(found[1], str) and found[1] == "bad-padding":
            continue  # bits that no value is read from are left to the check
        assert isinstance(found[0], str) == isinstance(found[1], str)
        if isinstance(found[0], str):
            assert found[0] == found[1]
            reasons.add(found[0])
        else:
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {"bad-scale", "bad-rice", "bad-length", "index-out-of-range"} <= reasons


def decoded(codec: Codec, union: bytes) -> list[torch.Tensor] | str:
    try:
        return codec.decode([union])
    except PayloadError as error:
        return error.reason


def test_triton_reads_half_precision_sources() -> None:
    """bf16 deltas give the bytes of their fp32 copies."""
    codec = Codec(CodecSpec(k=64), SHAPES, kernel=CudaKernel(ReferenceKernel()))
    tensors = [t.bfloat16() for t in make(0)]
    one = codec.encode(tensors, codec.error_feedback(), decay=1.0, run=RUN, round=0)
    two = codec.encode([t.float() for t in tensors], codec.error_feedback(), decay=1.0, run=RUN, round=0)
    assert one == two


def test_triton_decodes_spans_like_the_whole() -> None:
    """Any division into spans decodes to the same bits."""
    codec = Codec(CodecSpec(k=512), SHAPES, kernel=CudaKernel(ReferenceKernel()))
    payload = codec.encode(make(0), codec.error_feedback(), decay=1.0, run=RUN, round=0)
    found = []
    for shares in ([1.0], [1.0, 2.0, 1.0]):
        aggregates = []
        for first, count in codec.spans(shares):
            place = {"run": RUN, "round": 0, "first_chunk": first, "num_chunks": count}
            aggregates.append(codec.reduce([(0, 1.0, codec.cut(payload, first, count))], **place))
        found.append(codec.decode(aggregates))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_triton_transform_agrees_with_the_reference() -> None:
    """With the transform the result is close: matrix products round otherwise than butterflies."""
    spec = CodecSpec(k=4096, value_bits=16, transform="dct")
    fast = Codec(spec, SHAPES, kernel=CudaKernel(ReferenceKernel()))
    payload = fast.encode(make(0), fast.error_feedback(), decay=1.0, run=RUN, round=0)
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": fast.num_chunks}
    union = fast.reduce([(0, 1.0, payload)], **place)
    plain = Codec(spec, SHAPES, kernel=ReferenceKernel()).decode([union])
    for source, one, two in zip(make(0), fast.decode([union]), plain, strict=True):
        assert torch.allclose(one, two, atol=1e-4) and torch.allclose(one, source, atol=2e-2)
