"""The codec's heavy work in numba: fused, chunk by chunk in the caches, over groups in parallel threads.

Threads are Python's own around loops that run without the GIL, as many as torch uses: numba's thread pools
either forbid calls from two threads at once or do not survive a fork, and a worker does both.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels.base import Buffer
from dtrain.compression.kernels.cpu_decode import build_check_and_add, build_decode
from dtrain.compression.kernels.cpu_encode import build_write
from dtrain.compression.kernels.cpu_read import REASONS
from dtrain.compression.kernels.cpu_select import num_lanes
from dtrain.compression.kernels.cpu_sources import addresses_of, build_look, is_plain, source_addresses
from dtrain.compression.kernels.cpu_write import PAD
from dtrain.compression.kernels.finite import finite
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section, SectionFormat

Ints = npt.NDArray[np.int64]
Result = TypeVar("Result")

PART_ELEMENTS = 1 << 18  # elements of a part, which a thread takes at a time
PARTS_PER_THREAD = 4  # at least: starting a thread takes as long as a part
TILE_ELEMENTS = 1 << 20  # elements of sources in another format that are converted at a time
_NO_SOURCE = np.zeros(0, np.int64)


class Plan(NamedTuple):
    """What the loops know of the layout and the format: arrays by chunk or by group, as in Layout and
    SectionFormat.
    """

    group_edges: Ints
    offset: Ints
    size: Ints
    stride: Ints
    kept: Ints
    group_kept: Ints
    fixed_bytes: Ints
    value_bits: int


class Loops(NamedTuple):
    """The compiled loops of cpu_encode.py and cpu_decode.py."""

    write: Callable[..., None]
    check: Callable[..., int]
    add: Callable[..., int]
    decode: Callable[..., int]


@functools.cache
def loops(transform: str) -> Loops:
    """The loops for a transform. Each compiles when first called, or comes from numba's cache on disk."""
    check, add, _ = _plain_loops()
    use_dct = transform == "dct"
    return Loops(build_write(_sources(), use_dct), check, add, build_decode(_sources(), use_dct))


@functools.cache
def _plain_loops() -> tuple[Callable[..., int], Callable[..., int], Callable[..., None]]:
    """The loops that no transform concerns: check, add, look."""
    return *build_check_and_add(_sources()), build_look(_sources())


@functools.cache
def _sources() -> str:
    folder = Path(__file__).parent
    constants = [folder.parent / f"{name}.py" for name in ("bits", "dct", "layout", "levels")]
    paths = sorted([*folder.glob("cpu_*.py"), *constants])
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


class CpuKernel:
    """Numba, on the CPU."""

    name = "numba"

    def finite(self, tensors: Sequence[torch.Tensor]) -> list[bool]:
        """As `Kernel.finite`. torch's own sum is slow here: its threads spin where two cores must share the memory."""
        good = [True] * len(tensors)
        plain = [index for index, tensor in enumerate(tensors) if is_plain(tensor)]
        sizes = np.asarray([tensors[index].numel() for index in plain], np.int64)
        addresses = np.asarray([tensors[index].data_ptr() for index in plain], np.int64)
        bad, counter = np.zeros(len(plain), np.uint8), np.zeros(1, np.int64)
        whole_parts = int(sizes.sum()) // PART_ELEMENTS  # many small tensors are no work for two threads
        _in_threads(whole_parts, lambda: _plain_loops()[2](addresses, sizes, PART_ELEMENTS, counter, bad))
        for place, index in enumerate(plain):
            good[index] = not bad[place]
        others = sorted(set(range(len(tensors))) - set(plain))
        for index, fine in zip(others, finite([tensors[index] for index in others]), strict=True):
            good[index] = fine
        return good

    def encode(
        self,
        fmt: SectionFormat,
        tensors: Sequence[torch.Tensor],
        feedback: torch.Tensor,
        decay: float,
        transform: str,
    ) -> tuple[Ints, Sequence[Buffer]]:
        """As `Kernel.encode`."""
        layout = fmt.layout
        lengths = np.zeros(layout.num_groups, np.int64)
        tile = layout.num_groups if all(map(is_plain, tensors)) else _groups_in(layout, TILE_ELEMENTS)
        written: list[Buffer] = []
        for first in range(0, layout.num_groups, max(1, tile)):
            end = min(first + tile, layout.num_groups)
            chunks = int(layout.group_edges[first]), int(layout.group_edges[end])
            addresses, copies = source_addresses(layout, tensors, *chunks)
            written += _write(fmt, feedback, first, end, 0, lengths, addresses, decay, transform)
            del copies  # only now: the addresses point into them
        return lengths, written

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, Sequence[Buffer]]:
        """As `Kernel.compress`."""
        lengths = np.zeros(fmt.layout.num_groups, np.int64)
        base = int(fmt.layout.offset[fmt.layout.group_edges[first_group]])
        parts = _write(fmt, values, first_group, end_group, base, lengths, _NO_SOURCE, 1.0, "none")
        return lengths[first_group:end_group], parts

    def check(self, fmt: SectionFormat, section: Section) -> None:
        """As `Kernel.check`."""
        data = section.data.ctypes.data, len(section.data), section.bounds, section.first_group
        _read(loops("none").check, fmt, section, *data)

    def add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        """As `Kernel.add`."""
        data = section.data.ctypes.data, len(section.data), section.bounds, section.first_group
        base = int(fmt.layout.offset[fmt.layout.group_edges[section.first_group]])
        _read(loops("none").add, fmt, section, *data, np.float32(weight), out.numpy(), base)

    def decode(
        self,
        fmt: SectionFormat,
        sections: Sequence[tuple[float, Section]],
        outputs: Sequence[torch.Tensor],
        transform: str,
    ) -> None:
        """As `Kernel.decode`."""
        layout, whole = fmt.layout, sections[0][1]
        data = np.asarray([section.data.ctypes.data for _, section in sections], np.int64)
        sizes = np.asarray([len(section.data) for _, section in sections], np.int64)
        bounds = np.stack([section.bounds for _, section in sections])
        weights = np.asarray([weight for weight, _ in sections], np.float32)
        addresses = addresses_of(layout, outputs, 0, layout.num_sparse)
        source = data, sizes, bounds, whole.first_group, weights, addresses
        _read(loops(transform).decode, fmt, whole, *source)


