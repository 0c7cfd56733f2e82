"""A run's newest weights as a model that can be used: what `dtrain generate`, `eval` and `export` begin with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dtrain.trainer.checkpoint import THETA, Checkpoint, files_in, newest_in
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.models import ModelPlace, build_model
from dtrain.trainer.settings import resolve_device
from dtrain.trainer.signing import SignedManifest


@dataclass(frozen=True)
class Trained:
    """Theta of a run."""

    folder: Path
    """The worker's, from which it was read."""
    manifest: Manifest
    checkpoint: Checkpoint
    model: nn.Module
    """With theta in it, in eval mode."""


def load(args: argparse.Namespace) -> Trained:
    """The newest theta that the flags of `cli_flags.add_trained_flags` mean. UsageError if there is none."""
    folder = _worker_folder(args)
    manifest = _manifest(folder)
    checkpoint = newest_in(folder / "checkpoints", manifest.hash)
    if checkpoint is None:
        raise UsageError(f"{folder} has no checkpoint yet: train a few rounds first")
    path = Path(args.model) if args.model and Path(args.model).is_dir() else None
    model = build_model(manifest, ModelPlace(resolve_device(args.device), path, args.trust_code))
    flat = FlatParameters(model).flat
    theta = checkpoint.tensors[THETA]
    if theta.shape != flat.shape:
        raise RunError(
            f"the checkpoint in {folder} has {theta.numel()} weights, the run's model {flat.numel()}"
        )
    with torch.no_grad():
        flat.copy_(theta)
    return Trained(folder, manifest, checkpoint, model.eval())


def _worker_folder(args: argparse.Namespace) -> Path:
    if args.folder is not None:
        folder = Path(args.folder)
        if not (folder / "checkpoints").is_dir():
            raise UsageError(f"--folder {folder} is no worker's folder: it has no checkpoints")
        return folder
    if args.run_id is None:
        raise UsageError("which run? type --run-id NAME, or --folder with a worker's folder")
    run = Path("dtrain-runs") / args.run_id
    found = [path.parent for path in run.glob("*/checkpoints") if files_in(path)]
    if not found:
        raise UsageError(f"no worker has left a checkpoint in {run}: type --folder with a worker's folder")
    newest: Path = max(found, key=lambda folder: files_in(folder / "checkpoints")[0][0])
    return newest


def _manifest(folder: Path) -> Manifest:
    try:
        return SignedManifest.from_json((folder / "manifest.json").read_text()).manifest
    except OSError as error:
        raise UsageError(f"{folder} has no manifest.json: {error.strerror}") from None
