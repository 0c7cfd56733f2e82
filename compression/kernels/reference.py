"""The codec's heavy work in plain torch and numpy, tile by tile: the oracle that the other kernels must
equal.

A kernel is a class with the methods of `Kernel` (kernels/base.py). This one favours the plain statement over
speed, yet works on tiles of whole groups, so that the extra memory is bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression import dct, group
from dtrain.compression.kernels.base import Buffer
from dtrain.compression.kernels.finite import finite
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section, SectionFormat

Ints = npt.NDArray[np.int64]
Transform = Callable[[torch.Tensor], torch.Tensor]

TILE_CHUNKS = 64  # at least; rounded up to whole groups


class ReferenceKernel:
    """Plain torch, on the CPU."""

    name = "reference"

    def __init__(self, *, exact: bool = True) -> None:
        """`exact`: transform by the butterflies that all kernels share, to the bit, not by faster matrix products."""
        self._exact = exact

    def finite(self, tensors: Sequence[torch.Tensor]) -> list[bool]:
        """As `Kernel.finite`."""
        return finite(tensors)

    def encode(
        self,
        fmt: SectionFormat,
        tensors: Sequence[torch.Tensor],
        feedback: torch.Tensor,
        decay: float,
        transform: str,
    ) -> tuple[Ints, Sequence[Buffer]]:
        """feedback <- decay * feedback + tensors, then `compress`. `feedback`: all sparse elements, [n] fp32."""
        layout = fmt.layout
        for first, end in _tiles(layout, 0, layout.num_groups):
            kept = feedback[layout.elements(first, end - first)]
            kept.mul_(decay).add_(
                _gather(layout, tensors, first, end, self._transform(transform, dct.forward))
            )
        return self.compress(fmt, feedback, 0, layout.num_groups)

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, Sequence[Buffer]]:
        """Write the largest values of each chunk and subtract what was written from `values` (1-D fp32, these
        groups).

        Returns (byte length of each group, the groups' bytes).
        """
        layout = fmt.layout
        written = []
        done = 0
        for first, end in _tiles(layout, first_group, end_group):
            tile = values[done : done + int(layout.offset[end] - layout.offset[first])]
            done += len(tile)
            positions, flat = _select(fmt, tile, first, end), tile.numpy()
            for number in range(first // layout.group, -(-end // layout.group)):
                a, b = layout.group_chunks(number)
                mine = positions[
                    fmt.kept_before[a] - fmt.kept_before[first] : fmt.kept_before[b] - fmt.kept_before[first]
                ]
                start = layout.offset[a] - layout.offset[first]
                data, sent = group.pack(fmt, number, mine - start, flat[mine])
                flat[mine] -= sent
                written.append(data)
        return np.asarray([len(data) for data in written], np.int64), written

    def check(self, fmt: SectionFormat, section: Section) -> None:
        """Read every group and forget it. Raises PayloadError as `group.unpack` does."""
        for number in range(section.first_group, section.end_group):
            group.unpack(fmt, number, section.group(number))

    def add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        """out <- out + weight * section, `out` 1-D fp32 with the sparse elements of the section's range."""
        base = int(fmt.layout.offset[fmt.layout.group_chunks(section.first_group)[0]])
        for number in range(section.first_group, section.end_group):
            start = int(fmt.layout.offset[fmt.layout.group_chunks(number)[0]]) - base
            positions, values = group.unpack(fmt, number, section.group(number), weight)
            out.numpy()[start + positions] += values

    def decode(
        self,
        fmt: SectionFormat,
        sections: Sequence[tuple[float, Section]],
        outputs: Sequence[torch.Tensor],
        transform: str,
    ) -> None:
        """Write the weighted sum of sections that cover the same range into `outputs` (contiguous fp32
        tensors).
        """
        layout = fmt.layout
        whole = sections[0][1]
        for first, end in _tiles(layout, whole.first_group, whole.end_group):
            sums = torch.zeros(int(layout.offset[end] - layout.offset[first]))
            for weight, section in sections:
                for number in range(first // layout.group, -(-end // layout.group)):
                    start = int(layout.offset[layout.group_chunks(number)[0]] - layout.offset[first])
                    positions, values = group.unpack(fmt, number, section.group(number), weight)
                    sums.numpy()[start + positions] += values
            _scatter(layout, sums, outputs, first, end, self._transform(transform, dct.inverse))

    def _transform(self, name: str, exact: Transform) -> Transform | None:
        if name == "none" or self._exact:
            return None if name == "none" else exact
        return dct.forward_by_product if exact is dct.forward else dct.inverse_by_product


def _tiles(layout: Layout, first_group: int, end_group: int) -> Iterator[tuple[int, int]]:
    """(first chunk, end chunk) of tiles of whole groups."""
    step = -(-TILE_CHUNKS // layout.group)
    for number in range(first_group, end_group, step):
        last = min(number + step, end_group) - 1
        yield layout.group_chunks(number)[0], layout.group_chunks(last)[1]


def _pieces(layout: Layout, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Split a chunk range where the tensor or the chunks' size changes: the chunks of a piece have one shape."""
    changes = (np.diff(layout.tensor[first:end]) != 0) | (np.diff(layout.size[first:end]) != 0)
    edges = [first, *(np.flatnonzero(changes) + first + 1).tolist(), end]
    yield from itertools.pairwise(edges)


def _views(layout: Layout, tensor: torch.Tensor, a: int, b: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of chunks, a view of them) for chunks a to b of a piece, in order: [chunks, size], or blocks as
    [rows of blocks, blocks in a row, 64, 64].
    """
    side, stride, start = dct.SIDE, int(layout.stride[a]), int(layout.start[a])
    if stride == side:
        size = int(layout.size[a])
        yield b - a, tensor.reshape(-1)[start : start + (b - a) * size].view(b - a, size)
        return
    blocks = tensor.reshape(-1, side, stride // side, side).transpose(1, 2)
    columns, before = stride // side, start // stride // side * (stride // side) + start % stride // side
    done = 0
    while done < b - a:  # the rest of a row of blocks, whole rows, the begin of a row
        row, column = divmod(before + done, columns)
        rows = (b - a - done) // columns if column == 0 else 0
        count = rows * columns or min(columns - column, b - a - done)
        yield count, blocks[row : row + max(rows, 1), column : column + (columns if rows else count)]
        done += count


def _gather(
    layout: Layout, tensors: Sequence[torch.Tensor], first: int, end: int, transform: Transform | None
) -> torch.Tensor:
    """Elements of sparse chunks first to end in chunk order, fp32 [n], transformed."""
    parts = []
    for a, b in _pieces(layout, first, end):
        for _, view in _views(layout, tensors[int(layout.tensor[a])].detach(), a, b):
            piece = view.to(device="cpu", dtype=torch.float32)
            if transform and int(layout.size[a]) == layout.chunk:
                piece = transform(piece.reshape(-1, dct.SIDE, dct.SIDE))
            parts.append(piece.reshape(-1))
    return torch.cat(parts)


def _scatter(
    layout: Layout,
    sums: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    first: int,
    end: int,
    transform: Transform | None,
) -> None:
    """Inverse of `_gather`: write the elements of sparse chunks first to end into the tensors."""
    done = 0
    for a, b in _pieces(layout, first, end):
        size = int(layout.size[a])
        for count, view in _views(layout, outputs[int(layout.tensor[a])], a, b):
            piece = sums[done : done + count * size]
            done += count * size
            if transform and size == layout.chunk:
                piece = transform(piece.view(-1, dct.SIDE, dct.SIDE))
            view.copy_(piece.reshape(view.shape))


def _select(fmt: SectionFormat, values: torch.Tensor, first: int, end: int) -> Ints:
    """Positions in `values` (the elements of sparse chunks first to end) of each chunk's largest magnitudes,
    ascending.

    Of equal magnitudes the lowest positions are taken first.
    """
    found, done = [], 0
    for a, b in _pieces(fmt.layout, first, end):
        size, k = int(fmt.layout.size[a]), int(fmt.kept[a])
        magnitude = values[done : done + (b - a) * size].view(b - a, size).abs()
        cut = magnitude.topk(k, sorted=False).values.amin(1, keepdim=True)
        chosen = magnitude >= cut
        places = chosen.flatten().nonzero().flatten()
        if len(places) > k * len(magnitude):  # more than k reach the cut somewhere: ties
            equal = magnitude == cut
            missing = k - (magnitude > cut).sum(1, keepdim=True)
            places = (chosen & (~equal | (equal.cumsum(1) <= missing))).flatten().nonzero().flatten()
        found.append(places + done)
        done += magnitude.numel()
    return torch.cat(found).numpy()
