"""Laws of the wire format: nothing from the network is believed, and every refusal has a name."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression import codec as codec_module
from dtrain.compression import wire
from dtrain.compression.bits import packed_bytes
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels.reference import ReferenceKernel
from dtrain.compression.spec import CodecSpec

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
SHAPES = [("matrix", (128, 128)), ("run", (5000,)), ("norm", (300,))]
CODEC = Codec(CodecSpec(k=16), SHAPES)
PLAIN = Codec(CodecSpec(k=16), SHAPES, kernel=ReferenceKernel())
WHOLE = {"first_chunk": 0, "num_chunks": CODEC.num_chunks}
PLACE = {"run": RUN, "round": 7, **WHOLE}


def make_payload(seed: int = 0, codec: Codec = CODEC) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for _, shape in codec.shapes]
    return codec.encode(tensors, codec.error_feedback(), decay=1.0, run=RUN, round=7)


PAYLOAD = make_payload()
UNION = CODEC.reduce([(0, 2.0, PAYLOAD), (2, 1.0, make_payload(1))], **PLACE)
RECOMPRESSED = CODEC.reduce(
    [(0, 2.0, PAYLOAD), (2, 1.0, make_payload(1))], residual=CODEC.residual(0, CODEC.num_chunks), **PLACE
)


def reseal(data: bytes) -> bytes:
    """Give mutated bytes a right length and checksum, so that the checks behind these are reached."""
    head, body = bytearray(data[: wire.HEADER_BYTES]), data[wire.HEADER_BYTES :]
    if len(head) < wire.HEADER_BYTES:
        return data
    struct.pack_into("<IQ", head, 36, 0, len(body))
    struct.pack_into("<I", head, 36, zlib.crc32(body, zlib.crc32(head)))
    return bytes(head) + body


def refusal(data: bytes, *, everywhere: bool = True) -> str:
    """Offer bytes to the readers: the reason if the checks refuse them, else "" (then they decode).

    everywhere: also to the reference, which must say the same.
    """
    reason = _refusal(CODEC, data)
    assert not everywhere or _refusal(PLAIN, data) == reason
    return reason


def _refusal(codec: Codec, data: bytes) -> str:
    kind = data[5] if len(data) > 5 else 0
    try:
        if kind == wire.PAYLOAD:
            codec.check(data, **PLACE)
            found = codec.decode([codec.reduce([(0, 1.0, data)], **PLACE)])
        else:
            codec.check_aggregate(data, **PLACE, num_members=3)
            found = codec.decode([data])
    except PayloadError as error:
        assert error.reason and str(error).startswith(error.reason + ": ")
        return error.reason
    assert all(bool(torch.isfinite(t).all()) for t in found)
    return ""


def test_good_bytes_pass() -> None:
    """A payload and both kinds of aggregate pass their own checks."""
    assert [refusal(data) for data in (PAYLOAD, UNION, RECOMPRESSED)] == ["", "", ""]


@given(
    which=st.sampled_from([PAYLOAD, UNION, RECOMPRESSED]),
    edits=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(-40, 40),
    honest=st.booleans(),
)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_mutated_bytes_are_refused_or_harmless(
    which: bytes, edits: list[tuple[int, int]], cut: int, honest: bool
) -> None:
    """Any edit and truncation ends in a named refusal or in finite values; no other exception gets out."""
    data = bytearray(which[:cut] if cut < 0 else which + bytes(cut))
    for position, value in edits:
        data[position % len(data)] = value
    refusal(reseal(bytes(data)) if honest else bytes(data))


def test_many_mutations_do_no_harm() -> None:
    """20,000 payloads in all with the tests around this one: flipped bits and spliced bytes, honestly resealed."""
    generator = np.random.default_rng(0)
    sources = [PAYLOAD, UNION, RECOMPRESSED]
    reasons = set()
    for i in range(18_800):
        data = np.frombuffer(sources[i % 3], np.uint8).copy()
        for place in generator.integers(wire.HEADER_BYTES if i % 4 else 0, len(data), 1 + i % 3):
            data[place] = generator.integers(256) if i % 2 else data[place] ^ (1 << generator.integers(8))
        if i % 5 == 0:  # a run of bytes moves elsewhere
            size = int(generator.integers(1, 40))
            a, b = generator.integers(0, len(data) - size, 2)
            data[a : a + size] = data[b : b + size].copy()
        reasons.add(refusal(reseal(data.tobytes()), everywhere=i % 20 == 0))
    assert {
        "",
        "bad-padding",
        "bad-length",
        "index-out-of-range",
        "wrong-codec",
        "bad-contributors",
    } <= reasons


@given(data=st.binary(max_size=300), kind=st.integers(0, 4))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_noise_is_refused(data: bytes, kind: int) -> None:
    """Random bytes behind a right header are refused by name."""
    head = bytearray(PAYLOAD[: wire.HEADER_BYTES])
    head[5] = kind
    assert refusal(data) and refusal(reseal(bytes(head) + data))


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"NOPE", "bad-magic"),
        (4, b"\x63", "bad-version"),
        (5, b"\x09", "bad-kind"),
        (8, bytes(8), "wrong-codec"),
        (16, bytes(8), "wrong-run"),
        (24, struct.pack("<I", 8), "wrong-round"),
        (28, struct.pack("<I", 1), "wrong-range"),
        (32, struct.pack("<I", 2**32 - 1), "wrong-range"),
        (40, struct.pack("<Q", 2**40), "bad-length"),
        (60, b"\xff\xff", "bad-checksum"),
    ],
)
def test_each_field_of_the_header_is_checked(at: int, value: bytes, reason: str) -> None:
    """A wrong field is refused with the reason that names it; a claim of 2**40 bytes costs nothing."""
    data = PAYLOAD[:at] + value + PAYLOAD[at + len(value) :]
    assert refusal(data if reason in ("bad-length", "bad-checksum") else reseal(data)) == reason


def test_each_part_of_a_group_is_checked() -> None:
    """Exponent, Rice parameter, table and index stream of a group, each with its own reason."""
    table = wire.HEADER_BYTES
    group = table + 2  # k = 16 makes one group of 6 chunks
    fixed = int(CODEC.payload_format.fixed_bytes[0])
    low = packed_bytes(int(CODEC.payload_format.group_kept[0]), PAYLOAD[group + 1])
    for at, value, reason in [
        (group, b"\x01", "bad-scale"),
        (group + 1, b"\x20", "bad-rice"),
        (table, b"\xff\xff", "bad-length"),
        (group + fixed + low, bytes(4), "bad-length"),
        (group + fixed + low, b"\xff\xff\xff", "bad-padding"),
    ]:
        assert refusal(reseal(PAYLOAD[:at] + value + PAYLOAD[at + len(value) :])) == reason
    far = bytearray(PAYLOAD)
    far[group + 1] = 16  # the same stream read with longer fields either runs out or points beyond the chunk
    assert refusal(reseal(bytes(far))) in ("bad-length", "index-out-of-range", "bad-padding")


def test_an_index_beyond_the_chunk_is_refused() -> None:
    """A stream of the right length whose last position lies beyond its chunk is refused as out of range."""
    codec = Codec(CodecSpec(chunk=64, k=1, value_bits=1), [("t", (64,))])
    payload = codec.encode([torch.eye(64)[63]], codec.error_feedback(), decay=1.0, run=RUN, round=7)
    group = wire.HEADER_BYTES + 2
    assert payload[group + 1] == 5  # the gap of 63 is written as 31 + 1 * 32: one byte of low bits, then 0b10
    assert payload[-1] == 2
    with pytest.raises(PayloadError) as caught:
        far = reseal(payload[:-1] + b"\x04")
        codec.check(far, run=RUN, round=7, first_chunk=0, num_chunks=1)
    assert caught.value.reason == "index-out-of-range"


def test_contributors_are_checked() -> None:
    """Indices must ascend and be members; weights must be positive and finite."""
    at = wire.HEADER_BYTES
    for offset, value, reason in [
        (0, struct.pack("<H", 2), "bad-contributors"),
        (10, struct.pack("<H", 3), "bad-contributors"),
        (2, struct.pack("<d", -1.0), "bad-contributors"),
        (2, struct.pack("<d", float("nan")), "bad-contributors"),
        (2, struct.pack("<d", float("inf")), "bad-contributors"),
    ]:
        data = UNION[: at + offset] + value + UNION[at + offset + len(value) :]
        assert refusal(reseal(data)) == reason
    none = UNION[:6] + bytes(2) + UNION[8:]
    assert refusal(reseal(none)) == "bad-contributors"


def test_header_is_under_a_thousandth_of_a_real_payload() -> None:
    """48 bytes against the payload of 1M parameters at k = 256."""
    codec = Codec(CodecSpec(k=256), [("t", (1024, 1024))])
    assert 0.001 * len(make_payload(codec=codec)) > wire.HEADER_BYTES


def test_every_reason_is_documented() -> None:
    """WIRE.md lists every reason that the code can give."""
    folder = Path(codec_module.__file__).parent
    sources = "".join(path.read_text() for path in folder.rglob("*.py"))
    reasons = set(re.findall(r'PayloadError\(\s*"([a-z-]+)"', sources))
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", (folder / "WIRE.md").read_text(), re.MULTILINE))
    assert reasons and reasons == documented
