"""`dtrain eval`: how well the run's model predicts text that it has not been trained on."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.cli_flags import add_trained_flags
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtrain.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """What an evaluation gave."""

    loss: float
    """Mean, in nats per token."""
    tokens: int
    bytes: int
    """Of UTF-8, that the tokens stand for."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain eval --run-id our-model; dtrain eval --run-id our-model --text other.txt"
    parser.add_argument("--data", type=Path, help="your copy of the run's data, if it is local")
    parser.add_argument("--text", type=Path, help="evaluate on this instead: text, JSONL, Parquet, Arrow")
    parser.add_argument("--tokens", type=int, default=0, help="how many, at most (default: as the run does)")
    parser.add_argument("--tasks", help="score by these tasks of lm-evaluation-harness instead, with commas")
    parser.add_argument("--tasks-from", type=Path, metavar="DIR", help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task, at most (default: all)")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    add_trained_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from dtrain.trainer.cli_propose import local_tokenizer
    from dtrain.trainer.data import open_data
    from dtrain.trainer.tokenizer import open_tokenizer
    from dtrain.trainer.trained import load

    if args.tokens < 0 or args.limit < 0:
        raise UsageError("--tokens and --limit must be at least 1 where they are given")
    if (args.tasks_from or args.limit) and not args.tasks:
        raise UsageError("--tasks-from and --limit go with --tasks")
    if args.tasks:
        return _run_tasks(args)
    trained = load(args)
    manifest = trained.manifest
    most = args.tokens or manifest.data.eval_tokens
    batch_size, seq_len = manifest.train.batch_size, manifest.train.seq_len
    if args.text is not None:
        tokenizer = open_tokenizer(manifest.data, local_tokenizer(args))
        batches = _windows(args.text, manifest.data.column, tokenizer, batch_size, seq_len, most)
    else:
        data = open_data(manifest, args.data, local_tokenizer(args), lambda line: print(line, flush=True))
        tokenizer = data.tokenizer
        batches = data.eval_batches(batch_size=batch_size, seq_len=seq_len, max_tokens=most)
    score = evaluate(trained.model, tokenizer, batches)
    if args.json:
        found = {**asdict(score), "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        print(json.dumps({"run_id": manifest.run_id, "round": trained.checkpoint.round, **found}))
        return 0
    print(
        f"{manifest.run_id} after {trained.checkpoint.round} rounds and {trained.checkpoint.tokens:,} tokens, on "
        f"{args.text or manifest.data.title}:\n"
        f"  loss            {score.loss:.4f} nats per token\n"
        f"  perplexity      {score.perplexity:.3f}\n"
        f"  bits per byte   {score.bits_per_byte:.4f}\n"
        f"  over            {score.tokens:,} tokens, {score.bytes:,} bytes"
    )
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    """Print the scores by tasks of lm-evaluation-harness."""
    from dtrain.trainer.cli_propose import local_tokenizer
    from dtrain.trainer.tokenizer import open_tokenizer
    from dtrain.trainer.trained import load

    try:
        from dtrain.trainer.harness import HarnessModel, score
    except ModuleNotFoundError:
        raise UsageError("--tasks needs lm-evaluation-harness: type pip install 'dtrain[tasks]'") from None
    trained = load(args)
    model, data = trained.manifest.model, trained.manifest.data
    tokenizer = open_tokenizer(data, local_tokenizer(args))
    vocab = min(tokenizer.size, model.vocab_size)
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    results = score(
        HarnessModel(trained.model, tokenizer, model.seq_len, vocab), tasks, args.tasks_from, args.limit
    )
    # The harness names a metric "acc,none" and its error "acc_stderr,none".
    scores = {
        task: {key.partition(",")[0]: value for key, value in found.items() if isinstance(value, float)}
        for task, found in results.items()
    }
    if args.json:
        print(
            json.dumps(
                {"run_id": trained.manifest.run_id, "round": trained.checkpoint.round, "tasks": scores}
            )
        )
        return 0
    for task, metrics in scores.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr", math.nan)
                print(f"{task}: {name} {value:.4f}" + ("" if math.isnan(error) else f" +- {error:.4f}"))
    return 0


def evaluate(model: nn.Module, tokenizer: Tokenizer, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """The score over batches x, y [B, T]."""
    import torch

    from dtrain.trainer.compute import Compute

    compute = Compute(model)
    nats, tokens, num_bytes = 0.0, 0, 0
    with torch.no_grad():
        for x, y in batches:
            nats += float(compute.loss(x, y)) * y.numel()
            tokens += y.numel()
            num_bytes += sum(len(tokenizer.decode(row).encode("utf-8")) for row in y.tolist())
    if tokens == 0 or num_bytes == 0:
        raise UsageError("there is nothing to evaluate on: give more text")
    return Score(nats / tokens, tokens, num_bytes)


def _windows(
    path: Path, column: str, tokenizer: Tokenizer, batch_size: int, seq_len: int, most: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The sequences of a text, from its beginning."""
    import numpy as np
    import torch

    from dtrain.trainer.documents import check_column, documents
    from dtrain.trainer.sources import cut, local_files

    tokens: list[int] = []
    files = local_files(path)
    for file in files:
        check_column(file, column)
    for piece in cut(files, 1 << 20):
        for text in documents(piece, column, lambda line: print(f"{line}.", flush=True)):
            tokens += [*tokenizer.encode([text])[0].tolist(), tokenizer.end]
        if len(tokens) > most:
            break
    count = min(most, len(tokens) - 1) // seq_len
    if count < 1:
        raise UsageError(f"{path} is too short: it has {len(tokens)} tokens, a sequence needs {seq_len} + 1")
    whole = torch.from_numpy(np.array(tokens[: count * seq_len + 1], np.int64))
    x, y = whole[:-1].view(count, seq_len), whole[1:].view(count, seq_len)
    for first in range(0, count, batch_size):
        yield x[first : first + batch_size], y[first : first + batch_size]
