"""Laws of the kernels: whatever computes them, the bytes and the sums are the same to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression import dct
from dtrain.compression.codec import Codec
from dtrain.compression.kernels import cpu, cpu_dct, cpu_select, pick
from dtrain.compression.kernels.reference import ReferenceKernel
from dtrain.compression.spec import CodecSpec

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SHAPES = [
    ("blocks", (192, 128)),
    ("narrow", (128, 64)),
    ("odd", (130, 70)),
    ("run", (5000,)),
    ("norm", (300,)),
]


def make(seed: int, shapes: list[tuple[str, tuple[int, ...]]] = SHAPES) -> list[torch.Tensor]:
    """Heavy-tailed values; every third seed has many equal magnitudes and zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) ** 3 for _, shape in shapes]
    return [t.round() for t in tensors] if seed % 3 == 2 else tensors


@pytest.fixture()
def threads() -> Iterator[None]:
    """Put torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("transform", "k", "bits"),
    [
        *itertools.product(["none"], [1, 64, 256, 700, 4096], [1, 2, 4, 8, 16]),
        *itertools.product(["dct"], [64, 700], [2, 8]),
    ],
)
def test_numba_equals_the_reference_to_the_bit(transform: str, k: int, bits: int) -> None:
    """Payloads, error feedback, sums and recompressed aggregates are the same, ties and zeros included."""
    spec = CodecSpec(k=k, value_bits=bits, transform=transform, aggregate_bits=2)
    fast = Codec(spec, SHAPES, kernel=cpu.CpuKernel())
    plain = Codec(spec, SHAPES, kernel=ReferenceKernel())
    kept = [codec.error_feedback() for codec in (fast, plain)]
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": fast.num_chunks}
    payloads = []
    for seed in range(3):
        one, two = (
            codec.encode(make(seed), feedback, decay=0.9, run=RUN, round=0)
            for codec, feedback in zip((fast, plain), kept, strict=True)
        )
        assert one == two and torch.equal(*kept)
        payloads.append((seed, 1.0 + seed, one))
    unions = [codec.reduce(payloads, **place) for codec in (fast, plain)]
    assert unions[0] == unions[1]
    assert all(
        torch.equal(a, b) for a, b in zip(fast.decode(unions[:1]), plain.decode(unions[:1]), strict=True)
    )
    residuals = [fast.residual(0, fast.num_chunks) for _ in range(2)]
    one = fast.reduce(payloads, residual=residuals[0], **place)
    assert one == plain.reduce(payloads, residual=residuals[1], **place) and torch.equal(*residuals)
    for codec in (fast, plain):
        codec.check_aggregate(one, num_members=3, **place)


@pytest.mark.parametrize("kernel", [cpu.CpuKernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)
def test_threads_and_tiles_change_nothing(
    kernel: cpu.CpuKernel | ReferenceKernel, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread or three, tiles of one group or of all: the same bytes and the same tensors."""
    shapes = [("a", (1024, 640)), ("b", (70_001,))]
    codec = Codec(CodecSpec(k=256), shapes, kernel=kernel)
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": codec.num_chunks}
    found = []
    for num_threads, elements in [(1, 1 << 20), (3, 1 << 14), (2, 1 << 16)]:
        torch.set_num_threads(num_threads)
        monkeypatch.setattr(cpu, "PART_ELEMENTS", elements)
        monkeypatch.setattr("dtrain.compression.kernels.reference.TILE_CHUNKS", elements >> 12)
        feedback = codec.error_feedback()
        payload = codec.encode(make(0, shapes), feedback, decay=1.0, run=RUN, round=0)
        codec.check(payload, **place)
        decoded = codec.decode([codec.reduce([(0, 1.0, payload), (1, 2.0, payload)], **place)])
        codec.give_back(feedback, payload, 0, codec.num_chunks)
        found.append((payload, feedback, *decoded))
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1:], found[0][1:], strict=True))


