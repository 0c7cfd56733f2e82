"""The codec's heavy work on a CUDA GPU, in Triton, bit packing included: only finished bytes cross to the host.

Tensors, error feedback and outputs are on the GPU. Work goes part by part, so that what lies between two programs
stays small. Reducers, which hold their residuals on the host, use the host's kernel.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.compression import dct, levels
from dtrain.compression.kernels.base import Buffer, Kernel
from dtrain.compression.kernels.cuda_groups import pack_groups, unpack_groups
from dtrain.compression.kernels.cuda_triton import decode_chunks, encode_chunks
from dtrain.compression.kernels.finite import finite
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section, SectionFormat

Ints = npt.NDArray[np.int64]

PART_ELEMENTS = 1 << 27  # at most; at k = 64 the arrays between two programs then take 100 MB
BLOCK = 1024  # coefficients, bytes or bits that a program packs or unpacks at a time


class Plan(NamedTuple):
    """Layout and format on a GPU, int64, made once: a copy from the host costs more than a launch.

    By chunk: starts, strides, sizes, offsets, kept; kept_before [chunks + 1]; edges [groups + 1]; slots [groups + 1]:
    offsets of room for every group's longest bytes; matrix: DCT-II [64, 64].
    """

    starts: Tensor
    strides: Tensor
    sizes: Tensor
    offsets: Tensor
    kept: Tensor
    kept_before: Tensor
    edges: Tensor
    slots: Tensor
    matrix: Tensor


class Selected(NamedTuple):
    """What `encode_chunks` found in a part: positions, picked, codes [coefficients]; scale_bits, ratios [chunks]."""

    positions: Tensor
    picked: Tensor
    codes: Tensor
    scale_bits: Tensor
    ratios: Tensor


class CudaKernel:
    """Triton. Under TRITON_INTERPRET=1 it also runs on CPU tensors, slowly: that is how its tests run."""

    name = "triton"

    def __init__(self, host: Kernel) -> None:
        """`host`: the kernel that does what reducers need."""
        self._host = host
        self._plans: weakref.WeakKeyDictionary[SectionFormat, dict[torch.device, Plan]] = (
            weakref.WeakKeyDictionary()
        )

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
        """As `Kernel.encode`; `feedback` and `tensors` on one GPU."""
        plan, lengths, written = self._plan(fmt, feedback.device), [np.zeros(0, np.int64)], []
        for first, end in _parts(fmt.layout, 0, fmt.layout.num_groups):
            a, b = int(fmt.layout.group_edges[first]), int(fmt.layout.group_edges[end])
            found = _select(fmt, plan, tensors, feedback, (a, b), decay, transform == "dct")
            exponents, scale_codes = _group_scales(fmt.layout, found.scale_bits)
            if bool((scale_codes == 0).any()):
                _restore(fmt, plan, scale_codes == 0, feedback, found, a, b)
            part_lengths, data = _pack(fmt, plan, found, exponents, scale_codes, first, end)
            lengths.append(part_lengths)
            written.append(data)
        return np.concatenate(lengths), written

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, Sequence[Buffer]]:
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
        device = outputs[int(layout.tensor[layout.group_edges[whole.first_group]])].device
        plan, weights = (
            self._plan(fmt, device),
            torch.tensor([weight for weight, _ in sections], device=device),
        )
        for first, end in _parts(layout, whole.first_group, whole.end_group, len(sections)):
            a, b = int(layout.group_edges[first]), int(layout.group_edges[end])
            found, good = _unpack(fmt, plan, [section for _, section in sections], first, end)
            if not good:
                for _, section in sections:
                    self._host.check(fmt, section)  # names what is wrong
                raise AssertionError("the GPU refused a section that the host finds good")
            _add_up(fmt, plan, found, weights, outputs, (a, b), transform == "dct")

    def _plan(self, fmt: SectionFormat, device: torch.device) -> Plan:
        plans = self._plans.setdefault(fmt, {})
        if device not in plans:
            layout = fmt.layout
            slots = np.concatenate([np.zeros(1, np.int64), np.cumsum(fmt.group_bounds)])
            chunks = layout.start, layout.stride, layout.size, layout.offset, fmt.kept, fmt.kept_before
            arrays = [torch.from_numpy(array).to(device) for array in (*chunks, layout.group_edges, slots)]
            plans[device] = Plan._make([*arrays, dct.matrix().to(device)])
        return plans[device]


def _parts(layout: Layout, first_group: int, end_group: int, copies: int = 1) -> list[tuple[int, int]]:
    """Divide groups into parts of about PART_ELEMENTS, less for several sections at a time."""
    step = max(1, PART_ELEMENTS // (layout.group * layout.chunk * copies))
    edges = [*range(first_group, end_group, step), end_group]
    return list(itertools.pairwise(edges))


def _tensor_ranges(layout: Layout, begin: int, stop: int) -> list[tuple[int, int, int]]:
    """(tensor, first chunk, end chunk) of the sparse chunks begin to stop: one launch each."""
    ids = layout.tensor[begin:stop]
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)] if len(ids) else [0]
    return [(int(ids[a]), begin + a, begin + b) for a, b in itertools.pairwise(edges)]


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _lanes(k: int) -> int:
    return max(512, min(4096, _power(8 * k)))


def _select(
    fmt: SectionFormat, plan: Plan, tensors: Sequence[Tensor], feedback: Tensor, chunks: tuple[int, int],
    decay: float, use_dct: bool,
) -> Selected:  # fmt: skip
    """Fold, select and quantize chunks; positions and codes of the first begin at 0."""
    (a, b), device, layout = chunks, feedback.device, fmt.layout
    base = int(fmt.kept_before[a])
    positions = torch.empty(int(fmt.kept_before[b]) - base, dtype=torch.int32, device=device)
    scale_bits = torch.empty(b - a, dtype=torch.int32, device=device)
    found = Selected(
        positions,
        torch.empty(len(positions), device=device),
        torch.empty_like(positions),
        scale_bits,
        torch.empty_like(scale_bits),
    )
    kept_before = plan.kept_before - base
    for index, first, end in _tensor_ranges(layout, a, b):
        mine = slice(first, end)
        encode_chunks[(end - first,)](
            tensors[index].detach().contiguous(), feedback, plan.starts[mine], plan.strides[mine], plan.sizes[mine],
            plan.offsets[mine], plan.kept[mine], kept_before[mine], plan.matrix, decay,
            found.positions, found.picked, found.codes, scale_bits[first - a :], found.ratios[first - a :],
            SIZE=_power(layout.chunk), LANES=min(_lanes(fmt.k), _power(layout.chunk)), BITS=fmt.value_bits,
            DCT=use_dct, MAX_SCALE=(levels.MAX_EXPONENT << 4) | 15, enable_fp_fusion=False,
        )  # fmt: skip
    return found


def _group_scales(layout: Layout, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(exponent of every group, scale code of every chunk) from the chunks' scale bits, as levels.scale_codes."""
    num_groups = -(-len(bits) // layout.group)
    padded = torch.nn.functional.pad(bits, (0, num_groups * layout.group - len(bits)))
    exponents = padded.view(num_groups, layout.group).amax(1) >> 4
    exponents = torch.where(exponents < levels.MIN_EXPONENT, 0, exponents)
    spread = exponents.repeat_interleave(layout.group)[: len(bits)]
    return exponents, torch.where(spread > 0, (bits - ((spread - 15) << 4)).clamp(min=0), 0)


def _restore(
    fmt: SectionFormat, plan: Plan, lost: Tensor, feedback: Tensor, found: Selected, a: int, b: int
) -> None:
    """Chunks whose scale is out of their group's reach send zeros: put what the program subtracted back."""
    kept = plan.kept[a:b]
    of_lost = lost.repeat_interleave(kept)
    places = found.positions + plan.offsets[a:b].repeat_interleave(kept)
    feedback[places[of_lost]] = found.picked[of_lost]
    found.ratios.masked_fill_(lost, 0)
    if fmt.value_bits > 2:
        found.codes.copy_(torch.where(of_lost, found.codes & 1, found.codes))


def _pack(
    fmt: SectionFormat,
    plan: Plan,
    found: Selected,
    exponents: Tensor,
    scale_codes: Tensor,
    first: int,
    end: int,
) -> tuple[Ints, bytes]:
    """(lengths of groups first to end, their bytes)."""
    device, a = found.positions.device, int(fmt.layout.group_edges[first])
    slots = plan.slots[first : end + 1] - plan.slots[first]
    room = int(fmt.group_bounds[first:end].sum())
    out = torch.empty(room, dtype=torch.uint8, device=device)
    ones = torch.zeros(8 * room, dtype=torch.uint8, device=device)
    lengths = torch.empty(end - first, dtype=torch.int64, device=device)
    kept_before = plan.kept_before[a:] - int(fmt.kept_before[a])
    pack_groups[(end - first,)](
        found.positions, found.codes, scale_codes, found.ratios, exponents, plan.edges[first:] - a, kept_before, slots,
        torch.empty_like(found.positions), ones, out, lengths,
        BITS=fmt.value_bits, CHUNKS=_power(fmt.layout.group), BLOCK=BLOCK,
    )  # fmt: skip
    within = torch.arange(room, device=device) - slots[:-1].repeat_interleave(slots.diff())
    used = out[within < lengths.repeat_interleave(slots.diff())]
    return lengths.cpu().numpy(), used.cpu().numpy().tobytes()


class Unpacked(NamedTuple):
    """What sections say: positions, codes [sections, coefficients] i32; scales fp32, ratios [sections, chunks]."""

    positions: Tensor
    codes: Tensor
    scales: Tensor
    ratios: Tensor


def _unpack(
    fmt: SectionFormat, plan: Plan, sections: Sequence[Section], first: int, end: int
) -> tuple[Unpacked, bool]:
    """(groups first to end of the sections, whether all of them are sound)."""
    layout, device = fmt.layout, plan.edges.device
    a, b = int(layout.group_edges[first]), int(layout.group_edges[end])
    pieces, bounds, done = [], [], 0
    for section in sections:
        mine = section.bounds[first - section.first_group : end - section.first_group + 1]
        pieces.append(section.data[mine[0] : mine[-1]])
        bounds.append(mine - mine[0] + done)
        done += int(mine[-1] - mine[0])
    data, total, count = torch.from_numpy(np.concatenate(pieces)).to(device), len(sections), end - first
    shape = total, int(fmt.kept_before[b] - fmt.kept_before[a])
    positions = torch.empty(shape, dtype=torch.int32, device=device)
    scale_bits = torch.empty((total, b - a), dtype=torch.int32, device=device)
    codes, ratios = torch.empty_like(positions), torch.empty_like(scale_bits)
    bad = torch.empty((total, count), dtype=torch.int32, device=device)
    unpack_groups[(count, total)](
        data, torch.from_numpy(np.stack(bounds)).to(device), plan.edges[first:] - a,
        plan.kept_before[a:] - int(fmt.kept_before[a]), plan.sizes[a:], torch.empty_like(positions),
        torch.empty(shape, dtype=torch.int64, device=device), positions, codes, scale_bits, ratios, bad,
        count, b - a, shape[1], BITS=fmt.value_bits, CHUNKS=_power(layout.group), BLOCK=BLOCK,
        LOW=levels.MIN_EXPONENT, HIGH=levels.MAX_EXPONENT,
    )  # fmt: skip
    return Unpacked(positions, codes, scale_bits.view(torch.float32), ratios), not bool(bad.any())


def _add_up(
    fmt: SectionFormat, plan: Plan, found: Unpacked, weights: Tensor, outputs: Sequence[Tensor],
    chunks: tuple[int, int], use_dct: bool,
) -> None:  # fmt: skip
    """Write the weighted sum of sections' chunks to the outputs."""
    (a, b), side = chunks, _power(fmt.layout.chunk)
    kept_before = plan.kept_before - int(fmt.kept_before[a])
    for index, first, end in _tensor_ranges(fmt.layout, a, b):
        mine = slice(first, end)
        work = torch.empty((end - first) * side if use_dct else 1, device=weights.device)
        decode_chunks[(end - first,)](
            outputs[index], plan.starts[mine], plan.strides[mine], plan.sizes[mine], plan.kept[mine], kept_before[mine],
            plan.matrix, found.positions, found.codes, found.scales[:, first - a :], found.ratios[:, first - a :],
            weights, found.positions.shape[1], b - a, len(weights), work, SIZE=side,
            KEPT=_power(int(fmt.kept[first:end].max())), BITS=fmt.value_bits, DCT=use_dct, enable_fp_fusion=False,
        )  # fmt: skip
