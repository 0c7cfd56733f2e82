"""Arithmetic with the same result on every machine, for what goes into the outer step.

Additions, multiplications and divisions are rounded alike everywhere; cos() and pow() of the C library are not, nor is
a sum of floats whose order the number of threads decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 1 << 22  # elements whose squares, below 2**40 each, are summed as int64
FRACTION_BITS = 20  # a magnitude counts in 2**-20 of the largest one's power of two


def power(base: float, exponent: int) -> float:
    """base ** exponent for a whole exponent from 0 up, by squaring."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base, exponent = base * base, exponent >> 1
    return result


def cosine(angle: float) -> float:
    """cos(angle) for angles from 0 to pi, to about 1e-15: the power series, from its far end."""
    value, square = 1.0, angle * angle
    for n in range(30, 0, -2):
        value = 1.0 - square / (n * (n - 1)) * value
    return value


def cosine_decay(progress: float, ratio: float) -> float:
    """From 1 at progress 0 down to `ratio` at progress 1, and on."""
    return ratio + (1.0 - ratio) * (0.5 * (1.0 + cosine(math.pi * min(1.0, progress))))


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all elements of finite fp32 tensors, to about 1e-6 of it.

    Magnitudes become whole numbers first: a sum of those has no order.
    """
    largest = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
    if largest == 0.0:
        return 0.0
    _, exponent = math.frexp(largest)  # largest < 2 ** exponent
    total = 0
    for tensor in tensors:
        for piece in torch.split(tensor.reshape(-1), PIECE):
            whole = piece.double().mul_(2.0 ** (FRACTION_BITS - exponent)).round_().long()
            total += int((whole * whole).sum())
    return math.ldexp(math.sqrt(total), exponent - FRACTION_BITS)
