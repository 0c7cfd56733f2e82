"""The inner optimizers: each learns, goes on from its saved state, and says what is missing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model import SHAPE, TRAIN, batch

from dtrain.trainer.checkpoint import Checkpoint, CheckpointStore
from dtrain.trainer.errors import UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import GradientLoop, InnerLoop
from dtrain.trainer.model import GPT
from dtrain.trainer.muon import Muon, orthogonal
from dtrain.trainer.optimizers import OPTIMIZERS
from dtrain.trainer.outer import digest_of


def loop_of(name: str) -> tuple[FlatParameters, InnerLoop]:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = GPT(SHAPE)
    return FlatParameters(model), InnerLoop(model, replace(TRAIN, optimizer=name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str) -> None:
    """The loss of a learnable pattern falls far below guessing."""
    _, loop = loop_of(name)
    losses = [float(loop.step(*batch(index), index)) for index in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """A step after a restart is the step that would have been taken, to the last bit."""
    flat, loop = loop_of(name)
    for index in range(3):
        loop.step(*batch(index), index)
    theta = flat.flat.clone()
    tensors = {"theta": theta, **loop.state_dict()}
    CheckpointStore(tmp_path).save(Checkpoint(1, 1, digest_of(theta, {}), bytes(32), tensors))
    loop.step(*batch(3), 3)

    other, resumed = loop_of(name)
    stored = CheckpointStore(tmp_path).newest()
    assert stored is not None
    other.flat.copy_(stored.tensors.pop("theta"))
    resumed.load_state_dict(stored.tensors)
    resumed.step(*batch(3), 3)
    assert torch.equal(flat.flat, other.flat)


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    """Every parameter is trained by exactly one optimizer, the embedding not by Muon."""
    flat, loop = loop_of("muon")
    first, second = ([p for g in o.param_groups for p in g["params"]] for o in loop.optimizers)
    assert sum(p.numel() for p in first + second) == flat.num_params
    assert [p.shape for p in second] == [loop.model.embedding.weight.shape]


def test_a_missing_library_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without bitsandbytes is told what to type."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UsageError, match=r"pip install 'dtrain\[adamw8bit\]'") as raised:
        InnerLoop(GPT(SHAPE), replace(TRAIN, optimizer="adamw8bit"))
    assert "\n" not in str(raised.value)


def test_gradients_add_up_to_their_mean_and_leave_the_weights_alone() -> None:
    """Two batches give the gradient of the joint batch, once; theta does not move."""
    model = GPT(SHAPE)
    flat = FlatParameters(model)
    before = flat.flat.clone()
    loop = GradientLoop(model)
    for index in range(2):
        loop.step(*batch(index), index)
    ours = torch.cat([tensor.flatten() for tensor in loop.contribution(flat.flat, flat)])
    assert torch.equal(before, flat.flat)
    model.zero_grad()
    x, y = (torch.cat(pair) for pair in zip(batch(0), batch(1), strict=True))
    model(x, y).backward()
    joint = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(ours, joint, atol=1e-6, rtol=1e-4)
    assert not any(bool(tensor.any()) for tensor in loop.contribution(flat.flat, flat))


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (64, 1), (1, 1)])
def test_muon_makes_matrices_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values of a well-conditioned matrix come near one, its singular vectors stay; zeros stay zeros."""
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    matrix = left @ torch.diag(torch.linspace(0.3, 3.0, min(shape))) @ right
    ours = torch.diagonal(left.T @ orthogonal(matrix) @ right.T)
    assert float(ours.min()) > 0.65 and float(ours.max()) < 1.25
    across = left.T @ orthogonal(matrix) @ right.T - torch.diag(ours)
    assert float(across.abs().max()) < 1e-4
    assert not bool(orthogonal(torch.zeros(shape)).any())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (192, 192)])
def test_muon_takes_the_steps_of_torchs_own(shape: tuple[int, int]) -> None:
    """Weights and saved state after three steps are torch's, but for what its bf16 rounds away."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02, weight_decay=0.1)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=draw)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    off, moved = (ours - theirs).detach().norm(), (ours - start).detach().norm()
    assert float(off / moved) < 0.02
    buffers = (o.state[p]["momentum_buffer"] for o, p in ((mine, ours), (torchs, theirs)))
    torch.testing.assert_close(*buffers, rtol=0, atol=1e-6)
