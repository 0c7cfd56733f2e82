"""Writes a trained model as transformers, peft, or anything that reads safetensors wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dtrain.trainer.errors import UsageError
from dtrain.trainer.models_hf import CausalLM
from dtrain.trainer.tokenizer import LibraryTokenizer, Tokenizer
from dtrain.trainer.trained import Trained


def write_hf(trained: Trained, tokenizer: Tokenizer, out: Path, *, merge: bool) -> None:
    """A folder for `from_pretrained`: config, weights, tokenizer; or the adapters for peft, unless they are merged."""
    model = trained.model
    if not isinstance(model, CausalLM):
        raise UsageError(
            f"a model of the kind {trained.manifest.model.kind} is no architecture of transformers: "
            "type --format safetensors"
        )
    inner: Any = model.inner
    if trained.manifest.train.method != "full" and merge:
        if trained.manifest.train.method == "qlora":
            raise UsageError(
                "adapters on weights of few bits cannot be merged without loss: leave out --merge"
            )
        inner = inner.merge_and_unload()
    inner.save_pretrained(out, safe_serialization=True)
    if isinstance(tokenizer, LibraryTokenizer):
        from transformers import PreTrainedTokenizerFast

        end = tokenizer.inner.id_to_token(tokenizer.end)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.inner, eos_token=end).save_pretrained(out)


def write_safetensors(trained: Trained, out: Path) -> None:
    """model.safetensors with the trained parameters by name, and the run's signed manifest."""
    tensors = {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in trained.model.named_parameters()
        if parameter.requires_grad
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "manifest.json").write_bytes((trained.folder / "manifest.json").read_bytes())
