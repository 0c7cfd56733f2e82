"""Audits among members in one process, and reducers that have reason to fear them.

What is drawn, opened, made again and compared is the same as in `dht/auditor.py` and `dht/evidence.py`: it is in
`compression/audit.py`. Signatures are not needed here, where nobody can speak in another's name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.screen import Section


def _noise(mean: torch.Tensor) -> torch.Tensor:
    found = torch.randn(len(mean), generator=torch.Generator().manual_seed(len(mean)))
    return found * float(mean.norm() / found.norm())


CHEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "turned": lambda mean: -2.0 * mean,
    "hundredfold": lambda mean: 99.0 * mean,
    "random": lambda mean: _noise(mean) - mean,
    "slanted": lambda mean: 0.3 * _noise(mean),
}
"""What a hostile reducer adds to a sum, given the true one: the last is too little to be seen without an audit."""


@dataclass(frozen=True)
class Sum:
    """What a reducer answers with when it is audited."""

    reducer: int
    span: tuple[int, int]
    sections: Sequence[Section]  # all that it had
    aggregate: bytes
    before: torch.Tensor  # its residual, in units of weight times value


class Audits:
    """All members' audits. Who is found guilty gets no span any more."""

    def __init__(self, codec: Codec, screens: bool):
        self._codec, self._screens = codec, screens
        self._sums: dict[int, Sum] = {}
        self.guilty: dict[str, int] = {}
        """By peer id: the round in which it was found."""
        self.num_audits = self.num_bytes = 0

    def shares(self, names: Sequence[str]) -> list[float]:
        """Of the members in what there is to reduce."""
        shares = [0.0 if name in self.guilty else 1.0 for name in names]
        return shares if any(shares) else [1.0] * len(names)

    def keep(self, made: Sum) -> None:
        """A recompressed sum of this round that has reached everybody."""
        self._sums[made.reducer] = made

    def look(self, round: int, names: Sequence[str], payloads: Sequence[bytes]) -> list[str]:
        """The round is over: everybody audits whom the draw says. Who is found guilty now."""
        before = set(self.guilty)
        aggregates = {j: made.aggregate for j, made in self._sums.items()}
        for i, name in enumerate(names):
            ticket = hashlib.sha256(f"{name} {round}".encode()).digest()
            try:
                drawn = audit.draw(self._codec, payloads[i], aggregates, i, len(names), ticket)
            except PayloadError:  # what it sent itself is none
                continue
            for j in drawn:
                if self._is_wrong(self._sums[j], audit.number_of(ticket)):
                    self.guilty.setdefault(names[j], round)
        self._sums = {}
        return [name for name in self.guilty if name not in before]

    def _is_wrong(self, made: Sum, number: int) -> bool:
        codec = self._codec
        first, count = audit.opened(codec, made.span, number)
        base = int(codec.layout.offset[made.span[0]])
        begin, end = (int(codec.layout.offset[chunk]) - base for chunk in (first, first + count))
        opened = made.before[begin:end]
        self.num_audits += 1
        self.num_bytes += sum(len(section) for _, _, section in made.sections) + 4 * len(opened)
        if audit.miscounted(codec, made.aggregate, made.sections, made.span, screens=self._screens):
            return True
        sections = {index: section for index, _, section in made.sections}
        same, _ = audit.recompute(codec, made.aggregate, sections, opened, first, count)
        return not same


def mean_of(codec: Codec, sections: Sequence[Section]) -> torch.Tensor:
    """The weighted mean of sections of one span."""
    total = math.fsum(weight for _, weight, _ in sections)
    mean = torch.zeros_like(codec.values(sections[0][2]))
    for _, weight, section in sections:
        mean += codec.values(section) * (weight / total)
    return mean
