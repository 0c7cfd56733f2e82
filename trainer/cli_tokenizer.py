"""`dtrain tokenizer train|show`: makes a byte-level BPE tokenizer from text, and tells one's fingerprint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dtrain.trainer.errors import UsageError

END = "<|endoftext|>"
SAMPLE = "The quick brown fox jumps over 13 lazy dogs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain tokenizer train --data texts/ --vocab 8192 --out tokenizer.json"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="make one from text", description="Make a tokenizer from text.")
    train.add_argument("--data", type=Path, required=True, help="file or folder: text, JSONL, Parquet, Arrow")
    train.add_argument("--column", default="text", help="the column that holds the text")
    train.add_argument("--vocab", type=int, default=8192, help="number of distinct tokens")
    train.add_argument("--max-mb", type=float, default=200.0, help="megabytes of text to learn from, at most")
    train.add_argument("--out", type=Path, default=Path("tokenizer.json"), help="where it goes")
    show = actions.add_parser("show", help="its size and fingerprint", description="Look at a tokenizer.")
    show.add_argument("name", help="a file, or a name on the hub")


def run(args: argparse.Namespace) -> int:
    """Run one of the actions."""
    if args.action == "train":
        _train(args)
        return 0
    _show(args.name)
    return 0


def _train(args: argparse.Namespace) -> None:
    from dtrain.trainer.tokenizer import NEEDS_HF

    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UsageError(f"this needs the tokenizers library: {NEEDS_HF}") from None
    if not 257 <= args.vocab <= 1 << 20:
        raise UsageError(f"--vocab {args.vocab} will not do: type 257 to {1 << 20}")
    if args.out.exists():
        raise UsageError(f"{args.out} is there already: type --out with another name")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(args.data, args.column, args.max_mb * 1e6), trainer)
    try:
        tokenizer.save(str(args.out))
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"cannot write {args.out}: {error}") from None
    _show(str(args.out))
    print(f"Train with it: dtrain worker --run-id NAME --data {args.data} --tokenizer {args.out}")


def _texts(path: Path, column: str, most_bytes: float) -> Iterator[str]:
    from dtrain.trainer.documents import check_column, documents
    from dtrain.trainer.sources import cut, local_files

    files, read = local_files(path), 0
    for file in files:
        check_column(file, column)
    for piece in cut(files, 1 << 20):
        for text in documents(piece, column, lambda line: print(f"{line}.")):
            yield text
            read += len(text)
            if read >= most_bytes:
                return


def _show(name: str) -> None:
    from dtrain.trainer.tokenizer import load

    found = load(name)
    tokens = found.encode([SAMPLE])[0]
    print(
        f"{name}: {found.size:,} tokens, document end {found.end}; fingerprint {found.fingerprint}\n"
        f"{SAMPLE!r} becomes {len(tokens)} tokens: {' '.join(map(str, tokens.tolist()))}"
    )
