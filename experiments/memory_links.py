"""How long things take between the members of a group in one process; `network.py` models real connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Links(Protocol):
    """How long things take between the members of a group. All times are in seconds."""

    def codec_s(self, name: str) -> float:
        """What a member needs for encoding, reducing, decoding and the outer step of one round."""

    def meet_s(self, names: Sequence[str]) -> float:
        """What a group needs to form once all its members are there."""

    def arrivals_s(self, names: Sequence[str], num_bytes: Floats, begin_s: Floats) -> Floats:
        """When transfers end that all go on together: [senders, receivers], both in the order of `names`.

        num_bytes [senders, receivers]; begin_s [senders]: when each begins to send.
        """

    def transfer_s(self, donor: str, receiver: str, num_bytes: int) -> float:
        """What one transfer needs."""


class InstantLinks:
    """Nothing takes time."""

    def codec_s(self, name: str) -> float:
        return 0.0

    def meet_s(self, names: Sequence[str]) -> float:
        return 0.0

    def arrivals_s(self, names: Sequence[str], num_bytes: Floats, begin_s: Floats) -> Floats:
        return np.zeros_like(num_bytes)

    def transfer_s(self, donor: str, receiver: str, num_bytes: int) -> float:
        return 0.0


INSTANT = InstantLinks()
