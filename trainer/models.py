"""Models by the kind that `model.kind` names. Whatever it is, a model maps tokens [B, T] to logits, or with targets to
the mean loss; its trained parameters are those that require a gradient.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.model import GPT
from dtrain.trainer.models_hf import build_transformers

_SEEDING = threading.Lock()  # torch's own random numbers are the process's


@dataclass(frozen=True)
class ModelPlace:
    """This machine's part in building a model."""

    device: torch.device
    path: Path | None = None
    """This machine's copy of the model's folder, if it has one."""
    trusted: str = ""
    """The factory that the user allows to be called."""


def build_gpt(manifest: Manifest, place: ModelPlace) -> nn.Module:
    """The built-in GPT."""
    return GPT(manifest.model, seed=manifest.train.seed).to(place.device)


def build_hf(manifest: Manifest, place: ModelPlace) -> nn.Module:
    """A model of the transformers library, or adapters on one."""
    with _seeded(manifest.train.seed):
        return build_transformers(manifest, place.device, place.path)


def build_by_factory(manifest: Manifest, place: ModelPlace) -> nn.Module:
    """What a Python function makes of the model's section; called only if the user has allowed it."""
    name = manifest.model.name
    if place.trusted != name:
        raise UsageError(
            f"this run's model is made by code that is to be installed here, {name}: if you know and trust it, "
            f"type --trust-code {name}"
        )
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the model's factory {name} cannot be imported: {error}") from None
    with _seeded(manifest.train.seed):
        model = make(manifest.model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model's factory {name} made no torch module but {type(model).__name__}")
    return model.to(place.device)


MODELS: dict[str, Callable[[Manifest, ModelPlace], nn.Module]] = {
    "gpt": build_gpt,
    "transformers": build_hf,
    "factory": build_by_factory,
}
"""Model builders by the name that `model.kind` gives."""


def build_model(manifest: Manifest, place: ModelPlace) -> nn.Module:
    """The manifest's model with its first weights. UsageError if it cannot be had."""
    return MODELS[manifest.model.kind](manifest, place)


class _seeded:
    """Random numbers from this seed meanwhile, and afterwards as if nothing had been."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        _SEEDING.acquire()
        self._kept = torch.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._kept)
        _SEEDING.release()
