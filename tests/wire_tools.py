"""Payloads and aggregates to spoil, and bytes made consistent again after spoiling them."""

from __future__ import annotations

import struct
import zlib

import torch

from dtrain.compression import wire
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError

RUN = b"\x01\x02\x03\x04\x05\x06\x07\x08"
ROUND = 7


def make_payload(codec: Codec, seed: int = 0) -> bytes:
    """A payload of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for _, shape in codec.shapes]
    return codec.encode(tensors, codec.error_feedback(), decay=1.0, run=RUN, round=ROUND)


def make_aggregates(codec: Codec) -> list[bytes]:
    """An exact union and a recompressed aggregate of contributors 0 and 2."""
    sections = [(0, 2.0, make_payload(codec)), (2, 1.0, make_payload(codec, 1))]
    residuals = None, codec.residual(0, codec.num_chunks)
    return [codec.reduce(sections, residual=residual, **place_of(codec)) for residual in residuals]  # type: ignore[arg-type]


def place_of(codec: Codec) -> dict[str, object]:
    """What `check` and `reduce` are told: the run, the round and all chunks."""
    return {"run": RUN, "round": ROUND, "first_chunk": 0, "num_chunks": codec.num_chunks}


def reseal(data: bytes) -> bytes:
    """Give mutated bytes a right length and checksum, so that the checks behind these are reached."""
    head, body = bytearray(data[: wire.HEADER_BYTES]), data[wire.HEADER_BYTES :]
    if len(head) < wire.HEADER_BYTES:
        return data
    struct.pack_into("<IQ", head, 36, 0, len(body))
    struct.pack_into("<I", head, 36, zlib.crc32(body, zlib.crc32(head)))
    return bytes(head) + body


def checked(codec: Codec, data: bytes) -> str:
    """Offer bytes as a network does, checks first: the reason of the refusal, or "" if what decodes is finite."""
    place = place_of(codec)
    try:
        if len(data) > 5 and data[5] == wire.PAYLOAD:
            codec.check(data, **place)  # type: ignore[arg-type]
            found = codec.decode([codec.reduce([(0, 1.0, data)], **place)])  # type: ignore[arg-type]
        else:
            codec.check_aggregate(data, **place, num_members=3)  # type: ignore[arg-type]
            found = codec.decode([data])
    except PayloadError as error:
        assert error.reason and str(error).startswith(error.reason + ": ")
        return error.reason
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
    return ""
