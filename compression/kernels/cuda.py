"""The codec's heavy work on a CUDA GPU: Triton for what touches every parameter, the host for packing bits.

Tensors, error feedback and outputs are on the GPU. Only kept coefficients cross to the host, where the groups are
packed and unpacked. Reducers, which hold their residuals on the host, use the host's kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression import dct, group, levels
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.kernels.cuda_triton import decode_chunks, encode_chunks
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section, SectionFormat

Ints = npt.NDArray[np.int64]


class CudaKernel:
    """Triton. Under TRITON_INTERPRET=1 it also runs on CPU tensors, slowly: that is how its tests run."""

    name = "triton"

    def __init__(self, host: Kernel) -> None:
        """`host`: the kernel that does what reducers need."""
        self._host = host

    def encode(
        self,
        fmt: SectionFormat,
        tensors: Sequence[torch.Tensor],
        feedback: torch.Tensor,
        decay: float,
        transform: str,
    ) -> tuple[Ints, list[bytes]]:
        """As `Kernel.encode`; `feedback` and `tensors` on one GPU."""
        layout, device = fmt.layout, feedback.device
        total, chunks = int(fmt.kept_before[-1]), layout.num_sparse
        positions = torch.empty(total, dtype=torch.int32, device=device)
        codes, picked = torch.empty_like(positions), torch.empty(total, device=device)
        scale_bits = torch.empty(chunks, dtype=torch.int32, device=device)
        ratios, matrix = torch.empty_like(scale_bits), dct.matrix().to(device)
        for index, first, end in _tensor_ranges(layout):
            source = tensors[index].detach().contiguous()
            arrays = _on(device, layout, fmt, first, end)
            encode_chunks[(end - first,)](
                source, feedback, *arrays, matrix, decay, positions, picked, codes, scale_bits[first:], ratios[first:],
                SIZE=_power(layout.chunk), LANES=min(_lanes(fmt.k), _power(layout.chunk)), BITS=fmt.value_bits,
                DCT=transform == "dct", MAX_SCALE=(levels.MAX_EXPONENT << 4) | 15, enable_fp_fusion=False,
            )  # fmt: skip
        exponents, scale_codes = _group_scales(fmt, scale_bits.cpu().numpy().astype(np.int64))
        host = codes.cpu().numpy().astype(np.int64), ratios.cpu().numpy()
        lost = np.flatnonzero(scale_codes == 0)
        if len(lost):
            _restore(fmt, lost, feedback, positions, picked, *host)
        return _pack(fmt, positions.cpu().numpy().astype(np.int64), *host, exponents, scale_codes)

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, list[bytes]]:
        """As `Kernel.compress`, on the host."""
        return self._host.compress(fmt, values, first_group, end_group)

    def check(self, fmt: SectionFormat, section: Section) -> None:
        """As `Kernel.check`, on the host."""
        self._host.check(fmt, section)

    def add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        """As `Kernel.add`; on the host, with a round trip of `out` if it is on a GPU."""
        host = out.cpu()
        self._host.add(fmt, section, weight, host)
        if host is not out:
            out.copy_(host)

    def decode(
        self,
        fmt: SectionFormat,
        sections: Sequence[tuple[float, Section]],
        outputs: Sequence[torch.Tensor],
        transform: str,
    ) -> None:
        """As `Kernel.decode`; `outputs` on one GPU."""
        layout, whole = fmt.layout, sections[0][1]
        begin, stop = int(layout.group_edges[whole.first_group]), int(layout.group_edges[whole.end_group])
        device = outputs[int(layout.tensor[begin])].device
        base = int(fmt.kept_before[begin])
        positions, codes, scales, ratios = (
            torch.from_numpy(np.stack(part)).to(device)
            for part in zip(*[_unpack(fmt, section) for _, section in sections], strict=True)
        )
        weights = torch.tensor([weight for weight, _ in sections], device=device)
        matrix, side = dct.matrix().to(device), _power(layout.chunk)
        for index, first, end in _tensor_ranges(layout, begin, stop):
            starts, strides, sizes, _, kept, kept_before = _on(device, layout, fmt, first, end)
            use_dct = transform == "dct"
            work = torch.empty((end - first) * side if use_dct else 1, device=device)
            decode_chunks[(end - first,)](
                outputs[index], starts, strides, sizes, kept, kept_before - base, matrix, positions, codes,
                scales[:, first - begin :], ratios[:, first - begin :], weights, positions.shape[1], stop - begin,
                len(sections), work, SIZE=side, KEPT=_power(int(fmt.kept[first:end].max())), BITS=fmt.value_bits,
                DCT=use_dct, enable_fp_fusion=False,
            )  # fmt: skip


def _tensor_ranges(layout: Layout, begin: int = 0, stop: int | None = None) -> list[tuple[int, int, int]]:
    """(tensor, first chunk, end chunk) of the sparse chunks begin to stop: one launch each."""
    ids = layout.tensor[begin : layout.num_sparse if stop is None else stop]
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)] if len(ids) else [0]
    return [(int(ids[a]), begin + a, begin + b) for a, b in itertools.pairwise(edges)]


def _on(device: torch.device, layout: Layout, fmt: SectionFormat, first: int, end: int) -> list[torch.Tensor]:
    """Starts, strides, sizes, offsets, kept, kept_before of chunks first to end on a device."""
    arrays = layout.start, layout.stride, layout.size, layout.offset, fmt.kept, fmt.kept_before
    return [torch.from_numpy(array[first:end]).to(device) for array in arrays]


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _lanes(k: int) -> int:
    return max(512, min(4096, _power(8 * k)))


def _group_scales(fmt: SectionFormat, bits: Ints) -> tuple[Ints, Ints]:
    """(exponent of every group, scale code of every chunk) from the chunks' scale bits, as levels.scale_codes."""
    exponents = np.maximum.reduceat(bits, fmt.layout.group_edges[:-1]) >> 4
    exponents[exponents < levels.MIN_EXPONENT] = 0
    spread = np.repeat(exponents, np.diff(fmt.layout.group_edges))
    return exponents, np.where(spread > 0, np.maximum(bits - ((spread - 15) << 4), 0), 0)


