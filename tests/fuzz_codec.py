"""The codec as the fuzzers use it: a few of its kinds, good payloads and aggregates of each, and everything that reads
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from wire_tools import checked, make_aggregates, make_payload, place_of, reseal

from dtrain.compression import wire
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels.reference import ReferenceKernel
from dtrain.compression.spec import CodecSpec

SHAPES = [("matrix", (128, 128)), ("run", (5000,)), ("norm", (300,))]
SPECS = [
    CodecSpec(k=16),
    CodecSpec(k=600, value_bits=1, dense_bits=8),
    CodecSpec(k=64, value_bits=4, transform="dct", aggregate_k=100, aggregate_bits=1),
    CodecSpec(chunk=64, k=9, value_bits=16, dense_bits=32),
    CodecSpec(kind="dense", dense_bits=8),
    CodecSpec(kind="dense", dense_bits=16),
]
CODECS = [Codec(spec, SHAPES) for spec in SPECS]
PLAIN = [Codec(spec, SHAPES, kernel=ReferenceKernel()) for spec in SPECS]
SOURCES = [[make_payload(codec), *make_aggregates(codec)] for codec in CODECS]


def readers(codec: Codec, data: bytes) -> list[Callable[[], object]]:
    """Everything that reads bytes, also what callers should check first."""
    whole = 0, codec.num_chunks
    return [
        lambda: wire.open_header(data, (wire.PAYLOAD, wire.UNION, wire.RECOMPRESSED)),
        lambda: wire.section_length(memoryview(data)),
        lambda: codec.contributors(data),
        lambda: codec.open_section(data),
        lambda: codec.cut(data, *whole),
        lambda: codec.give_back(codec.error_feedback(), data, *whole),
        lambda: codec.decode([data]),
        lambda: codec.reduce([(0, 1.0, data)], residual=codec.residual(*whole), **place_of(codec)),  # type: ignore[arg-type]
    ]


def offer(index: int, data: bytes, *, everywhere: bool) -> str:
    """To all readers; `everywhere`: also to the reference, which must refuse for the same reason."""
    reason = checked(CODECS[index], data)
    for read in readers(CODECS[index], data):
        with suppress(PayloadError), np.errstate(all="ignore"):  # an unchecked dense value may be infinite
            read()
    if everywhere:
        assert checked(PLAIN[index], data) == reason
    return reason


def read_payload(data: bytes) -> str:
    """Bytes as they come, and with a right length and checksum: data[0] says to which codec."""
    index, data = (data[0] if data else 0) % len(CODECS), data[1:]
    if not checked(CODECS[index], data):
        return ""
    return offer(index, reseal(data), everywhere=False)
