"""Checkpoints go to a URL too: whole or not at all, the newest few, and another machine goes on from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_worker import quick_manifest, swarm_of

from dtrain.trainer.checkpoint import read_file
from dtrain.trainer.errors import UsageError
from dtrain.trainer.mirror import Mirror

fsspec = pytest.importorskip("fsspec")


def test_a_lost_machine_goes_on_from_the_url(tmp_path: Path) -> None:
    """Theta at the URL is theta on the disk, only the newest are kept, and an empty folder begins with it."""
    url = f"file://{tmp_path}/far"
    with swarm_of(quick_manifest(), tmp_path) as threads:
        first = threads.start("a", max_rounds=4, checkpoint_every=1, keep_checkpoints=2, checkpoint_to=url)
        threads.join()
        names = sorted(path.name for path in (tmp_path / "far").iterdir())
        assert names[-1] == "round-00000004.safetensors" and len(names) <= 2
        there = read_file(tmp_path / "far" / names[-1])
        assert torch.equal(there.tensors["theta"], first.outer.state.theta_flat)
        threads.start("b", max_rounds=5, checkpoint_every=1, checkpoint_to=url)
        threads.join()
        joined = threads.events("b", "joined")[0]
        assert (joined["source"], joined["round"]) == ("checkpoint", 4)


def test_what_reads_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that spoils what it is given costs a line, and the older copy stays."""
    said: list[str] = []
    mirror = Mirror(str(tmp_path / "far"), 3, said.append)
    good, bad = tmp_path / "round-00000001.safetensors", tmp_path / "round-00000002.safetensors"
    good.write_bytes(b"good")
    bad.write_bytes(b"bad")
    mirror._put(good)
    system = type(mirror._system)
    monkeypatch.setattr(
        system, "put_file", lambda self, source, target, **_: Path(target).write_bytes(b"spoilt")
    )
    mirror.put(bad)
    mirror.close()
    assert said == [
        f"The checkpoint {bad.name} is not at {tmp_path}/far: what was written there reads back as something else. "
        "The next one may be."
    ]
    assert [path.name for path in (tmp_path / "far").iterdir()] == [good.name]


def test_a_url_that_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    """Unknown protocols and places that refuse have their line before anything begins."""
    with pytest.raises(UsageError, match=r"cannot write checkpoints to nosuch://x \(--checkpoint-to\)"):
        Mirror("nosuch://x", 3, print)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write checkpoints to"):
        Mirror(str(tmp_path / "file"), 3, print)


def test_a_login_in_the_url_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the error's line nor in what a worker says of its copies; the library gets it whole."""
    asked: list[str] = []

    def refuse(url: str) -> None:
        asked.append(url)
        raise OSError(f"403 Forbidden: {url}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(UsageError, match=r"s3://\*\*\*@bucket/run") as error:
        Mirror("s3://ada:secret@bucket/run/", 3, print)
    assert "secret" not in str(error.value) and asked == ["s3://ada:secret@bucket/run"]
