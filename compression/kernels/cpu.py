"""The codec's heavy work in numba: fused, in tiles that stay in the caches, over groups in parallel threads.

Threads are Python's own around loops that run without the GIL, as many as torch uses: numba's thread pools either
forbid calls from two threads at once or do not survive a fork, and a worker does both.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.errors import PayloadError
from dtrain.compression.kernels import cpu_dct
from dtrain.compression.kernels.cpu_groups import Loops, build
from dtrain.compression.kernels.cpu_read import REASONS
from dtrain.compression.layout import Layout
from dtrain.compression.section import Section, SectionFormat

Ints = npt.NDArray[np.int64]
Result = TypeVar("Result")

PART_ELEMENTS = 1 << 20  # elements that one task covers at most, and that a tile of converted sources holds
_NO_CHUNKS = np.zeros(0, np.int64)


@functools.cache
def loops() -> Loops:
    """The compiled loops; compiling them takes some 20 s once, then they come from numba's cache on disk."""
    folder = Path(__file__).parent
    text = b"".join(path.read_bytes() for path in sorted([*folder.glob("cpu*.py"), *folder.parent.glob("*.py")]))
    return build(hashlib.sha256(text).hexdigest())


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
        direct = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        addresses = _addresses(layout, tensors) if direct else _NO_CHUNKS
        lengths, parts = np.zeros(layout.num_groups, np.int64), []
        step = layout.num_groups if direct else 1
        for first, end in _parts(layout, 0, layout.num_groups) if not direct else [(0, layout.num_groups)]:
            if direct:
                parts += self._write(fmt, feedback, first, end, 0, lengths, addresses, layout.stride, decay, transform)
                continue
        del step
        return lengths, parts

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, list[bytes]]:
        """As `Kernel.compress`."""
        lengths = np.zeros(fmt.layout.num_groups, np.int64)
        base = int(fmt.layout.offset[fmt.layout.group_edges[first_group]])
        parts = self._write(fmt, values, first_group, end_group, base, lengths, _NO_CHUNKS, _NO_CHUNKS, 1.0, "none")
        return lengths[first_group:end_group], parts

    def _write(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int, base: int, lengths: Ints,
        addresses: Ints, strides: Ints, decay: float, transform: str,
    ) -> list[bytes]:  # fmt: skip
        layout, flat = fmt.layout, values.numpy()

        def write(first: int, end: int) -> bytes:
            # Fields are written in bytes, yet a reader may load eight at once from the last of them.
            out = np.empty(int(fmt.group_bounds[first:end].sum()) + 8, np.uint8)
            used = loops().write(
                first, end, layout.group_edges, layout.offset, fmt.kept, addresses, strides, transform == "dct",
                cpu_dct.half_secants(), cpu_dct.norms(), flat, base, np.float32(decay), fmt.value_bits, out, lengths,
            )  # fmt: skip
            return out[:used].tobytes()

        return _run(layout, first_group, end_group, write)

    def check(self, fmt: SectionFormat, section: Section) -> None:
        """As `Kernel.check`."""
        layout = fmt.layout

        def check(first: int, end: int) -> None:
            bad = np.zeros(1, np.int64)
            found = loops().check(
                first, end, layout.group_edges, fmt.kept, fmt.group_kept, layout.size, fmt.fixed_bytes, fmt.value_bits,
                section.data, section.bounds, section.first_group, bad,
            )  # fmt: skip
            _refuse(found, bad)

        _run(layout, section.first_group, section.end_group, check)

    def add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        """As `Kernel.add`."""
        layout, flat = fmt.layout, out.numpy()
        base = int(layout.offset[layout.group_edges[section.first_group]])

        def add(first: int, end: int) -> None:
            bad = np.zeros(1, np.int64)
            found = loops().add(
                first, end, layout.group_edges, layout.offset, fmt.kept, fmt.group_kept, layout.size, fmt.fixed_bytes, fmt.value_bits,
                section.data, section.bounds, section.first_group, np.float32(weight), flat, base, bad,
            )  # fmt: skip
            _refuse(found, bad)

        _run(layout, section.first_group, section.end_group, add)

    def decode(
        self,
        fmt: SectionFormat,
        sections: Sequence[tuple[float, Section]],
        outputs: Sequence[torch.Tensor],
        transform: str,
    ) -> None:
        """As `Kernel.decode`."""
        layout, whole = fmt.layout, sections[0][1]
        addresses = _addresses(layout, outputs)
        weights = np.asarray([weight for weight, _ in sections], np.float32)
        data = np.asarray([section.data.ctypes.data for _, section in sections], np.int64)
        sizes = np.asarray([len(section.data) for _, section in sections], np.int64)
        bounds = np.stack([section.bounds for _, section in sections])

        def decode(first: int, end: int) -> None:
            bad = np.zeros(1, np.int64)
            found = loops().decode(
                first, end, layout.group_edges, fmt.kept, fmt.group_kept, layout.size, fmt.fixed_bytes, fmt.value_bits, data, sizes,
                bounds, whole.first_group, weights, addresses, layout.stride, transform == "dct",
                cpu_dct.half_secants(), cpu_dct.norms(), bad,
            )  # fmt: skip
            _refuse(found, bad)

        _run(layout, whole.first_group, whole.end_group, decode)


def _addresses(layout: Layout, tensors: Sequence[torch.Tensor]) -> Ints:
    """Where each chunk begins in memory; the tensors are contiguous fp32 and outlive the addresses' use."""
    bases = np.asarray([tensor.data_ptr() for tensor in tensors], np.int64)
    return np.asarray(bases[layout.tensor] + 4 * layout.start, dtype=np.int64)


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
