"""`dtrain data check|assign`: what a run trains on, before anybody does."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.cli_flags import add_local_flags, add_run_flags
from dtrain.trainer.cli_propose import local_tokenizer
from dtrain.trainer.cli_run import proposed_manifest, run_folder
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.trainer.data import Data
    from dtrain.trainer.manifest import Manifest

SAMPLE_CHARS = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain data check --data corpus.jsonl --column text --tokenizer tokenizer.json"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="samples, tokens, speed", description="Samples, tokens, speed.")
    check.add_argument("--samples", type=int, default=3, help="sequences to show")
    check.add_argument("--seconds", type=float, default=5.0, help="how long to measure the speed")
    assign = actions.add_parser(
        "assign",
        help="what a peer trains on in a round",
        description="The files' pieces, or the text's sequences, that a peer trains on in a round.",
    )
    assign.add_argument("--peer-id", help="the peer, in its own lane")
    assign.add_argument("--lane", type=int, help="the lane that the peer announces, if that is another")
    assign.add_argument("--round", type=int, required=True, help="the run's round, from 0")
    for command in (check, assign):
        command.add_argument("--run-id", metavar="NAME", help="a run that is in ./dtrain-runs already")
        command.add_argument("--data", type=Path, help="file or folder to train on")
        add_local_flags(command)
        add_run_flags(command)


def run(args: argparse.Namespace) -> int:
    """Run one of the actions."""
    from dtrain.trainer.data import open_data

    manifest = _manifest(args)
    data = open_data(manifest, args.data, local_tokenizer(args), lambda line: print(line, flush=True))
    if args.action == "assign":
        _assign(args, manifest, data)
    else:
        _check(args, manifest, data)
    data.close()
    return 0


def _manifest(args: argparse.Namespace) -> Manifest:
    """Of a run that is here, or of what was typed."""
    from dtrain.trainer.manifest import preset_manifest
    from dtrain.trainer.signing import SignedManifest

    if args.run_id is not None:
        found = sorted(run_folder(args.run_id).glob("**/manifest.json"))
        if found:
            return SignedManifest.from_json(found[0].read_text()).manifest
    name = args.run_id or "check"
    return proposed_manifest(args, name) or preset_manifest(name)


def _check(args: argparse.Namespace, manifest: Manifest, data: Data) -> None:
    from dtrain.trainer.streamed import StreamedCorpus

    print(
        f"Data: {manifest.data.title}, in tokens of {manifest.data.tokenizer} ({data.tokenizer.size:,} of them)."
    )
    if isinstance(data, StreamedCorpus):
        for part in data.parts:
            files = {piece.file for piece in (*part.train, *part.held)}
            size = sum(file.num_bytes for file in files)
            print(
                f"  {part.config.name}: {len(files)} files, {size / 1e6:,.1f} MB, in {len(part.train):,} pieces to "
                f"train on and {len(part.held):,} kept for evaluation; {part.deal.per_round} a round for each worker"
            )
    train = manifest.train
    began = time.monotonic()
    batches = data.batches(
        seed=train.seed,
        run_id=manifest.run_id,
        round=0,
        peer_id="check",
        batch_size=train.batch_size,
        seq_len=train.seq_len,
    )
    x, _ = next(batches)
    print(f"First batch after {time.monotonic() - began:.2f} s.")
    for row in x[: args.samples]:
        text = data.tokenizer.decode(row.tolist())
        print(f"  {len(row)} tokens, {len(text.encode())} bytes: {text[:SAMPLE_CHARS]!r}")
    began, count = time.monotonic(), 0
    for x, _ in itertools.takewhile(lambda _: time.monotonic() - began < args.seconds, batches):
        count += x.numel()
    rate = count / max(1e-9, time.monotonic() - began)
    print(f"{count:,} tokens in {args.seconds:g} s: {rate:,.0f} tokens/s.")
    held = sum(
        x.numel()
        for x, _ in data.eval_batches(
            batch_size=train.batch_size, seq_len=train.seq_len, max_tokens=manifest.data.eval_tokens
        )
    )
    print(f"Evaluation: {held:,} tokens.")


def _assign(args: argparse.Namespace, manifest: Manifest, data: Data) -> None:
    from dtrain.trainer.assignment import lane_of
    from dtrain.trainer.data import Corpus
    from dtrain.trainer.streamed import StreamedCorpus

    if not data.lanes:
        raise UsageError("this run trains at random places of its text (data.lanes = 0): nothing is assigned")
    if (args.peer_id is None) == (args.lane is None):
        raise UsageError("whose data? type --peer-id, or --lane with the lane that the peer announces")
    lane = args.lane if args.lane is not None else lane_of(args.peer_id, data.lanes)
    if not 0 <= lane < data.lanes or args.round < 0:
        raise UsageError(
            f"there is no such lane or round: lanes are 0 to {data.lanes - 1}, rounds begin at 0"
        )
    print(f"Round {args.round}, lane {lane} of {data.lanes}:")
    if isinstance(data, Corpus):
        for epoch, place in data.assigned(
            manifest.train.seed, manifest.run_id, args.round, lane, manifest.train.seq_len
        ):
            print(f"  epoch {epoch}, sequence {place}")
        return
    assert isinstance(data, StreamedCorpus)
    for part in data.parts:
        for epoch, unit in data.assigned(part, args.round, lane):
            piece = part.train[unit]
            print(f"  epoch {epoch}, {piece.file.url}, piece {piece.index + 1} of {piece.count}")
