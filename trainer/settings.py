"""Machine settings: what is this computer's own business and may differ from worker to worker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
COMPILES = ("auto", "yes", "no")


@dataclass(frozen=True)
class MachineSettings:
    """Settings of one worker on one machine."""

    name: str
    """Shown to others beside the peer id; 1 to 64 letters, digits, '.', '-' or '_'."""
    folder: Path
    """Where this worker keeps its checkpoints, metrics and identity."""
    device: str = "auto"
    """"auto" takes CUDA, else Apple's MPS, else the CPU; or "cpu", "cuda", "cuda:1", "mps"; several with commas share
    each batch."""
    threads: int = 0
    """CPU threads for training; 0 = all cores but one, so that the machine stays usable."""
    max_tokens_per_s: float = 0.0
    """Train no faster than this, to keep the machine cool; 0 = no limit."""
    audit: bool = False
    """Check after every round that nothing was lost: produced = delivered + kept (`audit` events in the metrics)."""
    sample_text: bool = False
    """Let theta write a line of text at evaluations, for those who watch the run; one worker of all does."""
    data: Path | None = None
    """This machine's copy of the data to train on, where it is local: a file, or a folder with all of them."""
    tokenizer: Path | None = None
    """This machine's copy of the tokenizer, where it is a file."""
    model: Path | None = None
    """This machine's copy of the model to begin with, where it is a folder."""
    trusted: str = ""
    """The factory (package.module:function) that may make the model, where one does."""
    max_rounds: int = 0
    """Leave after the swarm has completed this many rounds in all; 0 = go on until stopped."""
    eval_every: int = 5
    """Rounds between two evaluations, and one after the last; 0 = none."""
    keep_checkpoints: int = 3
    """Newest checkpoints that stay on disk."""
    checkpoint_to: str = ""
    """URL or folder that gets a copy of each checkpoint, as fsspec knows it; "" = none."""
    checkpoint_every: int = 5
    """Rounds between two checkpoints; 0 = none, not even at the end."""
    precision: str = "auto"
    """Of matrix products: fp32, bf16, fp16; "auto" takes bf16 on a GPU that has it, fp32 on a CPU."""
    micro_batch: int = 0
    """Sequences per pass, of which a step has as many as it needs; 0 = found here."""
    recompute: bool = False
    """Compute activations twice rather than keep them: less memory, a third more time."""
    compile: str = "auto"
    """torch.compile: yes, no, or "auto" = on CUDA GPUs, where it pays."""

    def __post_init__(self) -> None:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name) is None:
            raise UsageError(
                f"worker name (--name) {self.name[:80]!r} will not do: "
                "use 1 to 64 letters, digits, '.', '-' or '_', beginning with a letter or digit"
            )
        for name in self.device.split(","):
            if name.partition(":")[0] not in DEVICES:
                raise UsageError(
                    f"there is no device (--device) {name!r}: choose one of {', '.join(DEVICES)}"
                )
        if self.compile not in COMPILES:
            raise UsageError(f"--compile {self.compile!r} will not do: type one of {', '.join(COMPILES)}")
        for field, flag, least in (
            ("max_tokens_per_s", "--max-tokens-per-s", 0),
            ("threads", "--threads", 0),
            ("micro_batch", "--micro-batch", 0),
            ("max_rounds", "--rounds", 0),
            ("eval_every", "--eval-every", 0),
            ("keep_checkpoints", "--keep-checkpoints", 1),
            ("checkpoint_every", "--checkpoint-every", 0),
        ):
            value = getattr(self, field)
            if value < least:
                raise UsageError(f"{flag} must be at least {least}, not {value}")


def resolve_devices(names: str) -> list[torch.device]:
    """The torch devices that `names`, with commas between them, mean here; see `resolve_device`."""
    return [resolve_device(name) for name in names.split(",")]


def resolve_device(name: str) -> torch.device:
    """The torch device that `name` (see MachineSettings.device) means here; UsageError if there is none."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    kind = name.partition(":")[0]
    if kind == "cuda" and not cuda:
        raise UsageError(
            "--device cuda: torch finds no CUDA GPU here; type --device auto, or check nvidia-smi"
        )
    if kind == "mps" and not mps:
        raise UsageError("--device mps: torch finds no Apple GPU here; type --device auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device (--device) {name!r}; type --device auto") from None
    if kind == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0"
        )
    return device
