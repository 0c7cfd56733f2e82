"""What was typed about the data and the tokenizer, as settings of the run's manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtrain.trainer.errors import UsageError

DATA_FLAGS = {"dataset": "data.name", "subset": "data.subset", "split": "data.split", "column": "data.column"}
"""Flags about the data set, and the manifest key each one sets."""


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
    if args.tokenizer is not None:
        overrides.update(_tokenizer(args.tokenizer))
    return overrides


def local_tokenizer(name: str | None) -> Path | None:
    """The tokenizer's file, if --tokenizer named one."""
    return Path(name) if name is not None and Path(name).exists() else None


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
