"""The codec's heavy work in numba: fused, chunk by chunk in the caches, over groups in parallel threads.

Threads are Python's own around loops that run without the GIL, as many as torch uses: numba's thread pools
either forbid calls from two threads at once or do not survive a fork, and a worker does both.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels.cpu_decode import build_check_and_add, build_decode
from dtrain.compression.kernels.cpu_encode import build_write
from dtrain.compression.kernels.cpu_read import REASONS
from dtrain.compression.kernels.cpu_select import num_lanes
from dtrain.compression.kernels.cpu_sources import addresses_of, source_addresses
from dtrain.compression.kernels.cpu_write import PAD
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section, SectionFormat

Ints = npt.NDArray[np.int64]
Result = TypeVar("Result")

PART_ELEMENTS = 1 << 20  # elements that one task covers at most, and that a tile of converted sources holds
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

    write: Callable[..., int]
    check: Callable[..., int]
    add: Callable[..., int]
    decode: Callable[..., int]


@functools.cache
def loops(transform: str) -> Loops:
    """The loops for a transform. Each compiles when first called, or comes from numba's cache on disk."""
    folder = Path(__file__).parent
    constants = [folder.parent / f"{name}.py" for name in ("bits", "dct", "layout", "levels")]
    paths = sorted([*folder.glob("cpu_*.py"), *constants])
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    check, add = _check_and_add(sources)
    use_dct = transform == "dct"
    return Loops(build_write(sources, use_dct), check, add, build_decode(sources, use_dct))


@functools.cache
def _check_and_add(sources: str) -> tuple[Callable[..., int], Callable[..., int]]:
    return build_check_and_add(sources)


class CpuKernel:
    """Numba, on the CPU."""

    name = "numba"

    def encode(
        self,
        fmt: SectionFormat,
        tensors: Sequence[torch.Tensor],
        feedback: torch.Tensor,
        decay: float,
        transform: str,
    ) -> tuple[Ints, list[bytes]]:
        """As `Kernel.encode`."""
        layout = fmt.layout
        lengths = np.zeros(layout.num_groups, np.int64)

        def write(first: int, end: int) -> bytes:
            chunks = int(layout.group_edges[first]), int(layout.group_edges[end])
            addresses, copies = source_addresses(layout, tensors, *chunks)
            data = _write(fmt, feedback, first, end, 0, lengths, addresses, decay, transform)
            del copies  # only now: the addresses point into them
            return data

        return lengths, _run(layout, 0, layout.num_groups, write)

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, list[bytes]]:
        """As `Kernel.compress`."""
        lengths = np.zeros(fmt.layout.num_groups, np.int64)
        base = int(fmt.layout.offset[fmt.layout.group_edges[first_group]])

        def write(first: int, end: int) -> bytes:
            return _write(fmt, values, first, end, base, lengths, _NO_SOURCE, 1.0, "none")

        parts = _run(fmt.layout, first_group, end_group, write)
        return lengths[first_group:end_group], parts

    def check(self, fmt: SectionFormat, section: Section) -> None:
        """As `Kernel.check`."""
        data = section.data.ctypes.data, len(section.data), section.bounds, section.first_group

        def check(first: int, end: int) -> None:
            bad = np.zeros(1, np.int64)
            _refuse(loops("none").check(_plan(fmt), first, end, *data, bad), bad)

        _run(fmt.layout, section.first_group, section.end_group, check)

    def add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        """As `Kernel.add`."""
        data = section.data.ctypes.data, len(section.data), section.bounds, section.first_group
        base = int(fmt.layout.offset[fmt.layout.group_edges[section.first_group]])
        target = np.float32(weight), out.numpy(), base

        def add(first: int, end: int) -> None:
            bad = np.zeros(1, np.int64)
            _refuse(loops("none").add(_plan(fmt), first, end, *data, *target, bad), bad)

        _run(fmt.layout, section.first_group, section.end_group, add)

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
        source = data, sizes, bounds, whole.first_group, weights

        def decode(first: int, end: int) -> None:
            bad = np.zeros(1, np.int64)
            _refuse(loops(transform).decode(_plan(fmt), first, end, *source, addresses, bad), bad)

        _run(layout, whole.first_group, whole.end_group, decode)


def _plan(fmt: SectionFormat) -> Plan:
    layout = fmt.layout
    chunks = layout.group_edges, layout.offset, layout.size, layout.stride
    return Plan(*chunks, fmt.kept, fmt.group_kept, fmt.fixed_bytes, fmt.value_bits)


def _write(
    fmt: SectionFormat, values: torch.Tensor, first: int, end: int, base: int, lengths: Ints, addresses: Ints,
    decay: float, transform: str,
) -> bytes:  # fmt: skip
    out = np.empty(int(fmt.group_bounds[first:end].sum()) + 2 * PAD, np.uint8)
    target = values.numpy(), base, np.float32(decay), num_lanes(fmt.k), out, lengths
    used = loops(transform).write(_plan(fmt), first, end, addresses, *target)
    return out[:used].tobytes()


def _parts(layout: Layout, first_group: int, end_group: int) -> Iterator[tuple[int, int]]:
    """Divide groups into parts of about PART_ELEMENTS, in order."""
    step = max(1, PART_ELEMENTS // (layout.group * layout.chunk))
    for first in range(first_group, end_group, step):
        yield first, min(first + step, end_group)


def _run(
    layout: Layout, first_group: int, end_group: int, work: Callable[[int, int], Result]
) -> list[Result]:
    """Do the work part by part, in threads when torch has several; results in order."""
    parts = list(_parts(layout, first_group, end_group))
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        return [work(first, end) for first, end in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda part: work(*part), parts))


def _refuse(found: int, bad: Ints) -> None:
    if found:
        raise PayloadError(REASONS[found], f"group {int(bad[0])} breaks the format")
