"""`dtrain bench codec`: how long the codec takes and how many bits it needs, against their floors.

Kernels, the plain-torch reference and the memory floor run by turns in one process; figures are medians. Ratios
between them mean more than the figures alone, which depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dtrain.compression.codec import Codec
from dtrain.compression.kernels import pick
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.kernels.reference import ReferenceKernel
from dtrain.compression.spec import TRANSFORMS, VALUE_BITS, CodecSpec
from dtrain.experiments import bench_codec_data, bench_codec_machine, bench_codec_measure, bench_codec_memory
from dtrain.trainer.errors import UsageError

Deltas = list[list[torch.Tensor]]
Shapes = Sequence[tuple[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel with one configuration."""

    kernel: str
    transform: str
    k: int
    value_bits: int
    threads: int
    device: str
    data: str
    """uniform (random numbers) or real (deltas of a training)."""
    encode_ns_per_param: float
    decode8_ns_per_param: float
    encode_gain: float
    """How many times as fast as with the first number of threads."""
    decode8_gain: float
    bits_per_coefficient: float
    """Everything included."""
    floor_bits_per_coefficient: float
    """For positions without pattern and two fp16 scales per chunk."""
    entropy_bits_per_coefficient: float
    """Measured: gaps and levels, order 0, and the sign; without scales."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "--params", type=float, default=35e6, metavar="N", help="random parameters (default 35e6)"
    )
    parser.add_argument(
        "--k", type=_numbers, default=[32, 64, 128], metavar="K,…", help="kept of 4096 (32,64,128)"
    )
    parser.add_argument(
        "--transform", type=_names, default=["none", "dct"], metavar="T,…", help="none, dct or both"
    )
    parser.add_argument(
        "--value-bits", type=int, default=2, choices=VALUE_BITS, help="bits per value (default 2)"
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where the deltas are (default cpu)"
    )
    parser.add_argument(
        "--threads", type=_numbers, default=[1], metavar="N,…", help="CPU threads (default 1)"
    )
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="timed rounds (default 9)")
    parser.add_argument(
        "--rounds", type=int, default=12, metavar="N", help="of the training (default 12; 0: none)"
    )
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a busy machine, one thread"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    _check(args)
    console, machine = Console(width=None if sys.stdout.isatty() else 130), _machine()
    console.print(machine, style="dim")
    rows: list[Row] = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(
        args.threads[0]
    )  # for the training, too: on a busy machine many threads wait for one another
    data = {"uniform": _uniform(args)}
    if args.rounds:
        console.print(f"Training the tiny model for {args.rounds} rounds to have real deltas…", style="dim")
        data["real"] = _real(args, console)
    try:
        for name, (shapes, deltas) in data.items():
            for transform in args.transform:
                for k in args.k:
                    spec = CodecSpec(k=k, value_bits=args.value_bits, transform=transform)
                    rows += _measure(spec, shapes, deltas, args, name)
                    console.print(f"measured {name}, {transform}, k = {k}", style="dim")
    finally:
        torch.set_num_threads(threads_before)
    console.print(_table(rows))
    gains = {threads: bench_codec_machine.gains(threads) for threads in args.threads if threads > 1}
    for line in _gains(rows, gains):
        console.print(line)
    memory = bench_codec_memory.peak_ratio(
        CodecSpec(k=args.k[0], value_bits=args.value_bits), *data["uniform"]
    )
    if memory is not None:
        console.print(f"Error feedback and temporaries at most: {memory:.3f} × the parameters' fp32 bytes.")
    if args.json:
        report = {
            "machine": machine,
            "peak_memory_ratio": memory,
            "thread_gains_of_the_machine": gains,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _uniform(args: argparse.Namespace) -> tuple[Shapes, Deltas]:
    shapes, tensors = bench_codec_data.uniform(int(args.params), seed=0)
    return shapes, [[tensor.to(args.device) for tensor in tensors]]


def _real(args: argparse.Namespace, console: Console) -> tuple[Shapes, Deltas]:
    spec = CodecSpec(k=args.k[0], value_bits=args.value_bits)
    shapes, deltas, losses = bench_codec_data.real(args.rounds, spec, batch_size=8)
    console.print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}", style="dim")
    return shapes, [[tensor.to(args.device) for tensor in delta] for delta in deltas]


def _measure(
    spec: CodecSpec, shapes: Shapes, deltas: Deltas, args: argparse.Namespace, data: str
) -> list[Row]:
    kernels: list[Kernel] = [ReferenceKernel(exact=False)]
    if pick.kernel(args.device).name != "reference":
        kernels.insert(0, pick.kernel(args.device))
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    timings = bench_codec_measure.time_all(
        spec, shapes, deltas, kernels, args.threads, args.repetitions, clock
    )
    codec = Codec(spec, shapes, kernel=kernels[0])
    payload = bench_codec_measure.payloads_of(codec, deltas)[-1]
    bits = bench_codec_measure.bits_per_coefficient(codec, payload)
    entropy = bench_codec_measure.entropy_bits(codec, payload)
    return [
        Row(
            kernel=name,
            transform=spec.transform,
            k=spec.k,
            value_bits=spec.value_bits,
            threads=threads,
            device=args.device,
            data=data,
            encode_ns_per_param=timing.encode_ns_per_param,
            decode8_ns_per_param=timing.decode8_ns_per_param,
            encode_gain=timing.encode_gain,
            decode8_gain=timing.decode8_gain,
            bits_per_coefficient=bits,
            floor_bits_per_coefficient=bench_codec_measure.floor_bits(spec),
            entropy_bits_per_coefficient=entropy,
        )
        for threads, found in timings.items()
        for name, timing in found.items()
    ]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Codec: ns per parameter (× the memory floor), bits per kept coefficient")
    for heading in ("data", "transform", "k", "threads", "kernel"):
        table.add_column(heading)
    for heading in ("encode", "", "decode 8", "", "bits", "floor", "entropy"):
        table.add_column(heading, justify="right")
    floor = 1.0
    for row in rows:
        if row.kernel == "floor":
            floor = row.encode_ns_per_param
        table.add_row(
            row.data,
            row.transform,
            str(row.k),
            str(row.threads),
            row.kernel,
            f"{row.encode_ns_per_param:.2f}",
            f"{row.encode_ns_per_param / floor:.1f}×",
            f"{row.decode8_ns_per_param:.2f}",
            f"{row.decode8_ns_per_param / floor:.1f}×",
            f"{row.bits_per_coefficient:.2f}",
            f"{row.floor_bits_per_coefficient:.2f}",
            f"{row.entropy_bits_per_coefficient:.2f}",
        )
    return table


def _gains(rows: Sequence[Row], machine: dict[int, dict[str, float]]) -> list[str]:
    """What more threads gained over the first number of them, beside what this machine's cores could give."""
    kernel = next(row.kernel for row in rows if row.kernel != "floor")
    lines = [
        f"{row.data}, {row.transform}, k = {row.k}: {row.threads} threads encode {row.encode_gain:.2f}×, "
        f"decode {row.decode8_gain:.2f}× as fast as {rows[0].threads}."
        for row in rows
        if row.kernel == kernel and row.threads > rows[0].threads
    ]
    for threads, gain in machine.items():
        lines.append(
            f"This machine's own gain with {threads} threads: {gain['arithmetic']:.2f}× for vector arithmetic in "
            f"the cache, {gain['memory']:.2f}× for passes over memory."
        )
    return lines


def _machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    python = platform.python_version()
    return (
        f"{cpu or platform.processor()}{gpu}, {platform.system()} {platform.machine()}, Python {python}, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _check(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a CUDA GPU that torch can use; leave it out to measure the CPU")
    if not 1 <= args.params <= 1e10:
        raise UsageError(f"--params must be 1 to 1e10, not {args.params:g}")
    if args.repetitions < 1 or args.rounds < 0 or min([*args.threads, *args.k]) < 1:
        raise UsageError("--repetitions, --threads and --k must be at least 1, --rounds at least 0")
    if args.clock == "cpu" and args.threads != [1]:
        raise UsageError("--clock cpu adds up the time of all threads: it is for --threads 1")
    if any(k > 4096 for k in args.k):
        raise UsageError("--k counts kept coefficients of 4096, so it can't be more")
    for name in args.transform:
        if name not in TRANSFORMS:
            raise UsageError(f"--transform {name!r} is unknown; choose from {', '.join(TRANSFORMS)}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    """Run without the `dtrain` command: `python -m dtrain.experiments.bench_codec`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    try:
        sys.exit(run(parser.parse_args()))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
