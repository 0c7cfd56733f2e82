"""The model and its inner training."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from dtrain.trainer.config import ModelConfig, TrainConfig
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import InnerLoop, learning_rate
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.model import GPT
from dtrain.trainer.presets import PRESETS

SHAPE = ModelConfig(
    preset="test", vocab_size=256, dim=64, num_layers=2, num_heads=2, hidden_dim=128, seq_len=32
)
TRAIN = TrainConfig(inner_steps=4, batch_size=2, seq_len=32, lr=1e-2, warmup_steps=2, total_steps=40)


def test_the_number_of_parameters_is_known_beforehand() -> None:
    """The config's own count is that of the model which is built from it."""
    assert SHAPE.num_params == FlatParameters(GPT(SHAPE)).num_params


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [2, 32] with a pattern that can be learned: each token is its predecessor plus one."""
    first = torch.randint(0, 200, (2, 1), generator=torch.Generator().manual_seed(seed))
    tokens = first + torch.arange(33)
    return tokens[:, :-1], tokens[:, 1:]


def trained(num_steps: int) -> tuple[torch.Tensor, list[float]]:
    """Flat parameters and losses after some steps on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = GPT(SHAPE, seed=3)
        flat, loop = FlatParameters(model), InnerLoop(model, TRAIN)
        losses = [float(loop.step(*batch(index), index)) for index in range(num_steps)]
        return flat.flat.clone(), losses
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("tiny", 0.8e6, 1.2e6), ("small", 24e6, 27e6), ("gpt2", 120e6, 130e6), ("medium", 345e6, 360e6)],
)
def test_presets_have_the_size_they_promise(preset: str, low: float, high: float) -> None:
    """README and errors speak of about 1M, 25M, 124M and 350M parameters."""
    with torch.device("meta"):
        model = GPT(preset_manifest("demo", preset).model)
    assert low <= sum(parameter.numel() for parameter in model.parameters()) <= high


@pytest.mark.parametrize("preset", PRESETS)
def test_every_matrix_splits_into_blocks_of_64(preset: str) -> None:
    """The codec's 64x64 blocks cover each parameter exactly."""
    with torch.device("meta"):
        model = GPT(preset_manifest("demo", preset).model)
    assert all(side % 64 == 0 for parameter in model.parameters() for side in parameter.shape)


def test_the_first_theta_is_known_bits() -> None:
    """Every machine must begin at the same theta: its bits are part of the run, so a hash of some stands
    here.
    """
    flat = FlatParameters(GPT(SHAPE, seed=0)).flat
    assert hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16] == "91093bfe654a6921"
    assert not torch.equal(flat, FlatParameters(GPT(SHAPE, seed=1)).flat)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    """Initial values come from the model's own generator, whatever else draws random numbers."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = FlatParameters(GPT(SHAPE)).flat
    torch.manual_seed(2)
    assert torch.equal(first, FlatParameters(GPT(SHAPE)).flat)
    torch.manual_seed(1)
    with torch.random.fork_rng():
        GPT(SHAPE)
    assert torch.equal(torch.rand(3), expected)


def test_a_fresh_model_knows_nothing() -> None:
    """Output projections start at zero, so the first loss is close to that of guessing evenly."""
    x, y = batch(0)
    assert GPT(SHAPE)(x, y).item() == pytest.approx(math.log(256), abs=0.3)


def test_no_position_sees_the_future() -> None:
    """Changing a token changes no logits before it."""
    loop = InnerLoop(GPT(SHAPE), TRAIN)
    for index in range(3):  # away from the start, where attention's output is zero
        loop.step(*batch(index), index)
    x, _ = batch(0)
    changed = x.clone()
    changed[:, 20] = 7
    with torch.no_grad():
        before, after = loop.model(x), loop.model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_order_matters() -> None:
    """The rotary embedding tells positions apart: tokens in another order give another last logit."""
    loop = InnerLoop(GPT(SHAPE), TRAIN)
    for index in range(3):
        loop.step(*batch(index), index)
    x, _ = batch(0)
    shuffled = x.clone()
    shuffled[:, [3, 9]] = x[:, [9, 3]]
    with torch.no_grad():
        assert not torch.allclose(loop.model(x)[:, -1], loop.model(shuffled)[:, -1])


def test_two_identical_runs_have_bitwise_identical_parameters() -> None:
    """On one thread, training is a function of its inputs, to the last bit."""
    (first, first_losses), (second, second_losses) = trained(20), trained(20)
    assert torch.equal(first, second)
    assert first_losses == second_losses


def test_training_learns() -> None:
    """The loss of a learnable pattern falls far below guessing."""
    _, losses = trained(40)
    assert losses[-1] < 0.5 * losses[0]


def test_flat_parameters_are_the_model() -> None:
    """Writing to the flat tensor writes the parameters, and the optimizer's steps show in it."""
    model = GPT(SHAPE)
    flat = FlatParameters(model)
    assert flat.num_params == sum(parameter.numel() for parameter in model.parameters())
    for view, (name, parameter) in zip(flat.views(flat.flat), model.named_parameters(), strict=True):
        assert view.data_ptr() == parameter.data_ptr(), name
    before = flat.flat.clone()
    InnerLoop(model, TRAIN).step(*batch(0), 0)
    assert not torch.equal(before, flat.flat)
    flat.flat.copy_(before)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)


def test_the_optimizer_goes_on_where_its_state_says() -> None:
    """Saving and loading the moments between two steps changes nothing."""
    model = GPT(SHAPE)
    flat, loop = FlatParameters(model), InnerLoop(model, TRAIN)
    loop.step(*batch(0), 0)
    saved = {name: tensor.clone() for name, tensor in loop.state_dict().items()}
    theta = flat.flat.clone()
    loop.step(*batch(1), 1)
    expected = flat.flat.clone()

    resumed = InnerLoop(model, TRAIN)
    flat.flat.copy_(theta)
    resumed.load_state_dict(saved)
    resumed.step(*batch(1), 1)
    assert torch.equal(flat.flat, expected)


def test_moments_of_another_model_are_refused() -> None:
    """A checkpoint that does not fit is an error, not a silent restart."""
    other = InnerLoop(GPT(replace(SHAPE, dim=128)), TRAIN)
    other.step(*batch(0), 0)
    with pytest.raises(RunError, match="does not fit this model"):
        InnerLoop(GPT(SHAPE), TRAIN).load_state_dict(other.state_dict())


def test_an_unknown_optimizer_lists_the_choices() -> None:
    """Pluggable things live in a dict; the error shows its keys."""
    with pytest.raises(UsageError, match="choose one of adamw"):
        InnerLoop(GPT(SHAPE), replace(TRAIN, optimizer="sgd"))


def test_the_learning_rate_warms_up_and_then_falls_to_its_floor() -> None:
    """Linear to the peak, cosine to min_lr_ratio at the horizon, constant after it."""
    rates = [learning_rate(TRAIN, step) for step in range(60)]
    assert rates[0] == pytest.approx(0.5 * TRAIN.lr)
    assert max(rates) == pytest.approx(TRAIN.lr)
    assert rates[1:41] == sorted(rates[1:41], reverse=True)
    assert rates[40] == rates[59] == pytest.approx(0.1 * TRAIN.lr)
