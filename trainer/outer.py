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
"""The state is hashed in pieces of this size, so that newcomers can check each, and fetch each from another donor."""


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


def in_order(theta: Tensor, shared: Mapping[str, Tensor]) -> list[Tensor]:
    """Theta and the strategy's shared state, by name: the order in which they are hashed and given to newcomers."""
    return [theta, *(shared[name] for name in sorted(shared))]


def digest_of(theta: Tensor, shared: Mapping[str, Tensor]) -> bytes:
    """The digest of a theta with the strategy's shared state, by name; both flat fp32 on the CPU."""
    return combine([piece for tensor in in_order(theta, shared) for piece in piece_hashes(tensor)])


def piece_lengths(flat: Tensor) -> list[int]:
    """Bytes of each piece of the tensor."""
    size = flat.numel() * flat.element_size()
    return [min(PIECE_BYTES, size - start) for start in range(0, size, PIECE_BYTES)]


def raw_bytes(flat: Tensor) -> memoryview:
    """The tensor's little-endian bytes, where they lie."""
    assert flat.device.type == "cpu" and flat.dtype == torch.float32 and flat.is_contiguous()
    array = flat.detach().reshape(-1).numpy()
    if sys.byteorder == "big":
        array = array.byteswap()
    return array.data.cast("B") if array.size else memoryview(b"")


def piece_hashes(flat: Tensor) -> list[bytes]:
    """SHA-256 of each 1 MiB piece of the tensor's little-endian bytes."""
    data = raw_bytes(flat)
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    # hashlib lets go of the interpreter lock on large buffers, so threads divide the work.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces))


def combine(hashes: Sequence[bytes]) -> bytes:
    """The digest that a list of piece hashes gives."""
    return hashlib.sha256(b"".join(hashes)).digest()
