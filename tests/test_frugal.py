"""What keeps less memory, against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.trainer import frugal
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.model import GPT

TOKENS, DIM, VOCAB = 37, 16, 101


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def made_by(function: Callable[..., Tensor], autocast: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of x and weight."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, DIM, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = function(x, weight, targets)
    (result * 3.0).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and weight.grad is not None
    return result.detach(), x.grad, weight.grad


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight).float(), targets)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frugal, "AT_ONCE", 5 * VOCAB)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("autocast", [False, True])
def test_pieces_give_the_same_loss_and_gradients(autocast: bool) -> None:
    tolerance = 2e-2 if autocast else 1e-5
    for piecewise, whole in zip(made_by(frugal.next_token_loss, autocast), made_by(plain, autocast)):
        torch.testing.assert_close(piecewise, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("small_pieces")
def test_the_logits_are_never_there_at_once() -> None:
    with LargestTensor() as largest:
        made_by(frugal.next_token_loss)
    assert VOCAB * DIM <= largest.numel < TOKENS * VOCAB


def test_few_logits_are_made_by_torch_bit_for_bit() -> None:
    for ours, theirs in zip(made_by(frugal.next_token_loss), made_by(plain)):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("small_pieces")
def test_the_model_trains_and_evaluates_by_it() -> None:
    model = GPT(preset_manifest("run", "tiny").model)
    tokens = torch.arange(64).view(2, 32)
    result = model(tokens, tokens)
    result.backward()
    assert model.embedding.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, tokens), result)
        logits = model(tokens).flatten(0, 1)
    torch.testing.assert_close(functional.cross_entropy(logits, tokens.flatten()), result.detach())


def test_a_square_is_made_again_instead_of_kept() -> None:
    """With the same result and the same gradients."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    results = []
    for function in (frugal.linear_of_square, lambda x, weight: functional.linear(x.square(), weight)):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(2, 5, DIM, generator=generator, requires_grad=True)
        weight = torch.randn(7, DIM, generator=generator, requires_grad=True)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(x, weight)
        out.sum().backward()
        assert x.grad is not None and weight.grad is not None
        results.append((len({t.untyped_storage().data_ptr() for t in kept}), out, x.grad, weight.grad))
    (few, *ours), (many, *theirs) = results
    assert few == 2 < many
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their)