def _restore(
    fmt: SectionFormat, lost: Ints, feedback: torch.Tensor, positions: torch.Tensor, picked: torch.Tensor,
    codes: Ints, ratios: npt.NDArray[np.int32],
) -> None:  # fmt: skip
    """Chunks whose scale is out of their group's reach send zeros: put what the program subtracted back."""
    for chunk in lost.tolist():
        mine = slice(int(fmt.kept_before[chunk]), int(fmt.kept_before[chunk + 1]))
        feedback[positions[mine].long() + int(fmt.layout.offset[chunk])] = picked[mine]
        ratios[chunk] = 0
        if fmt.value_bits > 2:
            codes[mine] &= 1


def _pack(
    fmt: SectionFormat,
    positions: Ints,
    codes: Ints,
    ratios: npt.NDArray[np.int32],
    exponents: Ints,
    scales: Ints,
) -> tuple[Ints, list[bytes]]:
    """(lengths of all groups, their bytes)."""
    written = []
    for number in range(fmt.layout.num_groups):
        first, end = fmt.layout.group_chunks(number)
        mine = slice(int(fmt.kept_before[first]), int(fmt.kept_before[end]))
        starts = np.repeat(fmt.layout.offset[first:end] - fmt.layout.offset[first], fmt.kept[first:end])
        head = int(exponents[number]), scales[first:end].astype(np.uint8), ratios[first:end].astype(np.uint8)
        written.append(group.join(fmt, number, *head, codes[mine], positions[mine] + starts))
    return np.asarray([len(data) for data in written], np.int64), written


def _unpack(fmt: SectionFormat, section: Section) -> tuple[npt.NDArray[np.generic], ...]:
    """positions within their chunk, codes [coefficients]; scales, ratios [chunks] of a section."""
    parts = []
    for number in range(section.first_group, section.end_group):
        fields = group.unpack_fields(fmt, number, section.group(number))
        first, end = fmt.layout.group_chunks(number)
        starts = np.repeat(fmt.layout.offset[first:end] - fmt.layout.offset[first], fmt.kept[first:end])
        within = group.positions_of(fmt, number, fields.gaps) - starts
        parts.append((within.astype(np.int32), fields.codes.astype(np.int32), fields.scale, fields.ratios))
    positions, codes, scales, ratios = (np.concatenate(part) for part in zip(*parts, strict=True))
    return positions, codes, scales, ratios.astype(np.int32)
