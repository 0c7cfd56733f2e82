"""What a machine chooses for itself changes the speed and the memory of a step, not its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_tools import LLAMA
from test_model import SHAPE, TRAIN
from torch import Tensor, nn

from dtrain.trainer.compute import Compute, choose_precision
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import GradientLoop, InnerLoop
from dtrain.trainer.model import GPT
from dtrain.trainer.replicas import Replicas

TOKENS = torch.randint(0, 256, (7, 17), generator=torch.Generator().manual_seed(0))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]


def trainable_gpt() -> GPT:
    """With output layers that are not zero, so that every weight has a gradient."""
    model = GPT(SHAPE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def gradient(model: nn.Module, **choices: Any) -> tuple[Tensor, Tensor, Compute]:
    """(loss, flat gradient) of X, Y, and what computed it."""
    compute = Compute(model, **choices)
    model.zero_grad()
    loss = compute.backward(X, Y, model.zero_grad)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), compute


class Fault(torch.autograd.Function):
    """Passes its input through, and fails on the way back for more than so many sequences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if gradients[0].shape[0] > ctx.most:
            raise torch.OutOfMemoryError("out of memory on the way back")
        return gradients[0], None


class Cramped(nn.Module):
    """A GPT on a device that holds few sequences at once, going forward or back."""

    def __init__(self, forward: int, back: int, num_with_recompute: int = 0) -> None:
        super().__init__()
        self.gpt = trainable_gpt()
        self.most, self.most_back, self.num_with_recompute = forward, back, num_with_recompute
        self.recompute = False
        self.gpt.embedding.register_forward_hook(lambda _, __, x: Fault.apply(x, self.most_back))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if tokens.shape[0] > (self.num_with_recompute if self.recompute else self.most):
            raise torch.OutOfMemoryError("out of memory")
        logits: Tensor = self.gpt(tokens, targets)
        return logits


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_passes_add_up_to_the_whole_batch(size: int) -> None:
    """However many sequences a pass has, also if the last one has fewer: the same loss and gradient."""
    loss, whole, _ = gradient(trainable_gpt(), micro_batch=7)
    other_loss, other, _ = gradient(trainable_gpt(), micro_batch=size)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other, whole, atol=1e-6, rtol=1e-4)


def test_activations_can_be_computed_twice() -> None:
    """Recomputing gives the same bits, for the built-in model and for those of transformers."""
    makers: list[Callable[[], nn.Module]] = [trainable_gpt]
    transformers = pytest.importorskip("transformers")
    from dtrain.trainer.models_hf import CausalLM

    def llama() -> nn.Module:
        transformers.set_seed(0)
        config = transformers.AutoConfig.for_model(**LLAMA)
        return CausalLM(transformers.AutoModelForCausalLM.from_config(config)).train()

    for make in [*makers, llama]:
        _, kept, _ = gradient(make())
        _, computed, compute = gradient(make(), recompute=True)
        assert compute.recompute and torch.equal(kept, computed)
    with pytest.raises(UsageError, match="this model does not know how"):
        Compute(nn.Linear(2, 2), recompute=True)


@pytest.mark.parametrize(("forward", "back"), [(3, 7), (7, 2), (3, 1)])
def test_out_of_memory_costs_a_try_and_nothing_else(forward: int, back: int) -> None:
    """A pass that fails, on its way or back, is done again with fewer sequences; no part of its gradient is left, and
    the size is kept for the steps to come."""
    _, whole, _ = gradient(trainable_gpt())
    said: list[str] = []
    loss, found, compute = gradient(Cramped(forward, back), say=said.append)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-4)
    assert 1 <= compute.micro_batch <= min(forward, back) and said
    assert all(line.startswith("Out of memory with") and "\n" not in line for line in said)
    num_said = len(said)
    compute.model.zero_grad()
    torch.testing.assert_close(compute.backward(X, Y, compute.model.zero_grad), loss)
    assert len(said) == num_said


