"""The flags of the commands that run a worker."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dtrain.trainer.errors import UsageError
from dtrain.trainer.limits import FLAGS, Limits
from dtrain.trainer.wandb_log import add_flag


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """What is this computer's own business."""
    machine = parser.add_argument_group("this machine")
    machine.add_argument("--name", help="shown to the others (default: worker-1, worker-2, ...)")
    machine.add_argument("--folder", type=Path, help="where checkpoints go (default: ./dtrain-runs/RUN/NAME)")
    machine.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, mps; cuda:0,cuda:1 = both as one worker"
    )
    machine.add_argument("--precision", default="auto", help="of matrix products: auto, fp32, bf16 or fp16")
    machine.add_argument(
        "--micro-batch", type=int, default=0, help="sequences per pass; 0 = as memory allows"
    )
    machine.add_argument(
        "--recompute", action="store_true", help="compute activations twice: less memory, slower"
    )
    machine.add_argument("--compile", default="auto", help="torch.compile: auto (on CUDA), yes or no")
    machine.add_argument(
        "--threads", type=int, default=0, help="CPU threads for training; 0 = all cores but one"
    )
    machine.add_argument(
        "--data",
        type=Path,
        help="file or folder to train on: text, JSONL, Parquet, Arrow (default: Python's own library sources)",
    )
    add_local_flags(machine)
    machine.add_argument(
        "--trust-code",
        default="",
        metavar="MODULE:FUNCTION",
        help="call this code if the run's model needs it",
    )
    machine.add_argument(
        "--rounds", type=int, default=0, help="leave after the run's round N; 0 = go on until Ctrl-C"
    )
    machine.add_argument(
        "--max-tokens-per-s", type=float, default=0.0, help="train no faster than this; 0 = no limit"
    )
    machine.add_argument(
        "--newcomer-mbps",
        type=float,
        default=0.0,
        help="Mbit/s at most for giving newcomers the weights; 0 = half of what the line can do",
    )
    machine.add_argument("--audit", action="store_true", help="check every round that no delta is lost")
    machine.add_argument(
        "--journal", action="store_true", help="keep a signed journal of what became of every payload"
    )
    add_flag(machine, "what this worker does")
    machine.add_argument("--eval-every", type=int, default=5, help="rounds between evaluations; 0 = never")
    machine.add_argument("--checkpoint-every", type=int, default=5, help="rounds a checkpoint; 0 = never")
    machine.add_argument(
        "--checkpoint-to",
        default="",
        metavar="URL",
        help="copy checkpoints there too: s3://, gs://, a folder",
    )
    machine.add_argument("--keep-checkpoints", type=int, default=3, help="checkpoints that stay on disk")
    machine.add_argument("--host", default="0.0.0.0", help="IPv4 address to listen on")
    machine.add_argument(
        "--no-lan", action="store_true", help="neither look for the run on this network nor be found there"
    )
    machine.add_argument(
        "--announce",
        default="",
        metavar="HOST:PORT",
        help="where others dial this machine, with a loopback --host",
    )
    machine.add_argument("--port", type=int, default=0, help="TCP port to listen on; 0 = any free one")
    machine.add_argument(
        "--no-relay", action="store_true", help="never pass on for others, nor be reached through others"
    )


def add_limit_flags(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """The user's limits, as `dtrain limit` has them."""
    group = parser.add_argument_group('limits ("none" lifts one); kept for the next start')
    for flag, (name, _, metavar, text) in FLAGS.items():
        if flag not in leave_out:
            given: dict[str, Any] = (
                {"nargs": "?", "const": "yes"} if isinstance(getattr(Limits(), name), bool) else {}
            )
            group.add_argument(flag, dest=f"limit_{name}", metavar=metavar, help=text, **given)


def typed_limits(args: argparse.Namespace) -> dict[str, object]:
    """{field of Limits: value} of the limit flags that were typed. UsageError names the flag."""
    changes: dict[str, object] = {}
    for flag, (name, parse, _, _) in FLAGS.items():
        text = getattr(args, f"limit_{name}", None)
        if text is not None:
            try:
                changes[name] = parse(text)
            except UsageError as error:
                raise UsageError(f"{flag} {error}") from None
    return changes


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What all workers of a run share."""
    shared = parser.add_argument_group("the run (for the first worker; later ones take what the run has)")
    shared.add_argument("--config", type=Path, metavar="RUN.TOML", help="the run's settings")
    shared.add_argument("--preset", help="model size: tiny, small, gpt2 or medium")
    add_dataset_flags(shared)
    shared.add_argument("--method", help="what is trained: full, lora or qlora")
    shared.add_argument("--lora-rank", type=int, help="rank of the adapters")
    shared.add_argument("--lora-targets", help="layers that get adapters: all-linear, or names with commas")
    shared.add_argument("--strategy", help="what travels: sparseloco, diloco, demo or ddp")
    shared.add_argument("--optimizer", help="of the inner steps: adamw, adamw8bit or muon")
    shared.add_argument("--inner-steps", type=int, help="inner steps per round")
    shared.add_argument("--batch-size", type=int, help="sequences per inner step")
    shared.add_argument("--lr", type=float, help="learning rate of the inner steps")
    shared.add_argument("--seed", type=int, help="seed of the first weights and of the data")
    shared.add_argument("--start-workers", type=int, help="workers that must be there before round 1 begins")
    shared.add_argument("--overlap", help="eager: exchange while training goes on; none: take turns")
    shared.add_argument(
        "--round-tokens", type=int, help="a round ends when all have trained so many; 0 = fixed steps"
    )
    shared.add_argument(
        "--admission", help="who may take part: open (everybody) or token (whom the organizer invites)"
    )
    shared.add_argument("--matchmaking-s", type=float, help="longest wait for missing workers, in seconds")


def add_local_flags(parser: argparse._ActionsContainer) -> None:
    """What a run names, and each worker may have a copy of."""
    parser.add_argument("--tokenizer", help="its name on the hub, or a file; bytes if left out")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a trained model, by its name on the hub or its folder; or a config.json, to begin from scratch; "
        "or package.module:function (default: the built-in GPT)",
    )


def add_trained_flags(parser: argparse.ArgumentParser) -> None:
    """Which run, and what of it this machine has."""
    parser.add_argument(
        "--run-id", metavar="NAME", help="the run, of which ./dtrain-runs has a worker's folder"
    )
    parser.add_argument("--folder", type=Path, help="the worker's folder, if it is elsewhere")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--model", help="your copy of the model that the run began with, if it did")
    parser.add_argument("--tokenizer", help="your copy of the run's tokenizer, if it is a file")
    parser.add_argument(
        "--trust-code",
        default="",
        metavar="MODULE:FUNCTION",
        help="call this code if the run's model needs it",
    )


def add_dataset_flags(parser: argparse._ArgumentGroup) -> None:
    """What published data is trained on."""
    parser.add_argument("--dataset", metavar="NAME", help="data set on the hub, or a URL, to stream from")
    parser.add_argument("--subset", help="the data set's configuration, such as sample-10BT")
    parser.add_argument("--split", help="the data set's split (default: train)")
    parser.add_argument("--column", help="the column that holds the text (default: text)")


def add_no_run_flags(parser: argparse.ArgumentParser) -> None:
    """For a command that takes the run as it is: what `add_run_flags` declares, left open."""
    shared = argparse.ArgumentParser(add_help=False)
    add_run_flags(shared)
    nothing: dict[str, Any] = {action.dest: None for action in shared._actions}
    parser.set_defaults(**nothing, run_id=None, peer=[])