def _plan(fmt: SectionFormat) -> Plan:
    layout = fmt.layout
    chunks = layout.group_edges, layout.offset, layout.size, layout.stride
    return Plan(*chunks, fmt.kept, fmt.group_kept, fmt.fixed_bytes, fmt.value_bits)


def _write(
    fmt: SectionFormat, values: torch.Tensor, first: int, end: int, base: int, lengths: Ints, addresses: Ints,
    decay: float, transform: str,
) -> list[Buffer]:  # fmt: skip
    parts = _parts(fmt.layout, first, end)
    room = np.add.reduceat(fmt.group_bounds, parts[:-1]) + 2 * PAD if first < end else _NO_SOURCE
    starts = np.cumsum(room) - room
    out = np.empty(int(room.sum()), np.uint8)
    source = addresses, values.numpy(), base, np.float32(decay), num_lanes(fmt.k)
    counter, plan = np.zeros(1, np.int64), _plan(fmt)
    _in_threads(
        len(starts), lambda: loops(transform).write(plan, parts, counter, *source, out, starts, lengths)
    )
    used = [int(lengths[a:b].sum()) for a, b in itertools.pairwise(parts)]
    return [out.data[start : start + size] for start, size in zip(starts, used, strict=True)]


def _read(loop: Callable[..., int], fmt: SectionFormat, section: Section, *arguments: Any) -> None:
    """Call a loop that reads on all groups of a section. Raises PayloadError that names the first bad group."""
    parts, counter = _parts(fmt.layout, section.first_group, section.end_group), np.zeros(1, np.int64)
    plan = _plan(fmt)

    def read() -> tuple[int, int]:
        bad = np.zeros(1, np.int64)
        found = loop(plan, parts, counter, *arguments, bad)
        return int(bad[0]), found

    refused = sorted(group for group in _in_threads(len(parts) - 1, read) if group[1])
    if refused:
        number, reason = refused[0]
        raise PayloadError(REASONS[reason], f"group {number} breaks the format")


def _groups_in(layout: Layout, elements: int) -> int:
    return max(1, elements // (layout.group * layout.chunk))


def _parts(layout: Layout, first_group: int, end_group: int) -> Ints:
    """Edges [parts + 1] of parts of about PART_ELEMENTS, in groups."""
    return np.asarray(
        [*range(first_group, end_group, _groups_in(layout, PART_ELEMENTS)), end_group], np.int64
    )


def _in_threads(num_parts: int, work: Callable[[], Result]) -> list[Result]:
    """Call `work`, which takes parts until there are none, here and in more threads if torch has several."""
    helpers = min(torch.get_num_threads(), num_parts // PARTS_PER_THREAD) - 1
    if helpers < 1:
        return [work()]
    with ThreadPoolExecutor(helpers) as pool:
        others = [pool.submit(work) for _ in range(helpers)]
        return [work(), *(other.result() for other in others)]
