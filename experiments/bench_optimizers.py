"""`dtrain bench optimizers`: what each inner optimizer adds to the time of an inner step."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from dtrain.trainer.compute import Compute
from dtrain.trainer.config import TrainConfig
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.model import GPT
from dtrain.trainer.optimizers import OPTIMIZERS, make_optimizers
from dtrain.trainer.settings import resolve_device

PASSES = "forward and backward pass"
TORCHS_MUON = "torch's Muon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the bench's flags."""
    parser.add_argument("--preset", default="tiny", help="model size, and the tokens of an inner step")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repetitions", type=int, default=7, help="of each, by turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Measure the parts of a step by turns and print their medians."""
    if min(args.threads, args.repetitions) < 1:
        raise UsageError("--threads and --repetitions must be at least 1")
    torch.set_num_threads(args.threads)
    medians = measure(args.preset, resolve_device(args.device), args.repetitions)
    table = Table(title=f"An inner step of {args.preset} on {args.device}, {args.threads} threads")
    for name in ("part", "ms", "of the passes"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, seconds in medians.items():
        table.add_row(part, f"{1e3 * seconds:.1f}", f"{100 * seconds / medians[PASSES]:.0f} %")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"preset": args.preset, "median_s": medians}, indent=2) + "\n")
    return 0


def measure(preset: str, device: torch.device, repetitions: int) -> dict[str, float]:
    """Median seconds of the passes over one step's batch and of each optimizer's step."""
    manifest = preset_manifest("bench", preset)
    model, train = GPT(manifest.model).to(device), manifest.train
    compute = Compute(model)
    x = torch.randint(manifest.model.vocab_size, (train.batch_size, train.seq_len), device=device)
    parts: dict[str, Callable[[], object]] = {PASSES: lambda: compute.backward(x, x, lambda: None)}
    parts |= {name: partial(_step, optimizers) for name, optimizers in _optimizers(model, train).items()}
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(1 + repetitions):
        model.zero_grad()
        for name, part in parts.items():
            times[name].append(_seconds(part, device))
    # The first one builds the state.
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _optimizers(model: nn.Module, train: TrainConfig) -> dict[str, Sequence[Optimizer]]:
    """All that this machine has, and torch's Muon beside ours."""
    found: dict[str, Sequence[Optimizer]] = {}
    for name in OPTIMIZERS:
        try:
            found[name] = make_optimizers(model, replace(train, optimizer=name))
        except UsageError as error:
            print(f"without {name}: {error}")
    if hasattr(torch.optim, "Muon"):
        matrices = [p for group in found["muon"][0].param_groups for p in group["params"]]
        muon = torch.optim.Muon(matrices, lr=train.lr, adjust_lr_fn="match_rms_adamw")
        found[TORCHS_MUON] = [muon, *found["muon"][1:]]
    return found


def _step(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def _seconds(part: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    part()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
