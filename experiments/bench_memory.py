"""`dtrain bench memory`: the memory that a worker takes, by preset and option; each row is a real worker's run."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dtrain.experiments.bench_worker import run_worker
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.presets import PRESETS

OPTIONS = {
    "as it is": (),
    "adamw8bit": ("--optimizer", "adamw8bit"),
    "muon": ("--optimizer", "muon"),
    "bf16": ("--precision", "bf16"),
    "recompute": ("--recompute",),
    "diloco": ("--strategy", "diloco"),
    "eager": ("--overlap", "eager"),
}
"""What is measured beside each preset as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the bench's flags."""
    parser.add_argument("--presets", default="tiny,small,gpt2", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--options", default=",".join(OPTIONS), help=f"of {', '.join(OPTIONS)}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inner-steps", type=int, default=2, help="inner steps per round")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=2,
        help="sequences per inner step; a CPU has 1,024 tokens a pass anyway",
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Measure row by row and print the table."""
    presets, options = _chosen(args.presets, PRESETS), _chosen(args.options, OPTIONS)
    console, rows = Console(), []
    table = Table(title=f"Peak memory of a worker on {args.device}, {args.batch_size} sequences a step")
    for name in (
        "preset",
        "option",
        "parameters",
        "trainer, GB",
        "with network, GB",
        "bytes/param",
        "GPU, GB",
    ):
        table.add_column(name, justify="left" if name in ("preset", "option") else "right")
    for preset in presets:
        for option in options:
            row = measure(preset, option, args)
            rows.append(row)
            table.add_row(
                preset,
                option,
                f"{row['num_params'] / 1e6:.1f}M" if row["num_params"] else "",
                *(f"{row[key] / 1e9:.2f}" for key in ("trainer_bytes", "all_bytes")),
                f"{row['trainer_bytes'] / row['num_params']:.0f}" if row["num_params"] else row["problem"],
                f"{row['device_bytes'] / 1e9:.2f}" if row["device_bytes"] else "",
            )
            console.print(f"[dim]{preset}, {option}: {row['trainer_bytes'] / 1e9:.2f} GB[/]")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure(preset: str, option: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: bytes at the peak of the training process, of it with the network's, and of the GPU."""
    flags = ["--preset", preset, "--batch-size", str(args.batch_size), "--inner-steps", str(args.inner_steps)]
    flags += ["--rounds", str(args.rounds), "--checkpoint-every", str(args.rounds), "--eval-every", "0"]
    flags += ["--device", args.device]
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        try:
            done = run_worker(Path(folder), [*flags, *OPTIONS[option]])
        except RunError as error:
            empty = {"num_params": 0, "trainer_bytes": 0, "all_bytes": 0, "device_bytes": 0}
            return {"preset": preset, "option": option, **empty, "problem": str(error)}
    return {
        "preset": preset,
        "option": option,
        "num_params": done.of("start")[0]["num_params"],
        "trainer_bytes": done.peak_trainer_bytes,
        "all_bytes": done.peak_bytes,
        "device_bytes": done.of("stop")[0].get("device_peak_bytes", 0),
        "problem": "",
    }


def _chosen(typed: str, known: Any) -> list[str]:
    names = [name.strip() for name in typed.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {name!r} to measure: choose of {', '.join(known)}")
    return names
