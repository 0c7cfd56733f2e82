"""The dense chunks of a codec: tensors that travel whole. Works tile by tile, so that extra memory stays
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression import dense
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TILE_CHUNKS = 1024


class DensePart:
    """Encodes and decodes dense chunks, given by id. 1-D tensors hold their elements in chunk order."""

    def __init__(self, layout: Layout, bits: int) -> None:
        self._layout = layout
        self._bits = bits

    def fold(self, tensors: Sequence[torch.Tensor], values: torch.Tensor, decay: float) -> None:
        """values <- decay * values + the elements of all dense chunks of `tensors`."""
        values.mul_(decay)
        done = 0
        for index in self._tensor_ids(self._layout.num_sparse, self._layout.num_chunks):
            numel = self._layout.numels[index]
            values[done : done + numel].view(tensors[index].shape).add_(
                tensors[index].detach().to(values.device)
            )
            done += numel

    def send(self, values: torch.Tensor, first: int, end: int) -> bytes:
        """Bytes of chunks first to end, whose elements are `values` fp32; subtracts what a reader will make
        of them.
        """
        host = values.cpu()
        flat = host.numpy()
        scales, elements = [], []
        for a, b in self._tiles(first, end):
            starts, part = self._starts(a, b), self._slice(a, b, first)
            largest, data = dense.quantize(flat[part], self._bits, starts)
            flat[part] -= dense.dequantize(largest, data, self._bits, starts)
            scales.append(largest.astype("<f4").tobytes())
            elements.append(data.tobytes())
        if host is not values:
            values.copy_(host)
        return b"".join(scales + elements)

    def check(self, section: Section) -> None:
        """Raises PayloadError "not-finite"."""
        for a, b in self._tiles(section.first_dense, section.end_dense):
            dense.check(*self._stored(section, a, b), self._bits)

    def add(self, section: Section, weight: float, out: torch.Tensor) -> None:
        """out <- out + weight * section, `out` fp32 with the dense elements of the section's range."""
        for a, b in self._tiles(section.first_dense, section.end_dense):
            values = torch.from_numpy(self._values(section, a, b, weight))
            out[self._slice(a, b, section.first_dense)] += values.to(out.device)

    def decode(self, sections: Sequence[tuple[float, Section]], outputs: Sequence[torch.Tensor]) -> None:
        """Write the sum of weight * section, in the order given, into `outputs` (contiguous fp32)."""
        layout, whole = self._layout, sections[0][1]
        for a, b in self._tiles(whole.first_dense, whole.end_dense):
            sums = np.zeros(int(layout.offset[b] - layout.offset[a]), np.float32)
            for weight, section in sections:
                sums += self._values(section, a, b, weight)
            done = 0
            for index in self._tensor_ids(a, b):
                mine = np.flatnonzero(layout.tensor[a:b] == index) + a
                start = int(layout.start[mine[0]])
                count = int(layout.start[mine[-1]] + layout.size[mine[-1]]) - start
                outputs[index].view(-1)[start : start + count] = torch.from_numpy(sums[done : done + count])
                done += count

    def _values(self, section: Section, first: int, end: int, weight: float) -> Floats:
        largest, data = self._stored(section, first, end)
        values = dense.dequantize(largest, data, self._bits, self._starts(first, end))
        return np.asarray(values * np.float32(weight), dtype=np.float32)

    def _stored(self, section: Section, first: int, end: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
        """(blocks' largest magnitudes, bytes of the elements) of chunks first to end of a section."""
        width = dense.SCALE_BYTES[self._bits]
        scales = section.dense[width * (first - section.first_dense) : width * (end - section.first_dense)]
        elements = section.dense[width * (section.end_dense - section.first_dense) :]
        part = self._slice(first, end, section.first_dense)
        data = elements[part.start * self._bits // 8 : part.stop * self._bits // 8]
        return scales.view("<f4").astype(np.float32), data

    def _slice(self, first: int, end: int, base: int) -> slice:
        offset = self._layout.offset
        return slice(int(offset[first] - offset[base]), int(offset[end] - offset[base]))

    def _starts(self, first: int, end: int) -> Ints:
        return np.asarray(self._layout.offset[first:end] - self._layout.offset[first], dtype=np.int64)

    def _tensor_ids(self, first: int, end: int) -> list[int]:
        return [int(index) for index in np.unique(self._layout.tensor[first:end])]

    @staticmethod
    def _tiles(first: int, end: int) -> Iterator[tuple[int, int]]:
        for a in range(first, end, TILE_CHUNKS):
            yield a, min(a + TILE_CHUNKS, end)
