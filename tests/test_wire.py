"""Laws of the wire format: nothing from the network is believed, and every refusal has a name."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch
from wire_tools import RUN, checked, make_aggregates, make_payload, reseal

from dtrain.compression import codec as codec_module
from dtrain.compression import wire
from dtrain.compression.bits import packed_bytes
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels.reference import ReferenceKernel
from dtrain.compression.spec import CodecSpec

SHAPES = [("matrix", (128, 128)), ("run", (5000,)), ("norm", (300,))]
CODEC = Codec(CodecSpec(k=16), SHAPES)
PLAIN = Codec(CodecSpec(k=16), SHAPES, kernel=ReferenceKernel())
PAYLOAD = make_payload(CODEC)
UNION, RECOMPRESSED = make_aggregates(CODEC)


def refusal(data: bytes) -> str:
    """The reason for which bytes are refused, the reference's too; "" if they pass and decode."""
    reason = checked(CODEC, data)
    assert checked(PLAIN, data) == reason
    return reason


def test_good_bytes_pass() -> None:
    """A payload and both kinds of aggregate pass their own checks."""
    assert [refusal(data) for data in (PAYLOAD, UNION, RECOMPRESSED)] == ["", "", ""]


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
    assert 0.001 * len(make_payload(codec)) > wire.HEADER_BYTES


def test_every_reason_is_documented() -> None:
    """WIRE.md lists every reason that the code can give."""
    folder = Path(codec_module.__file__).parent
    sources = "".join(path.read_text() for path in folder.rglob("*.py"))
    reasons = set(re.findall(r'PayloadError\(\s*"([a-z-]+)"', sources))
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", (folder / "WIRE.md").read_text(), re.MULTILINE))
    assert reasons and reasons == documented
