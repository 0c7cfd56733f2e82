"""Laws of encode: what is sent plus what is kept is what was there, for any tensor, any k and any value
width.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression import dense
from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError
from dtrain.compression.layout import Layout
from dtrain.compression.spec import CodecSpec

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SHAPES = [
    ("blocks", (128, 192)),
    ("odd", (65, 100)),
    ("cube", (64, 8, 16)),
    ("run", (9001,)),
    ("norm", (300,)),
    ("scalar", ()),
    ("empty", (0, 7)),
]


def make(shapes: list[tuple[str, tuple[int, ...]]], seed: int) -> list[torch.Tensor]:
    """Heavy-tailed values, as deltas have."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) ** 3 * 1e-3 for _, shape in shapes]


def sent(codec: Codec, payload: bytes) -> list[torch.Tensor]:
    """What a payload says, as tensors."""
    place = {"first_chunk": 0, "num_chunks": codec.num_chunks}
    codec.check(payload, run=RUN, round=0, **place)
    return codec.decode([codec.reduce([(0, 1.0, payload)], run=RUN, round=0, **place)])


@pytest.mark.parametrize(("k", "bits"), list(itertools.product([1, 64, 4096], [1, 2, 4, 8, 16])))
def test_sent_plus_kept_is_what_was_there(k: int, bits: int) -> None:
    """feedback' = decay * feedback + tensor - sent, to the last bit, element by element."""
    codec = Codec(CodecSpec(k=k, value_bits=bits), SHAPES)
    feedback = codec.error_feedback()
    for round in range(3):
        tensors = make(SHAPES, round)
        before = Codec.error_feedback(codec)
        before.copy_(feedback)
        payload = codec.encode(tensors, feedback, decay=0.95, run=RUN, round=0)
        flat = in_chunk_order(codec, tensors)
        assert torch.equal(
            feedback, before.mul_(0.95).add_(flat) - in_chunk_order(codec, sent(codec, payload))
        )


