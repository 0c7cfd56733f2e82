"""Body of a payload: a table of group lengths, the groups, then the dense chunks. See WIRE.md, "Body"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.compression.bits import MAX_RICE
from dtrain.compression.dense import SCALE_BYTES
from dtrain.compression.errors import PayloadError
from dtrain.compression.layout import Layout

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Section:
    """Where things are in one body; built by `SectionFormat.parse`, which has checked every length."""

    first_group: int
    end_group: int
    first_dense: int
    end_dense: int
    data: Bytes
    """The whole body, without a copy."""
    bounds: Ints
    """Offset in `data` of every group and the end of the last, [groups + 1]."""

    def group(self, group: int) -> Bytes:
        """The bytes of one group, by its number in the whole layout."""
        i = group - self.first_group
        return self.data[self.bounds[i] : self.bounds[i + 1]]

    @property
    def dense(self) -> Bytes:
        """The bytes of all dense chunks of the range."""
        return self.data[self.bounds[-1] :]


class SectionFormat:
    """What a layout, a k and the value bits say about sizes: kept counts, table width, longest group."""

    def __init__(self, layout: Layout, k: int, value_bits: int, dense_bits: int) -> None:
        self.layout = layout
        self.k = k
        self.value_bits = value_bits
        self.dense_bits = dense_bits
        size = layout.size[: layout.num_sparse]
        self.kept: Ints = -(-k * size // layout.chunk)
        """Coefficients kept of each sparse chunk, [sparse chunks]; at least 1."""
        self.kept_before: Ints = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.kept)])
        edges = layout.group_edges
        num_chunks = np.diff(edges)
        self.group_kept: Ints = np.diff(self.kept_before[edges])
        """Coefficients kept in each group, [groups]."""
        self.fixed_bytes: Ints = self._fixed_bytes(num_chunks, self.group_kept)
        """Bytes of each group before its index stream: exponent, Rice parameter, scales, ratios, values,
        [groups].
        """
        skipped = np.diff(layout.offset[edges]) - self.group_kept
        self.group_bounds: Ints = self.fixed_bytes + _index_bound(self.group_kept, skipped)
        """Bytes that no group with the best Rice parameter exceeds, [groups]."""
        full = np.asarray([layout.group], np.int64)
        longest = self._fixed_bytes(full, full * k) + _index_bound(full * k, full * (layout.chunk - k))
        self.max_group_bytes = int(longest[0])
        self.table_dtype = np.dtype("<u2") if self.max_group_bytes < 2**16 else np.dtype("<u4")

    def _fixed_bytes(self, num_chunks: Ints, kept: Ints) -> Ints:
        per_chunk = 1 if self.value_bits == 1 else 2
        return np.asarray(2 + per_chunk * num_chunks + (kept * self.value_bits + 7) // 8, dtype=np.int64)

    def _dense_bytes(self, first: int, end: int) -> int:
        """Bytes that dense chunks first to end (ids) take."""
        elements = int(self.layout.offset[end] - self.layout.offset[first])
        return elements * self.dense_bits // 8 + SCALE_BYTES[self.dense_bits] * (end - first)

    def max_bytes(self, first_chunk: int, num_chunks: int) -> int:
        """Bytes that the body of no well-coded section of this range exceeds."""
        first_group, end_group, first_dense, end_dense = self.layout.split(first_chunk, num_chunks)
        groups = int(self.group_bounds[first_group:end_group].sum())
        table = self.table_dtype.itemsize * (end_group - first_group)
        return table + groups + self._dense_bytes(first_dense, end_dense)

    def parse(self, body: memoryview | bytes, first_chunk: int, num_chunks: int) -> Section:
        """Find the groups of a body that covers this range (which must be a valid one).

        Raises PayloadError: "bad-length", "group-length".
        """
        first_group, end_group, first_dense, end_dense = self.layout.split(first_chunk, num_chunks)
        num_groups = end_group - first_group
        data = np.frombuffer(body, np.uint8)
        table_bytes = num_groups * self.table_dtype.itemsize
        dense_part = self._dense_bytes(first_dense, end_dense)
        if len(data) < table_bytes + dense_part:
            raise PayloadError(
                "bad-length", f"a body of {len(data)} bytes is too short for {num_chunks} chunks"
            )
        lengths = data[:table_bytes].view(self.table_dtype).astype(np.int64)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]) + table_bytes
        if int(bounds[-1]) + dense_part != len(data):
            raise PayloadError("bad-length", f"the parts of a body of {len(data)} bytes do not add up")
        if num_groups and (int(lengths.max()) > self.max_group_bytes or int(lengths.min()) < 2):
            raise PayloadError("group-length", f"group lengths must be 2 to {self.max_group_bytes} bytes")
        return Section(first_group, end_group, first_dense, end_dense, data, bounds)

    def join(
        self, lengths: Ints, groups: Sequence[bytes | memoryview], dense: bytes
    ) -> list[bytes | memoryview]:
        """Parts of a body from the groups' lengths, their bytes (in any pieces) and the dense bytes."""
        return [lengths.astype(self.table_dtype).tobytes(), *groups, dense]

    def cut(self, section: Section, first_chunk: int, num_chunks: int) -> list[bytes | memoryview]:
        """Parts of the body that covers only these chunks, which must lie within the section's."""
        first_group, end_group, first_dense, end_dense = self.layout.split(first_chunk, num_chunks)
        bounds = section.bounds[first_group - section.first_group : end_group - section.first_group + 1]
        groups = section.data[bounds[0] : bounds[-1]].tobytes()
        width, offset = SCALE_BYTES[self.dense_bits], self.layout.offset
        before, chunks = first_dense - section.first_dense, end_dense - first_dense
        scales = section.dense[width * before : width * (before + chunks)]
        elements = section.dense[width * (section.end_dense - section.first_dense) :]
        begin, end = (
            int(offset[chunk] - offset[section.first_dense]) * self.dense_bits // 8
            for chunk in (first_dense, end_dense)
        )
        dense = b"".join([scales.tobytes(), elements[begin:end].tobytes()])
        return self.join(np.diff(bounds), [groups], dense)

    def nominal_bits(self) -> Ints:
        """Expected size in bits of every unit that a span can hold: groups, then dense chunks.

        Whole numbers, so that every machine divides a payload into the same spans.
        """
        layout = self.layout
        index_bits = max(1, layout.chunk // self.k).bit_length() + 1
        groups = 8 * self.fixed_bytes + self.group_kept * index_bits + 8 * self.table_dtype.itemsize
        dense = layout.size[layout.num_sparse :] * self.dense_bits + 8
        return np.concatenate([groups, dense])


def _index_bound(kept: Ints, skipped: Ints) -> Ints:
    """Most bytes that the gaps of groups take with the best Rice parameter: `skipped` positions lie between
    kept ones.

    One byte more than the bits need, as the two streams are padded apart.
    """
    bits = [kept * (r + 1) + (skipped >> r) for r in range(MAX_RICE + 1)]
    return np.asarray((np.min(bits, axis=0) + 7) // 8 + 1, dtype=np.int64)
