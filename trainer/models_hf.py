"""Causal language models of the transformers library: whole, or as a frozen base with adapters (peft)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import one_line
from dtrain.trainer.tokenizer import NEEDS_HF

if TYPE_CHECKING:
    from dtrain.compression.layout import Shapes
    from dtrain.trainer.config import TrainConfig
    from dtrain.trainer.manifest import Manifest

WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # no pickles
ADAPTERS = "adapter_config.json"


class CausalLM(nn.Module):
    """A transformers model behind the interface of the built-in GPT."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean next-token loss in nats (0-dim) given `targets` [B, T], else logits [B, T, vocab_size].

        `tokens` [B, T] int64.
        """
        logits: Tensor = self.inner(input_ids=tokens, use_cache=False).logits
        if targets is None:
            return logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def build_transformers(manifest: Manifest, device: torch.device, path: Path | None) -> nn.Module:
    """The model that the manifest names, on the device, in train mode."""
    transformers = import_transformers()
    model, train = manifest.model, manifest.train
    config = _config(transformers, model.config)
    if not model.weights_sha256:
        if path is not None:
            raise UsageError(f"this run's model begins from scratch: leave out --model {path}")
        inner = transformers.AutoModelForCausalLM.from_config(config)
    else:
        folder = find_folder(model.name, path, model.revision)
        if weights_sha256(folder) != model.weights_sha256:
            raise UsageError(
                f"the weights in {folder} (--model) are not this run's {model.name}, whose SHA-256 begins "
                f"{model.weights_sha256[:16]}: get the same model as the others"
            )
        inner = _load(transformers, manifest, folder, config, device)
    inner = inner.float() if train.method == "full" else with_adapters(inner, train)
    if train.method != "qlora":
        inner = inner.to(device)
    return CausalLM(inner).train()


def _load(transformers: Any, manifest: Manifest, folder: Path, config: Any, device: torch.device) -> Any:
    """The pretrained weights; a frozen base in bf16 on a GPU, in few bits for qlora."""
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if manifest.train.method == "qlora":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"train.method = qlora needs bitsandbytes ({error}): type pip install 'dtrain[hf,adamw8bit]'"
            ) from None
        four = manifest.train.base_bits == 4
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
        options["device_map"] = {"": str(device)}
    frozen = manifest.train.method != "full"
    options["dtype"] = torch.bfloat16 if frozen and device.type == "cuda" else torch.float32
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"the model in {folder} cannot be loaded: {one_line(error)}") from None


def with_adapters(inner: Any, train: TrainConfig) -> Any:
    """The model frozen, with fp32 adapters in the layers that the manifest names."""
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"train.method = {train.method} needs peft ({error}): {NEEDS_HF}") from None
    everywhere = train.lora_targets == "all-linear"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=train.lora_rank,
        lora_alpha=train.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if everywhere else train.lora_targets.split(","),
    )
    try:
        return peft.get_peft_model(inner, config)
    except ValueError as error:
        raise UsageError(f"train.lora_targets = {train.lora_targets}: {one_line(error)}") from None


def import_transformers() -> Any:
    """The library. UsageError says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"this run's model needs the transformers library ({error}): {NEEDS_HF}") from None
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft)\."
    )  # between the two of them
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _config(transformers: Any, text: str) -> Any:
    values = json.loads(text)
    try:
        return transformers.AutoConfig.for_model(**values)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"model.config names no model of this transformers library: {one_line(error)}"
        ) from None


def config_text(folder_or_name: str, revision: str = "") -> str:
    """The config.json of a model as `model.config` wants it: sorted, compact, without what names a machine or version.

    UsageError if there is none.
    """
    transformers = import_transformers()
    try:
        if folder_or_name.endswith(".json"):
            values = json.loads(Path(folder_or_name).read_text())
        else:
            config = transformers.AutoConfig.from_pretrained(folder_or_name, revision=revision or "main")
            values = config.to_dict()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot get at the model (--model) {folder_or_name}: {one_line(error)}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise UsageError(f"{folder_or_name} is no model's config.json: it has no model_type")
    dropped = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return json.dumps(
        {k: v for k, v in values.items() if k not in dropped}, sort_keys=True, separators=(",", ":")
    )


def find_folder(name: str, path: Path | None, revision: str = "") -> Path:
    """Where a model's files are: this machine's copy, or downloaded from the hub. UsageError if they cannot be had."""
    if path is not None and path.is_dir():
        return path
    if path is not None:
        raise UsageError(f"there is no model folder (--model) {path}")
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED_FILES)))
    except Exception as error:  # no network, no such name: it has many
        raise UsageError(
            f"the model (--model) {name} is no folder here, and cannot be had from the hub: {one_line(error)}"
        ) from None


def weights_sha256(folder: Path) -> str:
    """Hex SHA-256 of the names and contents of a model's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"the model folder (--model) {folder} has no .safetensors files")
    whole = hashlib.sha256()
    for path in files:
        content = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                content.update(piece)
        whole.update(f"{content.hexdigest()}  {path.name}\n".encode())
    return whole.hexdigest()


def num_trained(config: str, train: TrainConfig) -> int:
    """Number of trained parameters of a model with this config, found without its memory."""
    return sum(math.prod(shape) for _, shape in trained_shapes(config, train))


def trained_shapes(config: str, train: TrainConfig) -> Shapes:
    """(name, shape) of the trained parameters of a model with this config, found without its memory."""
    transformers = import_transformers()
    with torch.device("meta"):
        inner = transformers.AutoModelForCausalLM.from_config(_config(transformers, config))
        if train.method != "full":
            inner = with_adapters(inner, train)
    return [(name, tuple(p.shape)) for name, p in inner.named_parameters() if p.requires_grad]


def shape_of(config: str) -> dict[str, int]:
    """What the manifest says of a model's shape, from its config; 1 where the config does not say."""
    values = json.loads(config)

    def first(*names: str) -> int:
        found = next((values[name] for name in names if isinstance(values.get(name), int)), 1)
        return max(1, int(found))

    dim = first("hidden_size", "n_embd", "d_model")
    return {
        "vocab_size": first("vocab_size"),
        "dim": dim,
        "num_layers": first("num_hidden_layers", "n_layer", "num_layers"),
        "num_heads": first("num_attention_heads", "n_head", "num_heads"),
        "hidden_dim": max(first("intermediate_size", "n_inner", "ffn_dim"), dim),
        "seq_len": first("max_position_embeddings", "n_positions", "n_ctx"),
    }
