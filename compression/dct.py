"""64 x 64 orthonormal discrete cosine transform of blocks, by Lee's butterflies, in one fixed order of
operations.

Every step is a separate fp32 addition, subtraction or multiplication, so that another implementation that
follows the same steps without fused multiply-add gets the same bits.
"""

from __future__ import annotations

import functools
import math

import torch

SIDE = 64


def forward(blocks: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II of `blocks` [n, row, column] fp32: along the rows' index first, then the columns'.

    The coefficients come as [n, column frequency, row frequency]: that order saves kernels a transposition.
    """
    once = _dct(blocks.transpose(1, 2)) * _norms()
    return (_dct(once.transpose(1, 2)) * _norms()).transpose(1, 2)


def inverse(blocks: torch.Tensor) -> torch.Tensor:
    """Inverse of `forward` up to rounding: [n, column frequency, row frequency] to [n, row, column], fp32."""
    once = _idct(blocks.transpose(1, 2) * _norms())
    return _idct(once.transpose(1, 2) * _norms()).transpose(1, 2)


def _dct(x: torch.Tensor) -> torch.Tensor:
    """Unscaled DCT-II along the last axis."""
    n = x.shape[-1]
    if n == 1:
        return x
    left, right = x[..., : n // 2], x[..., n // 2 :].flip(-1)
    even = _dct(left + right)
    odd = _dct((left - right) * _half_secants(n))
    odd = torch.cat([odd[..., :-1] + odd[..., 1:], odd[..., -1:]], -1)
    return torch.stack([even, odd], -1).flatten(-2)


def _idct(x: torch.Tensor) -> torch.Tensor:
    """Transpose of the inverse of `_dct` up to scaling, along the last axis."""
    n = x.shape[-1]
    if n == 1:
        return x
    even, odd = _idct(x[..., 0::2]), x[..., 1::2]
    odd = _idct(torch.cat([odd[..., :1], odd[..., :-1] + odd[..., 1:]], -1)) * _half_secants(n)
    return torch.cat([even + odd, (even - odd).flip(-1)], -1)


@functools.cache
def _half_secants(n: int) -> torch.Tensor:
    return torch.tensor([0.5 / math.cos((i + 0.5) * math.pi / n) for i in range(n // 2)], dtype=torch.float32)


@functools.cache
def _norms() -> torch.Tensor:
    return torch.tensor([math.sqrt(1 / SIDE)] + [math.sqrt(2 / SIDE)] * (SIDE - 1), dtype=torch.float32)
