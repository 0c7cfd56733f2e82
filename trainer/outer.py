"""The outer state: theta, shared bit for bit by all workers, and how far the run has come."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

PIECE_BYTES = 1 << 20
"""Theta is hashed in pieces of this size, so that one damaged piece can be found and fetched alone."""


@dataclass
class OuterState:
    """Where the run stands."""

    theta_flat: Tensor
    """[num_params] fp32 on the CPU: the outer weights."""
    round: int = 0
    """Outer steps completed."""
    tokens: int = 0
    """Tokens trained by the whole swarm so far, in thetas this worker has seen."""

    def digest(self, shared: Mapping[str, Tensor] = MappingProxyType({})) -> bytes:
        """32 bytes that identify theta and the strategy's shared state: who has both takes the same outer steps."""
        return digest_of(self.theta_flat, shared)


def digest_of(theta: Tensor, shared: Mapping[str, Tensor]) -> bytes:
    """The digest of a theta with the strategy's shared state, by name; both flat fp32 on the CPU."""
    tensors = [theta, *(shared[name] for name in sorted(shared))]
    return combine([piece for tensor in tensors for piece in piece_hashes(tensor)])


def piece_hashes(flat: Tensor) -> list[bytes]:
    """SHA-256 of each 1 MiB piece of the tensor's little-endian bytes."""
    assert flat.device.type == "cpu" and flat.dtype == torch.float32 and flat.is_contiguous()
    array = flat.detach().numpy()
    if sys.byteorder == "big":
        array = array.byteswap()
    data = array.data.cast("B") if array.size else memoryview(b"")
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    # hashlib lets go of the interpreter lock on large buffers, so threads divide the work.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces))


def combine(hashes: Sequence[bytes]) -> bytes:
    """The digest that a list of piece hashes gives."""
    return hashlib.sha256(b"".join(hashes)).digest()