def in_chunk_order(codec: Codec, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The elements as the error feedback orders them, by the layout's plain description."""
    layout, parts = codec.layout, []
    for chunk in range(layout.num_chunks):
        flat = tensors[int(layout.tensor[chunk])].reshape(-1)
        start, stride, size = int(layout.start[chunk]), int(layout.stride[chunk]), int(layout.size[chunk])
        if stride == 64:
            parts.append(flat[start : start + size])
        else:
            parts += [flat[start + row * stride : start + row * stride + 64] for row in range(64)]
    return torch.cat(parts)


def test_layout_holds_every_element_once() -> None:
    """In chunk order every element of every tensor appears once; blocks come from both matrix axes."""
    layout = Layout(CodecSpec(), SHAPES)
    tensors = [torch.arange(n) + 10**6 * i for i, n in enumerate(layout.numels)]
    codec = Codec(CodecSpec(), SHAPES)
    flat = in_chunk_order(codec, [t.view(s) for t, (_, s) in zip(tensors, SHAPES, strict=True)])
    assert sorted(flat.tolist()) == sorted(torch.cat(tensors).tolist())
    assert flat[64].item() == 192  # second row of the first 64 x 64 block


def test_keeps_the_largest_and_of_equals_the_first() -> None:
    """The kept set is the k largest magnitudes of a chunk; among equal ones the lowest positions win."""
    codec = Codec(CodecSpec(k=4, value_bits=16), [("t", (4096,))])
    tensor = torch.ones(4096)
    tensor[1000], tensor[7] = -3.0, 2.0
    payload = codec.encode([tensor], codec.error_feedback(), decay=1.0, run=RUN, round=0)
    assert sent(codec, payload)[0].nonzero().flatten().tolist() == [0, 1, 7, 1000]


def test_a_short_chunk_keeps_its_share_and_never_padding() -> None:
    """A run of 5000 is a chunk of 4096 and one of 904; the second keeps ceil(64 * 904 / 4096) = 15."""
    codec = Codec(CodecSpec(k=64), [("t", (5000,))])
    payload = codec.encode([torch.randn(5000)], codec.error_feedback(), decay=1.0, run=RUN, round=0)
    found = sent(codec, payload)[0]
    assert (int((found[:4096] != 0).sum()), int((found[4096:] != 0).sum())) == (64, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_and_strides_encode_as_their_fp32_copy(dtype: torch.dtype) -> None:
    """Sources of any float type, transposed or strided, give the bytes of a contiguous fp32 copy."""
    codec = Codec(CodecSpec(k=64), SHAPES)
    plain = [t.to(dtype) for t in make(SHAPES, 5)]
    strided = [t.mT.contiguous().mT if t.ndim == 2 else torch.stack([t, t], -1)[..., 0] for t in plain]
    assert not strided[0].is_contiguous() and not strided[3].is_contiguous()
    one = codec.encode(strided, codec.error_feedback(), decay=1.0, run=RUN, round=0)
    two = codec.encode([t.float() for t in plain], codec.error_feedback(), decay=1.0, run=RUN, round=0)
    assert one == two


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_with_nan_is_named_and_nothing_changes(bad: float) -> None:
    """NaN or infinity anywhere is refused with the tensor's name, with the error feedback as it was."""
    codec = Codec(CodecSpec(), SHAPES)
    tensors, feedback = make(SHAPES, 1), codec.error_feedback()
    codec.encode(tensors, feedback, decay=0.9, run=RUN, round=0)
    before = feedback.clone()
    for index in (0, 3, 4, 5):
        spoiled = [t.clone() for t in tensors]
        spoiled[index].view(-1)[-1] = bad
        with pytest.raises(CompressionError, match=f"'{SHAPES[index][0]}'.*NaN or infinity"):
            codec.encode(spoiled, feedback, decay=0.9, run=RUN, round=0)
        assert torch.equal(feedback, before)


def test_huge_values_are_encoded_though_their_sum_overflows() -> None:
    """Finite values are never mistaken for infinite ones; what a level can't hold stays in the feedback."""
    codec = Codec(CodecSpec(), [("t", (4096,))])
    feedback = codec.error_feedback()
    payload = codec.encode([torch.full((4096,), 3e38)], feedback, decay=1.0, run=RUN, round=0)
    assert torch.isfinite(feedback).all() and torch.isfinite(sent(codec, payload)[0]).all()


def test_zeros_and_tiny_values_stay_put() -> None:
    """A chunk without a representable level sends zeros and keeps everything."""
    codec = Codec(CodecSpec(), [("t", (8192,))])
    tensor = torch.cat([torch.zeros(4096), torch.full((4096,), 1e-38)])
    feedback = codec.error_feedback()
    payload = codec.encode([tensor], feedback, decay=1.0, run=RUN, round=0)
    assert torch.equal(feedback, tensor) and not sent(codec, payload)[0].any()


def test_the_misfit_is_named() -> None:
    """Wrong shapes, counts, feedback sizes, integer tensors and bad places are refused in words."""
    codec = Codec(CodecSpec(), [("weight", (64, 64))])
    feedback, good = codec.error_feedback(), torch.zeros(64, 64)
    for tensors, kept, run, round, text in [
        ([good, good], feedback, RUN, 0, "2 tensors"),
        ([good[:32]], feedback, RUN, 0, "'weight' has shape"),
        ([good.int()], feedback, RUN, 0, "expected a float type"),
        ([good], feedback[:5], RUN, 0, "error feedback"),
        ([good], feedback, b"run", 0, "8 bytes"),
        ([good], feedback, RUN, -1, "round"),
    ]:
        with pytest.raises(CompressionError, match=text):
            codec.encode(tensors, kept, decay=1.0, run=run, round=round)


@pytest.mark.parametrize(("k", "ceiling"), [(32, 11.5), (64, 9.86), (128, 8.75), (256, 7.61)])
def test_size_is_near_the_entropy_floor(k: int, ceiling: float) -> None:
    """Uniform positions, 2-bit: everything included within 0.2 bits of log2 C(4096, k) / k + 2 + 32 / k."""
    codec = Codec(CodecSpec(k=k), [("t", (1024, 1024))])
    payload = codec.encode([torch.randn(1024, 1024)], codec.error_feedback(), decay=1.0, run=RUN, round=0)
    assert len(payload) * 8 / (256 * k) <= ceiling


shapes = st.lists(
    st.lists(st.sampled_from([0, 1, 3, 64, 65, 128]), max_size=3).map(tuple), min_size=1, max_size=4
).map(lambda found: [(f"t{i}", shape) for i, shape in enumerate(found)])


@given(
    shapes=shapes,
    chunk=st.sampled_from([16, 100, 1024, 4096]),
    share=st.floats(0, 1),
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    dense_bits=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_codec_reads_what_it_writes(
    shapes: list[tuple[str, tuple[int, ...]]], chunk: int, share: float, bits: int, dense_bits: int, seed: int
) -> None:
    """Any shapes, chunk, k and widths: the payload checks, and sent + kept = what was there."""
    k = max(1, round(share * chunk))
    codec = Codec(CodecSpec(chunk=chunk, k=k, value_bits=bits, dense_bits=dense_bits), shapes)
    tensors, feedback = make(shapes, seed), codec.error_feedback()
    payload = codec.encode(tensors, feedback, decay=1.0, run=RUN, round=0)
    if codec.num_chunks:
        assert torch.equal(
            feedback, in_chunk_order(codec, tensors) - in_chunk_order(codec, sent(codec, payload))
        )


def test_dct_reads_what_it_writes() -> None:
    """With the transform, the feedback holds the coefficients: transform(tensors) = sent + kept up to
    rounding.
    """
    spec = CodecSpec(transform="dct", k=4096, value_bits=16)
    codec = Codec(spec, SHAPES)
    tensors, feedback = make(SHAPES, 3), codec.error_feedback()
    payload = codec.encode(tensors, feedback, decay=1.0, run=RUN, round=0)
    for tensor, found in zip(tensors, sent(codec, payload), strict=True):
        assert torch.allclose(tensor, found, atol=1e-5, rtol=1e-3)


def test_specs_name_what_is_wrong() -> None:
    """A bad field is refused by its name with the allowed values; a dict goes through from_dict unchanged."""
    spec = CodecSpec(k=128, transform="dct", aggregate_k=256)
    assert CodecSpec.from_dict(spec.to_dict()) == spec
    for settings_, text in [
        ({"k": 0}, "k must be"),
        ({"k": 5000}, "k must be"),
        ({"value_bits": 3}, "value_bits must be one of 1, 2, 4, 8, 16"),
        ({"value_bits": True}, "value_bits"),
        ({"transform": "fft"}, "transform"),
        ({"chunk": 2.5}, "chunk"),
        ({"chunk": 1024, "transform": "dct"}, "4096"),
        ({"topk": 3}, "unknown codec setting 'topk'"),
    ]:
        with pytest.raises(CompressionError, match=text):
            CodecSpec.from_dict(settings_)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (16, 1e-3), (32, 0.0)])
def test_a_dense_codec_sends_everything(bits: int, error: float) -> None:
    """kind "dense": every element arrives within the format's precision, the feedback keeps the rest to the bit."""
    codec = Codec(CodecSpec(kind="dense", dense_bits=bits), SHAPES)
    tensors, feedback = make(SHAPES, 2), codec.error_feedback()
    payload = codec.encode(tensors, feedback, decay=0.0, run=RUN, round=0)
    assert len(payload) <= codec.num_params * bits / 8 * 1.04 + 64
    found = sent(codec, payload)
    for tensor, arrived in zip(tensors, found, strict=True):
        assert float((tensor - arrived).norm()) <= error * float(tensor.norm())
    assert torch.equal(feedback, in_chunk_order(codec, tensors) - in_chunk_order(codec, found))


def test_blockwise_codes_are_the_nearest() -> None:
    """8 bit: every element gets the nearest of the 256 values, which are those of bitsandbytes."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1)).numpy() ** 3
    largest, codes = dense.quantize(values, 8, np.arange(0, 4096, 256))
    distance = np.abs(dense.dynamic_map()[None, :] - (values / np.repeat(largest, 256))[:, None])
    assert np.allclose(distance[np.arange(4096), codes], distance.min(1), rtol=0, atol=1e-7)
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = np.sort(functional.create_dynamic_map().numpy())
    assert np.allclose(dense.dynamic_map(), theirs, rtol=0, atol=1e-6)
