"""The folder in which a worker of this machine keeps its checkpoints, metrics and identity."""

from __future__ import annotations

import argparse
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.trainer.cli_run import run_folder
from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import clean_line

MAX_WORKERS_IN_A_FOLDER = 64
MAX_NAME = 40


@contextmanager
def worker_folder(args: argparse.Namespace, run_id: str) -> Iterator[tuple[str, Path]]:
    """This worker's (name, folder), locked: a second worker in the same place takes the next free name. UsageError for
    a name that cannot be shown, or is no folder's."""
    if args.name is not None and not _is_name(args.name):
        raise UsageError(
            f"--name {clean_line(args.name, MAX_NAME)!r} will not do: type at most {MAX_NAME} visible characters, no /"
        )
    if args.folder is not None:
        choices = [(args.name or args.folder.name, args.folder)]
    elif args.name is not None:
        choices = [(args.name, run_folder(run_id) / args.name)]
    else:
        names = [f"worker-{n}" for n in range(1, MAX_WORKERS_IN_A_FOLDER + 1)]
        choices = [(name, run_folder(run_id) / name) for name in names]
    for name, folder in choices:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / "lock").open("w")
        except OSError as error:
            raise UsageError(
                f"cannot write to {folder}: {error.strerror}; type --folder with a folder you own"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield name, folder
            return
    raise UsageError(f"another worker is using {choices[0][1]}: type another --folder or --name")


def _is_name(text: str) -> bool:
    """Whether a text can be shown to others as it is, and be a folder's name."""
    fits = text == clean_line(text, MAX_NAME) and "/" not in text
    return bool(text) and fits and not text.startswith(".")