def test_what_earlier_steps_gathered_survives_out_of_memory() -> None:
    """Strategies that collect gradients keep those of the round's earlier steps when a later one must begin anew."""
    sums = []
    for model in (trainable_gpt(), Cramped(7, 7)):
        loop = GradientLoop(model)
        loop.step(X, Y, 0)
        if isinstance(model, Cramped):
            model.most_back = 2
        loop.step(X, Y, 1)
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(sums[0], sums[1], atol=1e-6, rtol=1e-4)


def test_one_sequence_that_does_not_fit_is_recomputed_or_the_end() -> None:
    """First activations are computed twice; only when that is not enough does the worker give up, with a line."""
    said: list[str] = []
    gradient(Cramped(0, 7, num_with_recompute=1), say=said.append)
    assert said[-1] == "Out of memory with one sequence a pass: from now on activations are computed twice."
    with pytest.raises(RunError, match="too little memory for one sequence"):
        gradient(Cramped(0, 7))


@pytest.mark.parametrize("num_others", [1, 2, 9])
def test_devices_share_a_batch(num_others: int) -> None:
    """Copies of the model (here on one CPU) give the gradient of the whole batch, step after step, also when there are
    more of them than sequences; a copy that runs out of memory tries again by itself."""
    one, several = trainable_gpt(), trainable_gpt()
    shared = Replicas(several, [torch.device("cpu")] * num_others, micro_batch=2)
    loops = InnerLoop(one, TRAIN), InnerLoop(several, TRAIN, shared)
    losses = [[float(loop.step(X, Y, step)) for step in range(3)] for loop in loops]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(FlatParameters(several).flat, FlatParameters(one).flat, atol=1e-3, rtol=1e-3)
    assert shared.describe().endswith(f"on {1 + num_others} devices")
    cramped = Replicas(Cramped(1, 7), [torch.device("cpu")])
    cramped.backward(X, Y, cramped.model.zero_grad)
    found = torch.cat([p.grad.flatten() for p in cramped.model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, gradient(trainable_gpt())[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_halved_precision_trains(precision: str) -> None:
    """bf16, and fp16 with its scaled loss, take the loss down as fp32 does."""
    losses = {}
    for name in ("fp32", precision):
        model = GPT(SHAPE)
        loop = InnerLoop(model, TRAIN, Compute(model, precision=name))
        losses[name] = [float(loop.step(X, Y, i)) for i in range(12)]
        assert loop.compute.precision == name
    assert losses[precision][-1] < losses[precision][0] - 0.5
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], abs=0.1)


def test_choices_are_named() -> None:
    """Unknown ones list the known, and what goes together with nothing is refused."""
    with pytest.raises(UsageError, match=r"--precision\) 'fp8': choose one of auto, fp32, bf16, fp16"):
        choose_precision("fp8", torch.device("cpu"))
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    model = GPT(SHAPE)
    with pytest.raises(UsageError, match="type bf16 or fp32"):
        GradientLoop(model, Compute(model, precision="fp16"))
    assert Compute(model, micro_batch=3, recompute=True).describe() == "fp32, 3 sequences a pass, recomputing"


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    """torch.compile changes the speed only."""
    _, plain, _ = gradient(trainable_gpt())
    said: list[str] = []
    _, compiled, compute = gradient(trainable_gpt(), compile="yes", say=said.append)
    assert not said and compute.describe().endswith("compiled")
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-3)


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C compiler, or a model that it cannot digest: one line, and training goes on."""

    def broken(model: nn.Module) -> Callable[..., Tensor]:
        def call(*_: Tensor) -> Tensor:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    _, found, _ = gradient(trainable_gpt(), compile="yes", say=said.append)
    assert said == ["torch.compile does not work here (RuntimeError): going on without it."]
    assert torch.equal(found, gradient(trainable_gpt())[1])
