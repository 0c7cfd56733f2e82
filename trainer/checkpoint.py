"""Checkpoints: safetensors files that know whether they are whole, written so that a crash loses none.

A file is written under a temporary name, flushed to the disk, renamed, and its folder flushed: after `save`
returns the checkpoint survives a power cut, and before that the previous one is untouched. Which is newest is
read from the files themselves; there is no pointer that could be wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtrain.trainer.disk import flush
from dtrain.trainer.errors import CheckpointError, RunError, UsageError
from dtrain.trainer.outer import digest_of
from dtrain.trainer.text import one_line

logger = logging.getLogger(__name__)

FORMAT = "dtrain-checkpoint-1"
METADATA_KEY = "dtrain"
THETA = "theta"
SHARED = "shared."
"""`Checkpoint.digest` is of the tensor THETA and of those whose name begins with SHARED."""


@dataclass
class Checkpoint:
    """Everything a worker needs to go on from a round, or a newcomer to begin there."""

    round: int
    """Outer steps completed."""
    tokens: int
    """Tokens the swarm has trained so far."""
    digest: bytes
    """Digest of theta and the strategy's shared state, 32 bytes."""
    manifest_hash: bytes
    """Hash of the run's manifest, 32 bytes."""
    tensors: dict[str, Tensor]
    """Must hold "theta", flat fp32 on the CPU; error feedback, moments and so on go by other names."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that JSON can hold."""


class CheckpointStore:
    """One worker's checkpoints in one folder, the newest `keep` of them; opening sweeps temporary files."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        assert keep >= 1
        self.folder = folder
        self.keep = keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stray in folder.glob("*.tmp"):
                stray.unlink()
            probe = folder / "probe.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"cannot write checkpoints to {folder}: {error.strerror}; type --folder with a folder you own"
            ) from None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; once this returns it is what `newest` gives. RunError if the disk refuses."""
        path = self.folder / f"round-{checkpoint.round:08d}.safetensors"
        temporary = path.with_suffix(".tmp")
        try:
            save_file(_storable(checkpoint), temporary, metadata=_metadata(checkpoint))
            flush(temporary)
            os.replace(temporary, path)
            self._retire(checkpoint.round)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise RunError(f"cannot write the checkpoint {path}: {one_line(error)}") from None
        return path

    def newest(self, manifest_hash: bytes | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None; damaged ones get a line in the log and are passed
        over.

        With `manifest_hash`, a checkpoint of another run raises UsageError.
        """
        return newest_in(self.folder, manifest_hash)

    def _retire(self, round: int) -> None:
        """Drop old checkpoints. Files of later rounds are damaged, or of a past that the swarm has left: they
        must not hide the one just written, but are renamed, not deleted, in case they are all that is left of
        a long run."""
        files = files_in(self.folder)
        for later, path in files:
            if later > round:
                os.replace(path, path.with_suffix(".set-aside"))
        for _, path in [entry for entry in files if entry[0] <= round][self.keep :]:
            path.unlink()


def files_in(folder: Path) -> list[tuple[int, Path]]:
    """(round, path) of all checkpoints in a folder, newest first."""
    found = []
    for path in folder.iterdir():
        if match := re.fullmatch(r"round-(\d{8,})\.safetensors", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_in(folder: Path, manifest_hash: bytes | None = None) -> Checkpoint | None:
    """See `CheckpointStore.newest`; only reads, so a worker may be writing there meanwhile."""
    for _, path in files_in(folder):
        try:
            checkpoint = read_file(path)
        except CheckpointError as error:
            logger.warning("%s; taking the one before it", error)
            continue
        if manifest_hash is not None and checkpoint.manifest_hash != manifest_hash:
            theirs, ours = checkpoint.manifest_hash.hex()[:12], manifest_hash.hex()[:12]
            raise UsageError(
                f"{folder} holds checkpoints of another run (manifest {theirs}, this is {ours}): "
                "type --folder with another folder, or give the same settings"
            )
        return checkpoint
    return None


def read_file(path: Path) -> Checkpoint:
    """Read one checkpoint file. CheckpointError if it is damaged in any bit."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned out of the file's memory map, so that the file can be replaced while its tensors are in
            # use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return _verified(tensors, metadata)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged ({one_line(error)})") from None


def _storable(checkpoint: Checkpoint) -> dict[str, Tensor]:
    assert THETA in checkpoint.tensors
    return {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    body = json.dumps(
        {
            "round": checkpoint.round,
            "tokens": checkpoint.tokens,
            "digest": checkpoint.digest.hex(),
            "manifest_hash": checkpoint.manifest_hash.hex(),
            "extra": checkpoint.extra,
        },
        sort_keys=True,
    )
    label = {"format": FORMAT, "body": body, "seal": _seal(body, checkpoint.tensors)}
    # One key only: safetensors writes several in random order, and equal checkpoints shall be equal files.
    return {METADATA_KEY: json.dumps(label, sort_keys=True)}


def _verified(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    label = json.loads(metadata.get(METADATA_KEY, "{}"))
    if label.get("format") != FORMAT:
        raise ValueError(f"its format is {label.get('format')!r}, not {FORMAT!r}")
    if _seal(label["body"], tensors) != label["seal"]:
        raise ValueError("its content does not match its seal")
    body = json.loads(label["body"])
    checkpoint = Checkpoint(
        round=body["round"],
        tokens=body["tokens"],
        digest=bytes.fromhex(body["digest"]),
        manifest_hash=bytes.fromhex(body["manifest_hash"]),
        tensors=tensors,
        extra=body["extra"],
    )
    shared = {name.removeprefix(SHARED): t for name, t in tensors.items() if name.startswith(SHARED)}
    if digest_of(tensors[THETA], shared) != checkpoint.digest:
        raise ValueError("its theta does not match its digest")
    return checkpoint


def _seal(body: str, tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the metadata's body and every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
