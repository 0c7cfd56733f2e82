"""Invites and names that will not do: each refused with one line that says what to do instead. Those that need members
to refuse them (a token used once too often, a revoked one) are in test_admission.py and test_door.py."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dtrain.dht.identity import bytes_of, load_or_create
from dtrain.dht.invite import Invite
from dtrain.dht.tokens import REASONS, Token, decode_pass, issue
from dtrain.trainer import cli_run
from dtrain.trainer.cli_admission import show_pass
from dtrain.trainer.cli_folder import worker_folder
from dtrain.trainer.cli_run import decode_invite, find_manifest
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.signing import OrganizerKey, SignedManifest

ADDRESS = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWAFrq41GtRiDSGeKvjd3UycrWzVWjDf5p6PBXbiPpzMeK"


class Peers:
    """What is published under a run id."""

    def __init__(self, *published: bytes):
        self.published = published

    def find_manifests(self, run_id: str) -> list[bytes]:
        return list(self.published)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_run, "FIND_MANIFEST_S", 0.1)


def signed(folder: Path, run_id: str = "ours", **settings: Any) -> tuple[OrganizerKey, SignedManifest]:
    """A run of an organizer of its own."""
    key = OrganizerKey.load_or_create(folder / f"{len(list(folder.iterdir()))}.key")
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return key, key.sign(preset_manifest(run_id, "tiny", dotted))


def invite_to(run: SignedManifest, token: Token | None = None) -> Invite:
    manifest = run.manifest
    return Invite(manifest.run_id, manifest.hash, bytes.fromhex(manifest.organizer), (ADDRESS,), token)


def blob(run: SignedManifest) -> bytes:
    return run.to_json().encode()


def line_of(refused: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_another_manifest_under_the_same_run_id(tmp_path: Path) -> None:
    """By name alone nobody can say which run is meant; an invite can, whatever others publish there."""
    (_, ours), (_, theirs) = signed(tmp_path), signed(tmp_path, train__inner_steps=7)
    forged = blob(ours).replace(b'"inner_steps":', b'"inner_stepz":')
    for published in ((blob(ours), blob(theirs)), (blob(theirs), b"garbage", forged, blob(ours))):
        peers: Any = Peers(*published)
        with pytest.raises(UsageError) as refused:
            find_manifest(peers, "ours", None)
        assert "several runs call themselves ours" in line_of(refused) and "--invite" in line_of(refused)
        assert find_manifest(peers, "ours", invite_to(ours)).manifest == ours.manifest
    assert find_manifest(Peers(b"", forged, blob(ours)), "ours", None).manifest == ours.manifest  # type: ignore[arg-type]


def test_a_foreign_invite(tmp_path: Path) -> None:
    """The peers know another run of that name, or none: the line says that the invite is not theirs."""
    (_, ours), (_, theirs) = signed(tmp_path), signed(tmp_path)
    for peers in (Peers(blob(theirs)), Peers()):
        with pytest.raises(UsageError) as refused:
            find_manifest(peers, "ours", invite_to(ours))  # type: ignore[arg-type]
        assert "no run ours with that invite" in line_of(refused)


def test_a_manifest_of_another_name(tmp_path: Path) -> None:
    """Somebody publishes a run of their own under our run's name: nobody is led there."""
    _, other = signed(tmp_path, "other")
    with pytest.raises(UsageError) as refused:
        find_manifest(Peers(blob(other)), "ours", None)  # type: ignore[arg-type]
    assert "no run ours" in line_of(refused)


def guarded(folder: Path, expires: int) -> tuple[SignedManifest, Invite]:
    """A run that admits by token, and an invite to it, read from its text as a newcomer does."""
    key, run = signed(folder, admission__mode="token")
    token = issue(key.sign_bytes, run.manifest.hash, expires=expires, uses=1)
    return run, decode_invite(invite_to(run, token).encode())


def test_an_expired_invite(tmp_path: Path) -> None:
    """The line says when it expired and whom to ask."""
    run, invite = guarded(tmp_path, int(time.time()) - 60)
    peer = load_or_create(tmp_path / "identity.key")
    with pytest.raises(UsageError) as refused:
        show_pass(run.manifest, invite, peer.peer_id, tmp_path)
    assert "expired on 20" in line_of(refused) and "organizer" in line_of(refused)


def test_who_is_in_stays_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that begins with its invite at each login goes on when the invite has expired; another invite counts
    anew, and so does this one where the pass on the disk is damaged."""
    run, invite = guarded(tmp_path, int(time.time()) + 3600)
    peer = load_or_create(tmp_path / "identity.key")
    shown = show_pass(run.manifest, invite, peer.peer_id, tmp_path)
    decode_pass(shown).check(run.manifest.hash, bytes.fromhex(run.manifest.organizer), bytes_of(peer.peer_id))
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    assert show_pass(run.manifest, invite, peer.peer_id, tmp_path) == shown
    assert show_pass(run.manifest, None, peer.peer_id, tmp_path) == shown
    (tmp_path / "pass").write_bytes(shown[:-1])
    with pytest.raises(UsageError, match="expired on"):
        show_pass(run.manifest, invite, peer.peer_id, tmp_path)


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_what_members_refuse_is_one_line(reason: str) -> None:
    """Whatever they say, the user reads a line of ours."""
    assert REASONS[reason].isprintable() and len(REASONS[reason]) < 120


@pytest.mark.parametrize(
    "name", ["a\x1b[31m", "a\nb", "a\x00", "", " a", "x" * 41, "../up", ".hidden", "a\u202eb"]
)
def test_a_name_that_will_not_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters, what turns the writing direction, other folders: nothing is made, and nothing of it shown."""
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UsageError) as refused,
        worker_folder(Namespace(name=name, folder=None), "ours"),
    ):
        pass
    assert "--name" in line_of(refused) and line_of(refused).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["worker-1", "Zoë's laptop", "東京"])
def test_a_name_that_will(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with worker_folder(Namespace(name=name, folder=None), "ours") as (given, folder):
        assert given == name and folder.is_dir()
