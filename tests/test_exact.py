"""Arithmetic that must not depend on the machine agrees with the usual one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.trainer import exact


@given(st.floats(0.0, math.pi))
def test_the_cosine_is_the_cosine(angle: float) -> None:
    """To about the last bit."""
    assert exact.cosine(angle) == pytest.approx(math.cos(angle), abs=4e-15)


@given(st.floats(0.0, 1.0), st.integers(0, 10_000))
def test_the_power_is_the_power(base: float, exponent: int) -> None:
    """By squaring, to about the last digits."""
    assert exact.power(base, exponent) == pytest.approx(base**exponent, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_the_norm_is_the_norm_in_any_order(scale: float) -> None:
    """Close to torch's, and the same bits for any order and division of the elements."""
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * scale
    expected = float(values.double().norm())
    assert exact.norm([values]) == pytest.approx(expected, rel=1e-5)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(2))
    assert exact.norm(list(torch.split(values[order], 777))) == exact.norm([values])


def test_the_norm_of_nothing_is_nothing() -> None:
    """No elements, or zeros."""
    assert exact.norm([]) == exact.norm([torch.zeros(3), torch.zeros(0)]) == 0.0
