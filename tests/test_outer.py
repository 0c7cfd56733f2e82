"""The outer state's digest: equal thetas have equal digests, and any changed bit shows."""

from __future__ import annotations

import hashlib

import pytest
import torch

from dtrain.trainer.outer import PIECE_BYTES, OuterState, combine, piece_hashes


def theta(num: int) -> torch.Tensor:
    return torch.rand(num, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("num", [0, 1, PIECE_BYTES // 4, PIECE_BYTES // 4 + 1, 600_000])
def test_the_digest_is_the_documented_hash(num: int) -> None:
    """SHA-256 over the SHA-256 of each 1 MiB piece, so that others can compute it with standard tools."""
    raw = theta(num).numpy().astype("<f4").tobytes()
    pieces = [hashlib.sha256(raw[i : i + PIECE_BYTES]).digest() for i in range(0, len(raw), PIECE_BYTES)]
    assert piece_hashes(theta(num)) == pieces
    assert OuterState(theta(num)).digest() == hashlib.sha256(b"".join(pieces)).digest() == combine(pieces)


@pytest.mark.parametrize("place", [0, 299_999, 599_999])
def test_a_single_bit_changes_the_digest_and_only_its_piece(place: int) -> None:
    """A damaged weight is found, and the piece that it lies in."""
    state = OuterState(theta(600_000))
    digest, pieces = state.digest(), piece_hashes(state.theta_flat)
    state.theta_flat.view(torch.int32)[place] ^= 1
    assert state.digest() != digest
    changed = [a != b for a, b in zip(pieces, piece_hashes(state.theta_flat), strict=True)]
    assert changed.index(True) == place * 4 // PIECE_BYTES
    assert sum(changed) == 1


def test_zero_and_minus_zero_are_different_thetas() -> None:
    """Equality is of bits, not of values: a sign of zero is where machines first come apart."""
    assert OuterState(torch.tensor([0.0])).digest() != OuterState(torch.tensor([-0.0])).digest()
