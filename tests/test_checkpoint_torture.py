"""Checkpoints under violence: killed while writing, and on a disk that is full."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_worker import quick_manifest, swarm_of

from dtrain.trainer.bulletin import unpack_bulletin
from dtrain.trainer.checkpoint import Checkpoint, CheckpointStore
from dtrain.trainer.errors import RunError
from dtrain.trainer.outer import OuterState


def at_round(round: int, numel: int = 20_000) -> Checkpoint:
    theta = torch.arange(numel, dtype=torch.float32) + round
    return Checkpoint(round, round * 100, OuterState(theta).digest(), b"m" * 32, {"theta": theta}, {})


def is_torn(folder: Path) -> bool:
    """Whether a file stands there half written."""
    return any(path.suffix == ".tmp" for path in folder.iterdir())


def stop_within_a_write(child: int, folder: Path) -> None:
    """Hold the child still at an instant at which a file of it is half written."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if is_torn(folder):
            return
        os.kill(child, signal.SIGCONT)
        time.sleep(0.0005)
    raise AssertionError("the child writes no file")


def kill_while_saving(folder: Path, begin: int, draw: random.Random, within_a_write: bool) -> int:
    """Save checkpoints in a child, and kill it at a random instant of an early one, or of the writing of one; the
    last round that it was told is safe."""
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
    if within_a_write:
        stop_within_a_write(child, folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(readable, "rb") as pipe:
        told += pipe.read()
    return int.from_bytes(told[-4:], "big")


def torture(folder: Path, kills: int, seed: int) -> None:
    draw, safe, torn = random.Random(seed), 0, 0
    for kill in range(kills):
        safe = kill_while_saving(folder, safe, draw, within_a_write=kill % 2 == 0)
        torn += is_torn(folder)
        newest = CheckpointStore(folder).newest()
        assert newest is not None
        assert newest.round in (safe, safe + 1)  # the one after it may be whole, too
        assert torch.equal(newest.tensors["theta"], at_round(newest.round).tensors["theta"])
        safe = newest.round
    assert torn >= kills // 2


def test_a_kill_at_any_instant_loses_nothing_that_was_safe(tmp_path: Path) -> None:
    """What `save` has returned for is there after SIGKILL, whole; 20 instants, 200 in `make checkpoint-torture`."""
    torture(tmp_path, 20, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_kills_lose_nothing_that_was_safe(tmp_path: Path) -> None:
    """As above, more often."""
    torture(tmp_path, 200, seed=2)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 1 MiB, or as many as the test asks for."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={getattr(request, 'param', 1)}m"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)]
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


def fill(disk: Path) -> Path:
    """Leave not a byte on it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return filler


@pytest.mark.parametrize("small_disk", [16], indirect=True)
def test_on_a_full_disk_the_training_goes_on_with_an_alarm(small_disk: Path) -> None:
    """A worker whose disk is full trains on in every round; its user reads why, those who watch the run see that it is
    so, and the checkpoint from before still loads. When there is room again the next one is there.
    """
    manifest, lines, notes = quick_manifest(), list[str](), list[bytes]()
    with swarm_of(manifest, small_disk) as threads:
        filled, freed = threading.Event(), threading.Event()
        worker = threads.prepare("a", max_rounds=12, checkpoint_every=1, keep_checkpoints=1)
        exchange, store = worker.exchange, CheckpointStore(small_disk / "a" / "checkpoints", keep=1)
        run_round, post = exchange.run_round, exchange.post

        def run_and_fill(**contribution: Any) -> Any:
            if contribution["round"] == 3:
                fill(small_disk)
                filled.set()
            if contribution["round"] == 9:
                newest = store.newest()
                assert newest is not None and newest.round == 3
                (small_disk / "filler").unlink()
                freed.set()
            return run_round(**contribution)

        def keep(topic: str, note: bytes) -> None:
            notes.append(note)
            post(topic, note)

        exchange.run_round, exchange.post = run_and_fill, keep  # type: ignore[method-assign]
        worker.report.say = lines.append
        threads.begin("a")
        threads.join()
        assert filled.is_set() and freed.is_set()
        newest = store.newest()
        assert newest is not None and newest.round == 12
        alarms = [line for line in lines if "No space left" in line]
        assert len(alarms) == 6 and all("training goes on" in line for line in alarms)
        told = [event for note in notes if (view := unpack_bulletin(note)) for event in view.events]
        assert {event.text for event in told} == {
            "training goes on without a new checkpoint, the one before is intact"
        }
        assert [event["round"] for event in threads.events("a", "round")][-3:] == [10, 11, 12]
