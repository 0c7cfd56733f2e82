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
    once = _dct(blocks.transpose(0, 1).contiguous()) * _norms()  # [row frequency, n, column]
    return (_dct(once.permute(2, 1, 0).contiguous()) * _norms()).transpose(0, 1)


def inverse(blocks: torch.Tensor) -> torch.Tensor:
    """Inverse of `forward` up to rounding: [n, column frequency, row frequency] to [n, row, column], fp32."""
    once = _idct(blocks.transpose(0, 1) * _norms())  # [column, n, row frequency]
    return _idct(once.permute(2, 1, 0) * _norms()).transpose(0, 1)


def forward_by_product(blocks: torch.Tensor) -> torch.Tensor:
    """`forward` as matrix products: quicker in torch, with other roundings."""
    return matrix() @ blocks.transpose(1, 2) @ matrix().T


def inverse_by_product(blocks: torch.Tensor) -> torch.Tensor:
    """`inverse` as matrix products: quicker in torch, with other roundings."""
    return (matrix().T @ blocks @ matrix()).transpose(1, 2)


@functools.cache
def matrix() -> torch.Tensor:
    """Orthonormal DCT-II [frequency, element], from its definition."""
    angle = torch.outer(
        torch.arange(SIDE, dtype=torch.float64), torch.arange(SIDE, dtype=torch.float64) + 0.5
    )
    return (torch.cos(angle * (math.pi / SIDE)) * torch.tensor(norms(), dtype=torch.float64)[:, None]).float()


def _dct(x: torch.Tensor) -> torch.Tensor:
    """Unscaled DCT-II along the first axis of x [n, ...]."""
    n = x.shape[0]
    if n == 1:
        return x
    left, right = x[: n // 2], x[n // 2 :].flip(0)
    even, odd = _dct(left + right), _dct((left - right) * _half_secants(n))
    out = torch.empty(x.shape)
    out[0::2] = even
    torch.add(odd[:-1], odd[1:], out=out[1:-1:2])
    out[-1] = odd[-1]
    return out


def _idct(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `_dct` up to scaling, along the first axis."""
    n = x.shape[0]
    if n == 1:
        return x
    odd = x[1::2].clone()
    odd[1:] += x[1:-2:2]
    even, odd = _idct(x[0::2]), _idct(odd) * _half_secants(n)
    out = torch.empty(x.shape)
    torch.add(even, odd, out=out[: n // 2])
    out[n // 2 :] = (even - odd).flip(0)
    return out


def half_secants(n: int) -> list[float]:
    """Factors of the n / 2 butterflies of length n."""
    return [0.5 / math.cos((i + 0.5) * math.pi / n) for i in range(n // 2)]


def norms() -> list[float]:
    """Scales of the 64 frequencies."""
    return [math.sqrt(1 / SIDE)] + [math.sqrt(2 / SIDE)] * (SIDE - 1)


@functools.cache
def _half_secants(n: int) -> torch.Tensor:
    return torch.tensor(half_secants(n), dtype=torch.float32).view(-1, 1, 1)


@functools.cache
def _norms() -> torch.Tensor:
    return torch.tensor(norms(), dtype=torch.float32).view(-1, 1, 1)
