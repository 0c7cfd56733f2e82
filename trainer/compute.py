"""How one inner step's gradient is computed on this machine: in which precision, in how many passes.

None of it is the run's business: the gradient is that of the whole batch, up to rounding. A pass that runs out of
memory costs its own time only: the step begins anew with passes of half the size, and at one sequence with activations
that are computed twice instead of kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.trainer.errors import RunError, UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CPU_TOKENS = 1024
"""Tokens per pass on a CPU, which larger ones make no faster; activations of 20 times the width take memory."""

Say = Callable[[str], None]


class Compute:
    """Gradients of one model on one device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str = "auto",
        micro_batch: int = 0,
        recompute: bool = False,
        compile: str = "no",
        say: Say = lambda _: None,
    ) -> None:
        """`micro_batch` is the number of sequences per pass at first, 0 = found here; `recompute` saves memory by
        computing activations twice. UsageError for what this machine or model cannot do."""
        self.model, self._say = model, say
        self.device = next(model.parameters()).device
        self.precision = choose_precision(precision, self.device)
        self.micro_batch = micro_batch
        self.recompute = False
        if recompute and not self._begin_recompute():
            raise UsageError("--recompute: this model does not know how: leave it out")
        # fp16 has few exponents: small gradients would vanish.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._compiled: nn.Module | None = None
        if compile == "yes" or (compile == "auto" and self.device.type == "cuda"):
            self._compiled = torch.compile(model)  # type: ignore[assignment]

    def backward(self, x: Tensor, y: Tensor, restart: Callable[[], None]) -> Tensor:
        """Add the gradient of the mean loss over x, y [B, T] int64 to the parameters'; returns the loss (0-dim).

        With fp16 it is scaled, see `scaler`. `restart` is called before a try that follows a failed one: it must take
        back what that has added. RunError if even one sequence does not fit.
        """
        while True:
            size = self._pass_size(x)
            try:
                return self._passes(x, y, size)
            except torch.OutOfMemoryError:
                failed = True
            assert failed  # the exception, which holds on to memory, is gone here
            restart()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._shrink(size)

    def _pass_size(self, x: Tensor) -> int:
        """Sequences per pass."""
        most = x.shape[0]
        if self.micro_batch:
            return min(self.micro_batch, most)
        if self.device.type == "cpu":
            return max(1, min(most, CPU_TOKENS // x.shape[1]))
        return most

    def _passes(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for first in range(0, x.shape[0], size):
            piece = slice(first, first + size)
            share = y[piece].numel() / y.numel()
            loss = self.loss(x[piece], y[piece])
            self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * share
        return total

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of x, y [B, T] (0-dim), for a backward pass."""
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        with autocast(self.device, self.precision):
            if self._compiled is not None:
                try:
                    loss: Tensor = self._compiled(x, y)
                    return loss
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # the compiler's own, of many kinds
                    self._compiled = None
                    self._say(
                        f"torch.compile does not work here ({type(error).__name__}): going on without it."
                    )
            loss = self.model(x, y)
        return loss

    def _shrink(self, size: int) -> None:
        """Less memory for the next try."""
        if size > 1:
            self.micro_batch = (size + 1) // 2
            self._say(f"Out of memory with {size} sequences a pass: from now on {self.micro_batch}.")
        elif not self.recompute and self._begin_recompute():
            self._say("Out of memory with one sequence a pass: from now on activations are computed twice.")
        else:
            raise RunError(
                f"this {self.device.type} device has too little memory for one sequence of this model: "
                "close other programs that use it, or join with another machine"
            )

    def _begin_recompute(self) -> bool:
        """Keep no activations; False if the model does not know how."""
        inner: Any = getattr(self.model, "inner", None)
        if hasattr(self.model, "recompute"):
            setattr(self.model, "recompute", True)  # noqa: B010  # of whatever kind the model is
        elif hasattr(inner, "activation_checkpointing_enable"):  # from transformers 5
            inner.activation_checkpointing_enable()
        elif hasattr(inner, "gradient_checkpointing_enable"):
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            return False
        self.recompute = True
        return True

    def describe(self) -> str:
        """What was chosen, in a few words."""
        size = f"{self.micro_batch} sequences a pass" if self.micro_batch else "passes as memory allows"
        extra = [
            name
            for name, on in (("recomputing", self.recompute), ("compiled", self._compiled is not None))
            if on
        ]
        return ", ".join([self.precision, size, *extra])


def choose_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; "auto" takes bf16 on GPUs that have it, fp16 on other CUDA GPUs, fp32 elsewhere."""
    if name not in PRECISIONS:
        raise UsageError(
            f"there is no precision (--precision) {name!r}: choose one of {', '.join(PRECISIONS)}"
        )
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[object]:
    """Matrix products in this precision."""
    precision = choose_precision(precision, device)
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def trim_heap() -> None:
    """Give the system back what tensors have left free between each other, where the C library can (glibc)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def device_peak_bytes(device: str) -> int:
    """Most bytes that tensors have taken on a CUDA device so far; 0 on others, where the system tells."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0
