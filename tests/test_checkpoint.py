"""Checkpoints: what was saved is loaded, bit for bit, and no damage or crash hides an older one."""

from __future__ import annotations

import errno
import logging
import os
import random
from pathlib import Path

import pytest
import torch

from dtrain.trainer import checkpoint as module
from dtrain.trainer.checkpoint import Checkpoint, CheckpointStore, read_file
from dtrain.trainer.errors import CheckpointError, RunError, UsageError
from dtrain.trainer.outer import OuterState

MANIFEST = b"m" * 32


def at_round(round: int) -> Checkpoint:
    """A small checkpoint whose tensors depend on the round."""
    theta = torch.rand(500, generator=torch.Generator().manual_seed(round))
    tensors = {
        "theta": theta,
        "feedback.feedback": theta * 2,
        "inner.0.step": torch.tensor(float(round)),
        "empty": torch.zeros(0),
    }
    digest = OuterState(theta).digest()
    return Checkpoint(round, round * 100, digest, MANIFEST, tensors, {"own_tokens": 7, "name": "ä"})


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    return (
        a is not None
        and (a.round, a.tokens, a.digest, a.manifest_hash, a.extra)
        == (b.round, b.tokens, b.digest, b.manifest_hash, b.extra)
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """All of a checkpoint survives the file."""
    store = CheckpointStore(tmp_path / "new" / "folder")
    assert store.newest() is None
    store.save(at_round(3))
    assert same(store.newest(), at_round(3))
    assert same(CheckpointStore(tmp_path / "new" / "folder").newest(MANIFEST), at_round(3))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """`keep` bounds the disk's use."""
    store = CheckpointStore(tmp_path, keep=2)
    for round in (1, 5, 9, 12):
        store.save(at_round(round))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "round-00000009.safetensors",
        "round-00000012.safetensors",
    ]
    assert same(store.newest(), at_round(12))


def test_any_flipped_bit_and_any_cut_is_noticed_and_the_one_before_it_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever a file is damaged, the store falls back to the newest that is whole, with one line."""
    store = CheckpointStore(tmp_path)
    store.save(at_round(1))
    path = store.save(at_round(2))
    whole = path.read_bytes()
    draw = random.Random(0)
    damaged = [whole[:size] for size in [0, 4, 8, 100, len(whole) - 1, *draw.sample(range(len(whole)), 20)]]
    for place in [*range(12), *draw.sample(range(len(whole)), 150)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert same(store.newest(), at_round(1))
        (record,) = caplog.records
        assert "round-00000002.safetensors is damaged" in record.getMessage()
        assert "\n" not in record.getMessage()
        with pytest.raises(CheckpointError, match="damaged"):
            read_file(path)
    path.write_bytes(whole)
    assert same(store.newest(), at_round(2))


def test_when_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    """A worker then begins from its peers' state, not from garbage."""
    store = CheckpointStore(tmp_path)
    for round in (1, 2):
        store.save(at_round(round)).write_bytes(b"x" * 50)
    assert store.newest() is None


def test_a_checkpoint_whose_digest_is_not_of_its_theta_is_refused(tmp_path: Path) -> None:
    """The digest is part of what is checked: no wrong theta goes by a right name."""
    wrong = at_round(1)
    wrong.digest = at_round(2).digest
    with pytest.raises(CheckpointError, match="theta does not match its digest"):
        read_file(CheckpointStore(tmp_path).save(wrong))


@pytest.mark.parametrize("step", ["save_file", "flush", "os.replace"])
def test_a_save_that_fails_at_any_step_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A full disk is a RunError that names the cause; the one before it is still the newest, and nothing is
    left.
    """
    store = CheckpointStore(tmp_path)
    store.save(at_round(1))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(f"{module.__name__}.{step}", fail)
        with pytest.raises(RunError, match="No space left"):
            store.save(at_round(2))
    assert same(store.newest(), at_round(1))
    assert [path.name for path in tmp_path.iterdir()] == ["round-00000001.safetensors"]


def test_an_interrupted_write_leaves_no_trace(tmp_path: Path) -> None:
    """What a killed worker was writing has another name, and is swept when the folder is opened again."""
    whole = CheckpointStore(tmp_path).save(at_round(1)).read_bytes()
    (tmp_path / "round-00000002.tmp").write_bytes(whole[:300])
    store = CheckpointStore(tmp_path)
    assert same(store.newest(), at_round(1))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_later_round_that_was_left_behind_does_not_come_back(tmp_path: Path) -> None:
    """After a return to an earlier round the file just saved is the newest; the later one is put aside, not
    lost.
    """
    store = CheckpointStore(tmp_path, keep=2)
    store.save(at_round(9))
    store.save(at_round(4))
    assert same(store.newest(), at_round(4))
    assert same(read_file(tmp_path / "round-00000009.set-aside"), at_round(9))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """Never train one run from another's weights."""
    store = CheckpointStore(tmp_path)
    store.save(at_round(1))
    with pytest.raises(UsageError, match=r"another run .*type --folder"):
        store.newest(b"o" * 32)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The line says which folder, and which flag gives another."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"cannot write checkpoints to .*file.*; type --folder"):
        CheckpointStore(tmp_path / "file")
    with pytest.raises(UsageError, match="--folder"):
        CheckpointStore(tmp_path / "file" / "below")
