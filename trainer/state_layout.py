"""How long the pieces of a run's state are, found without its memory. As a program (`python -m`), for a process that
shall not import torch: its id as the argument, a signed manifest on stdin, a JSON list of bytes on stdout.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import TYPE_CHECKING

from dtrain.trainer.errors import DtrainError, UsageError

if TYPE_CHECKING:
    from dtrain.compression.layout import Shapes
    from dtrain.trainer.manifest import Manifest

LOOK_S = 0.2
NOTE = "pieces.json"


def state_pieces(manifest: Manifest) -> list[int]:
    """What `OuterLoop.pieces` gives, in bytes. UsageError if this machine cannot know it."""
    import torch

    from dtrain.trainer.outer import in_order, piece_lengths
    from dtrain.trainer.strategies import make_strategy

    with torch.device("meta"):
        shapes = _trained_shapes(manifest)
        theta = torch.empty(sum(math.prod(shape) for _, shape in shapes), dtype=torch.float32)
        strategy = make_strategy(manifest, shapes)
    return [length for tensor in in_order(theta, strategy.shared_state()) for length in piece_lengths(tensor)]


def _trained_shapes(manifest: Manifest) -> Shapes:
    from dtrain.trainer.model import GPT
    from dtrain.trainer.models_hf import trained_shapes

    kind = manifest.model.kind
    if kind == "gpt":
        return [(name, tuple(p.shape)) for name, p in GPT(manifest.model).named_parameters()]
    if kind == "transformers":
        return trained_shapes(manifest.model.config, manifest.train)
    raise UsageError(f"this run's model is made by code that is not called here ({manifest.model.name})")


def ask_state_pieces(signed_manifest: str, stop: threading.Event) -> list[int]:
    """The same, found by a process of its own that is gone afterwards, and once `stop` is set. UsageError: why not."""
    command = [sys.executable, "-m", "dtrain.trainer.state_layout", str(os.getpid())]
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as child:
        given: str | None = signed_manifest
        while True:
            try:
                found, said = child.communicate(given, timeout=LOOK_S)
                break
            except TimeoutExpired:
                given = None  # it has been handed over
                if stop.is_set():
                    child.kill()
    try:
        return [int(length) for length in json.loads(found)]
    except ValueError:
        reasons = said.strip().splitlines() or ["the model cannot be built here"]
        raise UsageError(reasons[-1]) from None


def recall_pieces(folder: Path, manifest: Manifest) -> list[int] | None:
    """What `keep_pieces` kept there of this manifest, by this version of dtrain; None if nothing."""
    try:
        kept = json.loads((folder / NOTE).read_text())
        return [int(length) for length in kept["pieces"]] if kept["of"] == _name_of(manifest) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_pieces(folder: Path, manifest: Manifest, pieces: list[int]) -> None:
    """Spare the next start the seconds, on a small machine the minute, in which newcomers would find nothing there."""
    with suppress(OSError):  # a full disk costs that time and nothing else
        (folder / NOTE).write_text(json.dumps({"of": _name_of(manifest), "pieces": pieces}) + "\n")


def _name_of(manifest: Manifest) -> str:
    return f"{manifest.hash.hex()} {version('dtrain')}"


def _end_with(asker: int) -> None:
    """Building a model in vain takes seconds of a machine whose owner has just ended the process that asked."""
    while os.getppid() == asker:
        time.sleep(LOOK_S)
    os._exit(1)


def main() -> int:
    threading.Thread(target=_end_with, args=[int(sys.argv[1])], daemon=True).start()
    from dtrain.trainer.signing import SignedManifest

    try:
        print(json.dumps(state_pieces(SignedManifest.from_json(sys.stdin.read()).manifest)))
    except DtrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
