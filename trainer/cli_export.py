"""`dtrain export`: the run's model for other programs, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtrain.trainer.cli_flags import add_trained_flags
from dtrain.trainer.errors import UsageError

FORMATS = ("hf", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain export --run-id our-model --format hf --out our-model"
    parser.add_argument(
        "--format", choices=FORMATS, default="safetensors", help="hf: for transformers and peft"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--merge", action="store_true", help="with hf: add the adapters to the weights")
    parser.add_argument("--push", metavar="REPO", help="also upload it to the Hugging Face hub, as USER/NAME")
    add_trained_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder, and upload it if asked to."""
    from dtrain.trainer.export import write_hf, write_safetensors
    from dtrain.trainer.model_card import write_card
    from dtrain.trainer.tokenizer import open_tokenizer
    from dtrain.trainer.trained import load

    if args.out.exists():
        raise UsageError(f"{args.out} is there already: type --out with the name of a new folder")
    trained = load(args)
    args.out.mkdir(parents=True)
    if args.format == "hf":
        from dtrain.trainer.cli_propose import local_tokenizer

        tokenizer = open_tokenizer(trained.manifest.data, local_tokenizer(args))
        write_hf(trained, tokenizer, args.out, merge=args.merge)
    else:
        write_safetensors(trained, args.out)
    write_card(trained, args.out, args.format)
    checkpoint = trained.checkpoint
    print(
        f"{args.out} has {trained.manifest.run_id} after {checkpoint.round} rounds and {checkpoint.tokens:,} tokens: "
        f"{', '.join(sorted(path.name for path in args.out.iterdir()))}"
    )
    if args.push:
        _push(args.out, args.push)
    return 0


def _push(folder: Path, repo: str) -> None:
    from dtrain.trainer.tokenizer import NEEDS_HF

    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UsageError(f"--push needs huggingface_hub: {NEEDS_HF}") from None
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except Exception as error:  # no network, not logged in, no such user
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"cannot upload {folder} to {repo}: {text}; log in with hf auth login") from None
    print(f"Uploaded to {repo}.")
