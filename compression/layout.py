"""How a list of tensors is cut into numbered chunks, and chunks into groups.

Chunk ids run over the sparse chunks of all tensors first (top-k coded), then over the dense chunks of the
small tensors. A sparse chunk is a 64 x 64 block of a matrix or a run of `chunk` elements of the flattened
tensor. Both are described by a start and a row stride, so that kernels need no case for each: a full run of
4096 is 64 rows of 64 with stride 64.

A group is the unit that the wire format can cut: up to `group` consecutive sparse chunks that share one bit
stream, or one dense chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.errors import CompressionError
from dtrain.compression.spec import BLOCK_SIDE, CodecSpec

Shapes = Sequence[tuple[str, tuple[int, ...]]]
Ints = npt.NDArray[np.int64]

DENSE_CHUNK = 256  # most elements of a dense chunk
GROUP_COEFFICIENTS = (
    1024  # a group aims at this many: its fixed costs (about 5 bytes) are then under 0.04 bit each
)
MAX_GROUP_CHUNKS = 64


class Layout:
    """Chunks of `shapes` under `spec`: for each chunk its tensor, first element, row stride, length and
    offset.

    All arrays are indexed by chunk id, int64: `tensor` index into shapes; `start` first element within the
    flattened tensor; `stride` elements from one row of 64 to the next (64 for runs); `size` number of
    elements; `offset` position in the 1-D error feedback, which holds every element exactly once in chunk
    order.
    """

    def __init__(self, spec: CodecSpec, shapes: Shapes) -> None:
        self.chunk = spec.chunk
        self.group = max(1, min(MAX_GROUP_CHUNKS, GROUP_COEFFICIENTS // spec.k))
        self.shapes = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in shapes)
        for name, shape in self.shapes:
            if any(n < 0 for n in shape):
                raise CompressionError(f"tensor {name!r} has a negative dimension in its shape {shape}")
        self.numels = tuple(math.prod(shape) for _, shape in self.shapes)
        self.num_params = sum(self.numels)
        sparse: list[tuple[Ints, Ints, Ints, Ints]] = []
        dense: list[tuple[Ints, Ints, Ints, Ints]] = []
        for index, numel in enumerate(self.numels):
            if numel >= spec.chunk and spec.kind == "topk":
                columns = _block_columns(self.shapes[index][1]) if spec.chunk == BLOCK_SIDE**2 else 0
                sparse.append(_blocks(index, numel, columns) if columns else _runs(index, numel, spec.chunk))
            elif numel:
                dense.append(_runs(index, numel, DENSE_CHUNK))
        parts = sparse + dense
        self.num_sparse = sum(len(part[0]) for part in sparse)
        self.num_chunks = sum(len(part[0]) for part in parts)
        columns4 = [
            np.concatenate([p[i] for p in parts]) if parts else np.zeros(0, np.int64) for i in range(4)
        ]
        self.tensor, self.start, self.stride, self.size = columns4
        self.offset: Ints = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.size)])
        self.num_groups = -(-self.num_sparse // self.group)
        self.group_edges: Ints = np.minimum(np.arange(self.num_groups + 1) * self.group, self.num_sparse)

    def elements(self, first_chunk: int, num_chunks: int) -> slice:
        """Where these chunks lie in the error feedback."""
        return slice(int(self.offset[first_chunk]), int(self.offset[first_chunk + num_chunks]))

    def view(self, tensor: torch.Tensor, chunk: int) -> torch.Tensor:
        """One chunk of its (contiguous) tensor as a view: [64, 64] for a block, else [size]."""
        start, stride, size = int(self.start[chunk]), int(self.stride[chunk]), int(self.size[chunk])
        if stride == BLOCK_SIDE:
            return tensor.reshape(-1)[start : start + size]
        row, column = divmod(start, stride)
        return tensor.reshape(-1, stride)[row : row + BLOCK_SIDE, column : column + BLOCK_SIDE]

    def is_boundary(self, chunk: int) -> bool:
        """Whether a span may begin or end before this chunk id."""
        return chunk % self.group == 0 if chunk < self.num_sparse else chunk <= self.num_chunks

    def split(self, first_chunk: int, num_chunks: int) -> tuple[int, int, int, int]:
        """(first group, end group, first dense chunk id, end dense chunk id) of a range that ends on
        boundaries.
        """
        end = first_chunk + num_chunks
        if first_chunk < 0 or num_chunks < 0 or end > self.num_chunks:
            raise CompressionError(f"chunks {first_chunk} to {end} lie outside 0 to {self.num_chunks}")
        if not (self.is_boundary(first_chunk) and self.is_boundary(end)):
            raise CompressionError(
                f"chunks {first_chunk} to {end} do not begin and end on a group of {self.group}"
            )
        first_group = -(-min(first_chunk, self.num_sparse) // self.group)
        end_group = -(-min(end, self.num_sparse) // self.group)
        return first_group, end_group, max(first_chunk, self.num_sparse), max(end, self.num_sparse)

    def group_chunks(self, group: int) -> tuple[int, int]:
        """(first chunk id, end chunk id) of a group."""
        return group * self.group, min((group + 1) * self.group, self.num_sparse)


def _block_columns(shape: tuple[int, ...]) -> int:
    """Columns of the matrix that `shape` flattens to when it divides into 64 x 64 blocks, else 0."""
    if len(shape) < 2:
        return 0
    rows, columns = shape[0], math.prod(shape[1:])
    return columns if rows % BLOCK_SIDE == 0 and columns % BLOCK_SIDE == 0 else 0


def _blocks(index: int, numel: int, columns: int) -> tuple[Ints, Ints, Ints, Ints]:
    block_rows = np.arange(numel // columns // BLOCK_SIDE, dtype=np.int64) * (BLOCK_SIDE * columns)
    starts = (block_rows[:, None] + np.arange(0, columns, BLOCK_SIDE, dtype=np.int64)[None, :]).ravel()
    full = np.full_like
    return full(starts, index), starts, full(starts, columns), full(starts, BLOCK_SIDE**2)


def _runs(index: int, numel: int, length: int) -> tuple[Ints, Ints, Ints, Ints]:
    starts = np.arange(0, numel, length, dtype=np.int64)
    sizes = np.minimum(length, numel - starts)
    return np.full_like(starts, index), starts, np.full_like(starts, BLOCK_SIDE), sizes
