"""Header of payloads and aggregates, wire format version 1. WIRE.md is the whole format on one page."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.compression.errors import PayloadError
from dtrain.compression.spec import CodecSpec

MAGIC = b"DTRN"
VERSION = 1
PAYLOAD, UNION, RECOMPRESSED = 1, 2, 3  # kinds
# Why a reducer has left a member out of a recompressed sum: what the section says beside the others' (screen.py), that
# it breaks the format, that it came too late.
REFUSALS = ("norm", "empty", "against", "malformed", "late")
_REFUSAL_WEIGHTS = tuple(-1.0 - place for place in range(len(REFUSALS)))  # in place of tokens
RUN_TAG_BYTES = 8
CODEC_ID_BYTES = 8
MAX_ROUND = 2**32 - 1
MAX_CONTRIBUTORS = 2**16 - 1
_HEADER = struct.Struct("<4sBBH8s8sIIIIQ")
_CONTRIBUTOR = np.dtype([("index", "<u2"), ("weight", "<f8")])
HEADER_BYTES = _HEADER.size
CONTRIBUTOR_BYTES = _CONTRIBUTOR.itemsize
_CHECKSUM_AT = 36  # offset of the checksum in the header
MIN_WEIGHT, MAX_WEIGHT = (
    1e-9,
    1e15,
)  # weights are counts of tokens; these bounds keep normalized weights in fp32 range


@dataclass(frozen=True)
class Header:
    """What the first 48 bytes say; `body_bytes` has been compared with what is really there."""

    kind: int
    num_contributors: int
    codec_id: bytes
    run: bytes
    round: int
    first_chunk: int
    num_chunks: int
    body_bytes: int


def codec_id(spec: CodecSpec, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    """First 8 bytes of the SHA-256 of the spec and the shapes as compact JSON: both sides must agree."""
    text = json.dumps([VERSION, spec.to_dict(), [[n, list(s)] for n, s in shapes]], separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:CODEC_ID_BYTES]


def seal(
    kind: int,
    codec: bytes,
    run: bytes,
    round: int,
    chunks: tuple[int, int],
    parts: Sequence[bytes | memoryview],
    num: int = 0,
) -> bytes:
    """Put a header with the checksum before the parts of a body. `num` is the number of contributors
    (aggregates).
    """
    body_bytes = sum(len(part) for part in parts)
    head = _HEADER.pack(MAGIC, VERSION, kind, num, codec, run, round, chunks[0], chunks[1], 0, body_bytes)
    checksum = zlib.crc32(head)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    head = _HEADER.pack(
        MAGIC, VERSION, kind, num, codec, run, round, chunks[0], chunks[1], checksum, body_bytes
    )
    return b"".join([head, *parts])


def open_header(
    data: bytes | memoryview, kinds: Sequence[int], *, checksum: bool = True
) -> tuple[Header, memoryview]:
    """Check a header and, unless that has been done, the checksum; returns the header with the body.

    Raises PayloadError: "too-short", "bad-magic", "bad-version", "bad-kind", "bad-length", "bad-checksum".
    """
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise PayloadError("too-short", f"{len(view)} bytes are fewer than a header's {HEADER_BYTES}")
    magic, version, kind, num, codec, run, round, first, count, found, body_bytes = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError("bad-magic", f"begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise PayloadError("bad-version", f"format version {version}; this codec reads version {VERSION}")
    if kind not in kinds:
        raise PayloadError("bad-kind", f"kind {kind}, expected one of {list(kinds)}")
    body = view[HEADER_BYTES:]
    if len(body) != body_bytes:
        raise PayloadError("bad-length", f"the header claims {body_bytes} bytes of body, {len(body)} came")
    if checksum:
        head = bytearray(view[:HEADER_BYTES])
        head[_CHECKSUM_AT : _CHECKSUM_AT + 4] = bytes(4)
        if zlib.crc32(body, zlib.crc32(head)) != found:
            raise PayloadError("bad-checksum", "the bytes are not those that were sent")
    return Header(kind, num, codec, run, round, first, count, body_bytes), body


def match_header(
    head: Header, *, codec: bytes, run: bytes, round: int, first_chunk: int, num_chunks: int
) -> None:
    """Compare a header with what is expected here.

    Raises PayloadError: "wrong-codec", "wrong-run", "wrong-round", "wrong-range".
    """
    if head.codec_id != codec:
        raise PayloadError("wrong-codec", "coded with another spec or for other tensors than this run's")
    if head.run != run:
        raise PayloadError("wrong-run", f"of run {head.run.hex()}, this is {run.hex()}")
    if head.round != round:
        raise PayloadError("wrong-round", f"of round {head.round}, this is {round}")
    if (head.first_chunk, head.num_chunks) != (first_chunk, num_chunks):
        there, here = f"{head.first_chunk} + {head.num_chunks}", f"{first_chunk} + {num_chunks}"
        raise PayloadError("wrong-range", f"covers chunks {there}, expected {here}")


def pack_contributors(
    contributors: Sequence[tuple[int, float]], refused: Mapping[int, str] | None = None
) -> bytes:
    """Index and weight of each contributor, ascending by index: u16 and f64 each. Among them whoever is `refused`
    {index: one of REFUSALS}, with a weight of -1, -2, ...
    """
    codes = {index: _REFUSAL_WEIGHTS[REFUSALS.index(reason)] for index, reason in (refused or {}).items()}
    return np.array(sorted([*contributors, *codes.items()]), _CONTRIBUTOR).tobytes()


def unpack_contributors(head: Header, body: memoryview) -> tuple[list[tuple[int, float]], memoryview]:
    """Contributors of an aggregate and the rest of its body.

    Raises PayloadError: "bad-length", "bad-contributors" (none, not ascending, a weight out of range, or a refusal
    that does not exist).
    """
    found, rest = _entries(head, body)
    contributors = found[found["weight"] > 0]
    if not contributors.size:
        raise PayloadError("bad-contributors", "an aggregate names at least one contributor")
    return contributors.tolist(), rest


def unpack_refused(head: Header, body: memoryview) -> dict[int, str]:
    """Whom the reducer has refused, and why. Raises what `unpack_contributors` does."""
    found = _entries(head, body)[0]
    return {index: REFUSALS[-int(weight) - 1] for index, weight in found[found["weight"] < 0].tolist()}


def _entries(head: Header, body: memoryview) -> tuple[NDArray[np.void], memoryview]:
    size = head.num_contributors * CONTRIBUTOR_BYTES
    if len(body) < size:
        raise PayloadError(
            "bad-length", f"{len(body)} bytes are too few for {head.num_contributors} contributors"
        )
    found = np.frombuffer(body, _CONTRIBUTOR, head.num_contributors)
    indices, weights = found["index"], found["weight"]
    descents = np.flatnonzero(indices[1:] <= indices[:-1])
    if descents.size:
        at = descents[0]
        raise PayloadError("bad-contributors", f"index {indices[at + 1]} after {indices[at]}")
    for index, weight in found[~((weights >= MIN_WEIGHT) & (weights <= MAX_WEIGHT))].tolist():
        if head.kind != RECOMPRESSED or weight not in _REFUSAL_WEIGHTS:
            raise PayloadError("bad-contributors", f"weight {weight} of contributor {index} is out of range")
    return found, body[size:]


def section_length(body: memoryview) -> int:
    """Length of the sealed payload that `body` begins with, header included. Raises PayloadError
    "bad-length".
    """
    if len(body) < HEADER_BYTES:
        raise PayloadError("bad-length", f"{len(body)} bytes are fewer than a section's header")
    length = HEADER_BYTES + int(_HEADER.unpack_from(body)[-1])
    if length > len(body):
        raise PayloadError("bad-length", f"a section claims {length} bytes, {len(body)} are left")
    return length
