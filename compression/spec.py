"""The settings of a codec: what all peers of a run must agree on to read each other's bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.compression.errors import CompressionError

KINDS = ("topk", "dense")
VALUE_BITS = (1, 2, 4, 8, 16)
TRANSFORMS = ("none", "dct")
INDEX_CODERS = ("auto", "rice")
DENSE_BITS = (8, 16, 32)
BLOCK_SIDE = 64  # matrices are cut into blocks of 64 x 64 when a chunk has 4096 elements
MIN_CHUNK, MAX_CHUNK = 16, 65536


@dataclass(frozen=True)
class CodecSpec:
    """How tensors are cut, what is kept of each chunk and how it is written. Part of a run's manifest."""

    kind: str = "topk"
    """"topk" sends the largest coefficients of every chunk; "dense" sends every element with `dense_bits`."""

    chunk: int = 4096
    """Elements per chunk, 16 to 65536. With 4096, matrices are cut into 64 x 64 blocks where they divide
    evenly.
    """

    k: int = 64
    """Coefficients kept of each full chunk, 1 to `chunk`; a short chunk keeps its share, rounded up."""

    value_bits: int = 2
    """Bits per kept value: 1 (sign), 2 (sign and two levels), 4, 8 or 16 (sign and 8, 128 or 32768 even
    levels).
    """

    transform: str = "none"
    """"dct" selects in the domain of a 64 x 64 discrete cosine transform (chunk 4096 only); "none" selects as
    it is.
    """

    index_coder: str = "auto"
    """How positions are written; "auto" takes the best coder known to this version of the format ("rice")."""

    dense_bits: int = 16
    """How tensors with fewer than `chunk` elements travel, or all: 16 = fp16, 8 = blockwise 8 bit, 32 = fp32."""

    aggregate_k: int = 0
    """Coefficients per full chunk of a recompressed aggregate; 0 = the same as `k`."""

    aggregate_bits: int = 0
    """Value bits of a recompressed aggregate; 0 = the same as `value_bits`."""

    def __post_init__(self) -> None:
        _choice("kind", self.kind, KINDS)
        _whole("chunk", self.chunk, MIN_CHUNK, MAX_CHUNK)
        _whole("k", self.k, 1, self.chunk)
        _choice("value_bits", self.value_bits, VALUE_BITS)
        _choice("transform", self.transform, TRANSFORMS)
        _choice("index_coder", self.index_coder, INDEX_CODERS)
        _choice("dense_bits", self.dense_bits, DENSE_BITS)
        _whole("aggregate_k", self.aggregate_k, 0, self.chunk)
        _choice("aggregate_bits", self.aggregate_bits, (0, *VALUE_BITS))
        if self.transform == "dct" and self.chunk != BLOCK_SIDE**2:
            raise CompressionError(f'transform "dct" needs chunk = {BLOCK_SIDE**2}, not {self.chunk}')

    @property
    def of_aggregates(self) -> tuple[int, int]:
        """Coefficients per full chunk and value bits of a recompressed aggregate."""
        return self.aggregate_k or self.k, self.aggregate_bits or self.value_bits

    def to_dict(self) -> dict[str, object]:
        """The fields as plain values, in the order of their declaration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, object]) -> CodecSpec:
        """Build a spec from plain values; missing fields take their defaults, unknown ones are refused by
        name.
        """
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        for name in d:
            if name not in known:
                raise CompressionError(f"unknown codec setting {name!r}; known: {', '.join(known)}")
        return cls(**d)  # type: ignore[arg-type]  # __post_init__ checks every value's type


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CompressionError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed or type(value) is not type(allowed[0]):
        raise CompressionError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
