"""`dtrain bench data`: how long a training device waits for data that is streamed from a server on loopback."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dtrain.experiments.bench_worker import run_worker
from dtrain.experiments.range_server import serving
from dtrain.trainer.data import python_sources, stdlib_folder

VOCAB = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the bench's flags."""
    parser.add_argument("--preset", default="small", help="model size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner-steps", type=int, default=4, help="inner steps per round")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per inner step")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Train on Python's own sources, as JSONL over HTTP, in tokens of a BPE tokenizer."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as base:
        folder = Path(base)
        (folder / "served").mkdir()
        corpus, tokenizer = folder / "served" / "corpus.jsonl", folder / "tokenizer.json"
        _write_corpus(corpus)
        train = ["tokenizer", "train", "--data", str(corpus), "--vocab", str(VOCAB), "--max-mb", "5"]
        command = [sys.executable, "-m", "dtrain.trainer.cli", *train, "--out", str(tokenizer)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with serving(folder / "served") as (url, server):
            flags = [
                "--dataset",
                f"{url}/corpus.jsonl",
                "--tokenizer",
                str(tokenizer),
                "--preset",
                args.preset,
            ]
            flags += ["--inner-steps", str(args.inner_steps), "--batch-size", str(args.batch_size)]
            flags += ["--rounds", str(args.rounds), "--eval-every", "0", "--device", args.device]
            done = run_worker(folder, flags)
        last = done.of("round")[-1]
        figures = {
            "preset": args.preset,
            "tokens": last["tokens"],
            "train_s": last["train_s"],
            "data_wait_s": last["data_wait_s"],
            "data_wait_share": last["data_wait_s"] / last["train_s"],
            "tokens_per_s": last["tokens"] / last["train_s"],
            "requests": server.num_requests,
            "corpus_bytes": corpus.stat().st_size,
        }
    print(
        f"{args.preset} on {args.device}: {figures['tokens']:,} tokens in {figures['train_s']:.1f} s "
        f"({figures['tokens_per_s']:,.0f} tokens/s), of which {figures['data_wait_s']:.2f} s waiting for data: "
        f"{100 * figures['data_wait_share']:.2f} %"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _write_corpus(path: Path) -> None:
    """Python's library sources, one JSON object a line."""
    folder = stdlib_folder()
    with path.open("w") as file:
        for name in python_sources(folder):
            text = (folder / name).read_text("utf-8", "replace")
            file.write(json.dumps({"name": name, "text": text}) + "\n")