@pytest.mark.parametrize("kernel", [cpu.CpuKernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)
def test_no_value_that_is_not_finite_is_overlooked(
    kernel: cpu.CpuKernel | ReferenceKernel, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN or infinity at any place of any tensor is found, in one thread or in three, and no tensor but its own is
    named.
    """
    monkeypatch.setattr(cpu, "PART_ELEMENTS", 256)
    sizes = [1000, 0, 1, 255, 256, 257, 64]
    tensors = [torch.full((size,), 3e38) for size in sizes]
    tensors += [torch.full((300,), 1e38, dtype=torch.bfloat16), torch.full((10, 20), 1e38).mT]
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        assert kernel.finite(tensors) == [True] * len(tensors)
        for index, tensor in enumerate(tensors):
            for at in {*range(0, tensor.numel(), 61), tensor.numel() - 1} & {*range(tensor.numel())}:
                for bad in (float("nan"), float("-inf")):
                    spoiled = tensor.clone()
                    spoiled[np.unravel_index(at, tensor.shape)] = bad
                    found = kernel.finite([*tensors[:index], spoiled, *tensors[index + 1 :]])
                    assert found == [i != index for i in range(len(tensors))]


@given(
    values=st.lists(st.integers(-9, 9), min_size=1, max_size=300),
    share=st.floats(0, 1),
    guess=st.integers(0, 2**31 - 1),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_selection_is_a_stable_sort(values: list[int], share: float, guess: int) -> None:
    """The kept set is the first k of a stable sort by falling magnitude, whatever cut was guessed."""
    chunk = np.asarray(values, np.float32)
    k = max(1, round(share * len(chunk)))
    lanes, positions = np.zeros(cpu_select.num_lanes(k), np.int32), np.zeros(k + 1, np.int32)
    scratch = np.zeros(len(chunk) + 2, np.int32), np.zeros(len(chunk) + 2, np.int32)
    cpu_select.scan(chunk, lanes)
    cpu_select.select(chunk, k, lanes, np.int32(guess), *scratch, positions)
    expected = np.sort(np.argsort(-np.abs(chunk), kind="stable")[:k])
    assert positions[:k].tolist() == expected.tolist()


def test_transform_is_the_cosine_transform() -> None:
    """Orthonormal, equal to its definition, inverted by its inverse; numba's is the same to the bit."""
    blocks = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(0))
    found = dct.forward(blocks)
    assert torch.allclose(found, dct.forward_by_product(blocks), atol=2e-5)
    assert torch.allclose(dct.inverse(found), blocks, atol=2e-5)
    assert torch.allclose(dct.inverse_by_product(found), blocks, atol=2e-5)
    out = np.empty((64, 64), np.float32)
    for i in range(5):
        cpu_dct.forward(blocks[i].numpy().copy(), out)
        assert np.array_equal(out, found[i].numpy())
        cpu_dct.inverse(found[i].numpy().copy(), out)
        assert np.array_equal(out, dct.inverse(found)[i].numpy())


def test_smooth_blocks_need_few_coefficients() -> None:
    """With the transform, a smooth matrix survives k = 64 of 4096 that would lose nearly all of it without."""
    row = torch.linspace(0, 3, 128)
    smooth = torch.sin(row)[:, None] * torch.cos(row)[None, :]
    errors = {}
    for transform in ("none", "dct"):
        codec = Codec(CodecSpec(k=64, value_bits=16, transform=transform), [("smooth", (128, 128))])
        payload = codec.encode([smooth], codec.error_feedback(), decay=1.0, run=RUN, round=0)
        place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": codec.num_chunks}
        found = codec.decode([codec.reduce([(0, 1.0, payload)], **place)])[0]
        errors[transform] = float((found - smooth).norm() / smooth.norm())
    assert errors["dct"] < 0.01 < 0.5 < errors["none"]


def test_outputs_are_reused_and_misfits_refused() -> None:
    """decode writes into the tensors it is given, stale content and all, also at odd addresses."""
    codec = Codec(CodecSpec(k=64), SHAPES)
    payload = codec.encode(make(1), codec.error_feedback(), decay=1.0, run=RUN, round=0)
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": codec.num_chunks}
    aggregate = codec.reduce([(0, 1.0, payload)], **place)
    fresh = codec.decode([aggregate])
    memory = torch.full((codec.num_params + 1,), 7.0)
    parts = torch.split(memory[1:], list(codec.layout.numels))
    reused = [part.view(shape) for part, (_, shape) in zip(parts, SHAPES, strict=True)]
    assert all(a is b for a, b in zip(codec.decode([aggregate], out=reused), reused, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fresh, reused, strict=True))
    with pytest.raises(ValueError, match="'blocks' must be contiguous"):
        codec.decode([aggregate], out=[reused[0].double(), *reused[1:]])


def test_numba_is_picked_and_its_absence_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With numba there is no word; without it the reference takes over, after one warning however many codecs."""
    assert pick.kernel().name == "numba" and not caplog.records
    monkeypatch.setitem(__import__("sys").modules, "dtrain.compression.kernels.cpu", None)
    pick.kernel.cache_clear()
    try:
        assert [pick.kernel().name for _ in range(2)] == ["reference"] * 2
        assert len(caplog.records) == 1 and "numba" in caplog.text
    finally:
        pick.kernel.cache_clear()
