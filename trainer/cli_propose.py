"""What was typed about the data and the tokenizer, as settings of the run's manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.trainer.config import TrainConfig

DATA_FLAGS = {"dataset": "data.name", "subset": "data.subset", "split": "data.split", "column": "data.column"}
"""Flags about the data set, and the manifest key each one sets."""


MODEL_FLAGS = {"method": "train.method", "lora_rank": "train.lora_rank", "lora_targets": "train.lora_targets"}
"""The same for how a model is trained."""


def model_overrides(args: argparse.Namespace) -> dict[str, object]:
    """Dotted keys and values for --model and --method, as far as they were typed."""
    overrides: dict[str, object] = {key: getattr(args, flag) for flag, key in MODEL_FLAGS.items()}
    if args.model is None:
        return overrides
    name, path = args.model, Path(args.model)
    if ":" in name and not path.exists():
        return {**overrides, "model.kind": "factory", "model.name": name}
    from dtrain.trainer.models_hf import config_text, find_folder, num_trained, shape_of, weights_sha256

    folder = None if name.endswith(".json") else find_folder(name, path if path.exists() else None)
    config = config_text(name if folder is None else str(folder))
    train = _train_config(overrides)
    overrides.update({f"model.{key}": value for key, value in shape_of(config).items()})
    return {
        **overrides,
        "model.kind": "transformers",
        "model.name": path.resolve().name.removesuffix(".json") if path.exists() else name,
        "model.config": config,
        "model.weights_sha256": "" if folder is None else weights_sha256(folder),
        "model.params": num_trained(config, train),
    }


def _train_config(overrides: dict[str, object]) -> TrainConfig:
    """The adapters' part of the training section."""
    from dtrain.trainer.config import TrainConfig

    typed: dict[str, Any] = {k.partition(".")[2]: v for k, v in overrides.items() if v is not None}
    return TrainConfig(inner_steps=1, batch_size=1, seq_len=1, lr=1.0, **typed)


def data_overrides(args: argparse.Namespace) -> dict[str, object]:
    """Dotted keys and values for --data, --dataset and --tokenizer, as far as they were typed."""
    overrides: dict[str, object] = {key: getattr(args, flag) for flag, key in DATA_FLAGS.items()}
    if args.dataset is not None:
        if args.data is not None:
            raise UsageError("--data is a file here and --dataset a published one: type one of them")
        source = "files" if "://" in args.dataset else "hub"
        overrides.update({"data.source": source, "data.revision": _revision(args.dataset) or None})
    elif args.data is not None and args.config is None:
        overrides.update(_local(args.data))
    tokenizer = args.tokenizer or tokenizer_of_model(args.model)
    if tokenizer is not None:
        overrides.update(_tokenizer(tokenizer))
    return overrides


def tokenizer_of_model(model: str | None) -> str | None:
    """A trained model comes with its tokenizer, in its folder or under its name on the hub."""
    if model is None or model.endswith(".json"):
        return None
    path = Path(model)
    if path.exists():
        return model if (path / "tokenizer.json").is_file() else None
    return None if ":" in model else model


def local_tokenizer(args: argparse.Namespace) -> Path | None:
    """The tokenizer's file, if --tokenizer or --model named one."""
    name = args.tokenizer or tokenizer_of_model(args.model)
    return Path(name) if name is not None and Path(name).exists() else None


def local_model(name: str | None) -> Path | None:
    """The model's folder, if --model named one."""
    return Path(name) if name is not None and Path(name).is_dir() else None


def _local(path: Path) -> dict[str, object]:
    """Text files are one text; everything else is streamed."""
    from dtrain.trainer.config_data import DEFAULT_LANES
    from dtrain.trainer.data import file_sha256
    from dtrain.trainer.sources import TEXT, format_of, local_files, local_sha256

    if not path.is_dir() and format_of(path.name) in (None, TEXT):
        name, sha256 = path.name, file_sha256(path)
        return {
            "data.source": "file",
            "data.name": name,
            "data.sha256": sha256,
            "data.lanes": DEFAULT_LANES,
        }
    files = local_files(path)
    return {
        "data.source": "files",
        "data.name": path.resolve().name,
        "data.sha256": local_sha256(path, files),
    }


def _revision(name: str) -> str:
    """The commit that a hub data set is at now, so that all workers read the same; "" if that cannot be known."""
    if "://" in name or Path(name).exists():
        return ""
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(name).sha or "")
    except Exception:  # no library, no network, no such name: reading it will tell
        return ""


def _tokenizer(name: str) -> dict[str, object]:
    from dtrain.trainer.config_data import BYTES
    from dtrain.trainer.tokenizer import load

    if name == BYTES:
        return {"data.tokenizer": BYTES}
    found = load(name)
    path = Path(name)
    return {
        "data.tokenizer": path.name if path.exists() else name,
        "data.tokenizer_sha256": found.fingerprint,
        "model.vocab_size": -(-found.size // 64) * 64,
    }
