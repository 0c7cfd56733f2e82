"""What a kernel does for the codec. `ReferenceKernel` states it in plain torch; the others must equal it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.section import Section, SectionFormat

Buffer = bytes | memoryview
Ints = npt.NDArray[np.int64]


class Kernel(Protocol):
    """The heavy work on the sparse chunks. Dense chunks are small and stay with the codec.

    `values` and `feedback` are 1-D fp32 CPU tensors in chunk order, in the domain of the transform.
    """

    @property
    def name(self) -> str:
        """As `dtrain bench codec` shows it."""

    def finite(self, tensors: Sequence[torch.Tensor]) -> list[bool]:
        """For each tensor of any float type whether it holds neither NaN nor infinity."""

    def encode(
        self,
        fmt: SectionFormat,
        tensors: Sequence[torch.Tensor],
        feedback: torch.Tensor,
        decay: float,
        transform: str,
    ) -> tuple[Ints, Sequence[Buffer]]:
        """feedback <- decay * feedback + transform(tensors), then `compress` of the whole layout."""

    def compress(
        self, fmt: SectionFormat, values: torch.Tensor, first_group: int, end_group: int
    ) -> tuple[Ints, Sequence[Buffer]]:
        """Write each chunk's largest values and subtract from `values` what a reader will make of them.

        Returns (length of each group in bytes, the groups' bytes in order, in any pieces).
        """

    def check(self, fmt: SectionFormat, section: Section) -> None:
        """Raise PayloadError unless every group of the section can be read."""

    def add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        """out <- out + weight * section."""

    def decode(
        self,
        fmt: SectionFormat,
        sections: Sequence[tuple[float, Section]],
        outputs: Sequence[torch.Tensor],
        transform: str,
    ) -> None:
        """Write the sum of weight * section, in the order given, into `outputs`; all cover the same range."""
