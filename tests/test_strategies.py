"""The strategies' outer steps, each against its paper's equations in plain torch, and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.inner import learning_rate
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.strategies import STRATEGIES, make_strategy
from dtrain.trainer.strategy import Strategy

SHAPES = [("matrix", (128, 64)), ("vector", (100,)), ("scalar", ())]
ROUNDS = 5


def manifest(name: str, **overrides: object) -> Manifest:
    """Double underscores stand for dots."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return preset_manifest("test", overrides={"strategy.name": name, **dotted})


def made(name: str, **overrides: object) -> Strategy:
    return make_strategy(manifest(name, **overrides), SHAPES)


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _, shape in SHAPES]


def after_rounds(step: Callable[[list[Tensor], list[Tensor], int], None]) -> list[Tensor]:
    """Theta after some rounds of fixed means."""
    theta = draw(0)
    for round in range(ROUNDS):
        step(theta, draw(1 + round), round)
    return theta


def assert_close(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def torch_optimizer(kind: type[torch.optim.Optimizer], theta: list[Tensor], groups: bool, **kwargs: object):  # type: ignore[no-untyped-def]
    """An optimizer of torch's for these tensors; with `groups`, vectors do not decay."""
    for tensor in theta:
        tensor.requires_grad_(True)
    if not groups:
        return kind(theta, **kwargs)  # type: ignore[call-arg]
    vectors = {"params": [p for p in theta if p.ndim < 2], "weight_decay": 0.0}
    return kind([{"params": [p for p in theta if p.ndim >= 2]}, vectors], **kwargs)  # type: ignore[call-arg]


def test_sparseloco_subtracts_the_mean_times_alpha() -> None:
    """theta - alpha * mean, in place."""
    strategy = made("sparseloco", strategy__outer_lr=0.5)
    theta = draw(0)
    strategy.step(theta, draw(1), 0)
    assert_close(theta, [a - 0.5 * b for a, b in zip(draw(0), draw(1), strict=True)])


@pytest.mark.parametrize("name", ["sparseloco", "diloco"])
def test_the_outer_rate_falls_by_a_cosine(name: str) -> None:
    """Over the 200 rounds of 15 steps that `tiny` has, to the share that is asked for; by default it does not."""
    rates = {"strategy__outer_lr": 0.8, "strategy__min_outer_lr_ratio": 0.25}
    falling, constant = made(name, **rates), made(name, strategy__outer_lr=0.8)
    expected = {0: 0.8, 50: 0.5 + 0.3 / 2**0.5, 100: 0.5, 150: 0.5 - 0.3 / 2**0.5, 200: 0.2, 300: 0.2}
    assert {round: falling.outer_lr(round) for round in expected} == pytest.approx(expected)
    assert {constant.outer_lr(round) for round in expected} == {0.8}
    moved = []
    for strategy in (falling, constant):
        theta = [torch.zeros(shape) for _, shape in SHAPES]
        strategy.step(theta, draw(1), 100)
        moved.append(theta)
    assert_close(moved[0], [tensor * 0.625 for tensor in moved[1]])


def test_diloco_is_nesterov_on_the_mean_delta() -> None:
    """Torch's own SGD with Nesterov momentum takes the same steps (arXiv 2311.08105, algorithm 1)."""
    reference = draw(0)
    optimizer = torch_optimizer(torch.optim.SGD, reference, False, lr=0.7, momentum=0.9, nesterov=True)
    for round in range(ROUNDS):
        for tensor, mean in zip(reference, draw(1 + round), strict=True):
            tensor.grad = mean
        optimizer.step()
    assert_close(after_rounds(made("diloco").step), [tensor.detach() for tensor in reference])


def test_ddp_is_adamw_on_the_clipped_mean_gradient() -> None:
    """Torch's own AdamW with the same schedule, decay and clipping takes the same steps."""
    train = manifest("ddp").train
    reference = draw(0)
    betas = (train.beta1, train.beta2)
    optimizer = torch_optimizer(
        torch.optim.AdamW, reference, True, betas=betas, weight_decay=train.weight_decay
    )
    for round in range(ROUNDS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, round)
        for tensor, mean in zip(reference, draw(1 + round), strict=True):
            tensor.grad = mean
        torch.nn.utils.clip_grad_norm_(reference, train.clip)
        optimizer.step()
    assert_close(after_rounds(made("ddp").step), [tensor.detach() for tensor in reference])


def test_demo_moves_every_weight_by_the_sign_of_the_mean() -> None:
    """theta <- theta - lr * sign(mean), matrices decayed before it (arXiv 2411.19870, algorithm 1)."""
    train = manifest("demo").train

    def step(theta: list[Tensor], mean: list[Tensor], round: int) -> None:
        lr = 0.1 * learning_rate(train, round)
        for index, (outer, moved) in enumerate(zip(theta, mean, strict=True)):
            decay = train.weight_decay if outer.ndim >= 2 else 0.0
            theta[index] = outer - lr * decay * outer - lr * torch.sign(moved)

    assert_close(after_rounds(made("demo").step), after_rounds(step))


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_means_give_bit_equal_thetas_for_any_number_of_threads(name: str) -> None:
    """One theta: the outer step does not depend on the machine's threads."""
    threads, results = torch.get_num_threads(), []
    shapes = [("matrix", (512, 512))]
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            strategy = make_strategy(manifest(name), shapes)
            theta = [torch.randn(512, 512, generator=torch.Generator().manual_seed(0))]
            for round in range(3):
                mean = torch.randn(512, 512, generator=torch.Generator().manual_seed(1 + round))
                strategy.step(theta, [mean], round)
            results.append([*theta, *strategy.shared_state().values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_newcomer_takes_the_same_steps(name: str) -> None:
    """Theta and the shared state are all that an outer step needs."""
    old, new = made(name), made(name)
    theta = draw(0)
    for round in range(3):
        old.step(theta, draw(1 + round), round)
    copied = [tensor.clone() for tensor in theta]
    new.load_shared_state({name: tensor.clone() for name, tensor in old.shared_state().items()})
    for round in range(3, 6):
        old.step(theta, draw(1 + round), round)
        new.step(copied, draw(1 + round), round)
    assert all(torch.equal(a, b) for a, b in zip(theta, copied, strict=True))


@pytest.mark.parametrize("name", ["diloco", "ddp"])
@pytest.mark.parametrize("damage", ["missing", "short", "double"])
def test_a_shared_state_that_does_not_fit_is_refused(name: str, damage: str) -> None:
    """A donor's momentum of another run is an error, and changes nothing."""
    strategy, donor = made(name), made(name)
    donor.step(draw(0), draw(1), 0)
    tensors = dict(donor.shared_state())
    last = sorted(tensors)[-1]
    if damage == "missing":
        del tensors[last]
    else:
        tensors[last] = tensors[last][:-1] if damage == "short" else tensors[last].double()
    with pytest.raises(RunError, match=last):
        strategy.load_shared_state(tensors)
    assert not any(bool(tensor.any()) for tensor in strategy.shared_state().values())


def test_an_unknown_strategy_lists_the_choices() -> None:
    """The line says what could have been typed, when the manifest is made and when it is used."""
    with pytest.raises(UsageError, match="'fedavg': choose one of sparseloco, diloco, demo, ddp"):
        manifest("fedavg")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("sparseloco", "strategy.outer_momentum", 0.9),
        ("ddp", "strategy.outer_momentum", 0.9),
        ("ddp", "strategy.min_outer_lr_ratio", 0.5),
        ("demo", "strategy.min_outer_lr_ratio", 0.5),
        ("ddp", "train.optimizer", "muon"),
        ("demo", "train.optimizer", "muon"),
    ],
)
def test_a_setting_that_the_strategy_has_no_use_for_is_refused(
    name: str, setting: str, value: object
) -> None:
    """Nobody believes that a setting did something which it did not."""
    with pytest.raises(UsageError, match=setting):
        made(name, **{setting.replace(".", "__"): value})


def test_a_strategy_changes_the_preset_and_the_user_changes_the_strategy() -> None:
    """Preset, then the strategy's own defaults, then what was typed."""
    assert manifest("sparseloco") == preset_manifest("test")
    ddp = manifest("ddp")
    assert (ddp.train.inner_steps, ddp.codec.kind, ddp.codec.dense_bits) == (1, "dense", 32)
    typed = manifest("diloco", codec__dense_bits=8, strategy__outer_lr=0.5)
    assert (typed.codec.kind, typed.codec.dense_bits, typed.strategy.outer_lr) == ("dense", 8, 0.5)
    assert typed.train.inner_steps == preset_manifest("test").train.inner_steps


def test_an_optimizer_that_suits_the_preset_is_not_for_what_has_another_use() -> None:
    """`tiny` trains with Muon; strategies without an inner optimizer, and models of another kind, do not."""
    assert manifest("sparseloco").train.optimizer == manifest("diloco").train.optimizer == "muon"
    assert manifest("ddp").train.optimizer == manifest("demo").train.optimizer == "adamw"
    other = {"model.kind": "factory", "model.name": "some.module:function"}
    assert preset_manifest("test", overrides=other).train.optimizer == "adamw"
    assert preset_manifest("test", overrides=other | {"train.optimizer": "muon"}).train.optimizer == "muon"
