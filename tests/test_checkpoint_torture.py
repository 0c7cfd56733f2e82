"""Checkpoints under violence: killed while writing, and on a disk that is full."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtrain.trainer.checkpoint import Checkpoint, CheckpointStore
from dtrain.trainer.errors import RunError
from dtrain.trainer.outer import OuterState


def at_round(round: int, numel: int = 20_000) -> Checkpoint:
    theta = torch.arange(numel, dtype=torch.float32) + round
    return Checkpoint(round, round * 100, OuterState(theta).digest(), b"m" * 32, {"theta": theta}, {})


def kill_while_saving(folder: Path, begin: int, draw: random.Random) -> int:
    """Save checkpoints in a child, and kill it at a random instant of an early one; the last round that it was
    told is safe."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child needs none of our threads
        child = os.fork()
    if child == 0:  # nothing of pytest may go on here, whatever happens
        try:
            store, round = CheckpointStore(folder), begin
            while True:
                round += 1
                store.save(at_round(round))
                os.write(writable, round.to_bytes(4, "big"))
        finally:
            os._exit(1)
    os.close(writable)
    began, told = time.monotonic(), b""
    whole = draw.randrange(1, 3)
    for _ in range(whole):
        assert select.select([readable], [], [], 60.0)[0], "the child does not save"
        told = os.read(readable, 4)
        assert told, "the child ended by itself"
    time.sleep(draw.uniform(0.0, 1.2) * (time.monotonic() - began) / whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(readable, "rb") as pipe:
        told += pipe.read()
    return int.from_bytes(told[-4:], "big")


def torture(folder: Path, kills: int, seed: int) -> None:
    draw, safe, torn = random.Random(seed), 0, 0
    for _ in range(kills):
        safe = kill_while_saving(folder, safe, draw)
        torn += any(path.suffix == ".tmp" for path in folder.iterdir())
        newest = CheckpointStore(folder).newest()
        assert newest is not None
        assert newest.round in (safe, safe + 1)  # the one after it may be whole, too
        assert torch.equal(newest.tensors["theta"], at_round(newest.round).tensors["theta"])
        safe = newest.round
    assert torn > kills // 10  # many were killed with a file half written


def test_a_kill_at_any_instant_loses_nothing_that_was_safe(tmp_path: Path) -> None:
    """What `save` has returned for is there after SIGKILL, whole; 20 instants, 200 in `make checkpoint-torture`."""
    torture(tmp_path, 20, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_kills_lose_nothing_that_was_safe(tmp_path: Path) -> None:
    """As above, more often."""
    torture(tmp_path, 200, seed=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs: Linux, as root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(small_disk: Path) -> None:
    """Saving says that the disk is full; the one before it still loads, nothing half-written is left, and when there
    is room again it goes on.
    """
    store = CheckpointStore(small_disk, keep=3)
    store.save(at_round(1, 100_000))
    store.save(at_round(2, 100_000))
    for _ in range(2):
        with pytest.raises(RunError, match="cannot write the checkpoint"):
            store.save(at_round(3, 100_000))
        newest = store.newest()
        assert newest is not None and newest.round == 2
        assert sorted(path.suffix for path in small_disk.iterdir()) == [".safetensors"] * 2
    (small_disk / "round-00000001.safetensors").unlink()
    store.save(at_round(3, 100_000))
    newest = store.newest()
    assert newest is not None and newest.round == 3
