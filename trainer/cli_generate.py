"""`dtrain generate --prompt TEXT`: the run's model writes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.trainer.cli_flags import add_trained_flags
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.trainer.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = 'example: dtrain generate --run-id our-model --prompt "def main("'
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write, at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text")
    add_trained_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and what follows it, as it is written."""
    from dtrain.trainer.cli_propose import local_tokenizer
    from dtrain.trainer.sampling import write
    from dtrain.trainer.tokenizer import open_tokenizer
    from dtrain.trainer.trained import load

    if args.tokens < 1 or args.temperature < 0:
        raise UsageError("--tokens must be at least 1, and --temperature at least 0")
    trained = load(args)
    config = trained.manifest
    tokenizer = open_tokenizer(config.data, local_tokenizer(args))
    prompt = tokenizer.encode([args.prompt])[0].tolist() or [tokenizer.end]
    written: list[int] = []
    shown = _show(tokenizer, prompt, "")
    stream = write(
        trained.model,
        prompt,
        config.model.seq_len,
        args.tokens,
        temperature=args.temperature,
        seed=args.seed,
        vocab=min(tokenizer.size, config.model.vocab_size),
    )
    for token in stream:
        if token == tokenizer.end:
            break
        written.append(token)
        shown = _show(tokenizer, prompt + written, shown)
    print(tokenizer.decode(prompt + written)[len(shown) :])
    return 0


def _show(tokenizer: Tokenizer, tokens: Sequence[int], shown: str) -> str:
    """Print what is new; the last character may still be incomplete."""
    text = tokenizer.decode(tokens).rstrip("\ufffd")
    if not text.startswith(shown):
        return shown
    sys.stdout.write(text[len(shown) :])
    sys.stdout.flush()
    return text
