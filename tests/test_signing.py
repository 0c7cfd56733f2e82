"""Signed manifests: only what the organizer signed passes, and the key is nobody else's to read."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.signing import OrganizerKey, SignedManifest


@pytest.fixture
def key(tmp_path: Path) -> OrganizerKey:
    return OrganizerKey.load_or_create(tmp_path / "organizer.pem")


def test_a_signed_manifest_survives_the_round_trip(key: OrganizerKey) -> None:
    """Newcomers get the manifest with its organizer, verified."""
    signed = key.sign(preset_manifest("demo"))
    again = SignedManifest.from_json(signed.to_json())
    assert again == signed
    assert again.manifest.organizer == key.public_hex
    assert again.manifest.hash != preset_manifest("demo").hash  # the organizer is part of the identity


def test_every_change_breaks_the_signature(key: OrganizerKey, tmp_path: Path) -> None:
    """Neither a setting, nor the organizer, nor the signature can be changed on the way."""
    signed = key.sign(preset_manifest("demo"))
    other = OrganizerKey.load_or_create(tmp_path / "other.pem")
    tree = json.loads(signed.to_json())
    tree["manifest"]["train"]["lr"] = 1.0
    flipped = bytes([signed.signature[0] ^ 1]) + signed.signature[1:]
    with pytest.raises(UsageError, match="not signed by the organizer"):
        SignedManifest.from_json(json.dumps(tree))
    with pytest.raises(UsageError, match="not signed by the organizer"):
        SignedManifest(replace(signed.manifest, organizer=other.public_hex), signed.signature)
    with pytest.raises(UsageError, match="not signed by the organizer"):
        SignedManifest(signed.manifest, flipped)
    with pytest.raises(UsageError, match="not signed by the organizer"):
        SignedManifest(preset_manifest("demo"), signed.signature)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", "null", '{"manifest": 3, "signature": "00"}', '{"signature": "zz"}', "[" * 100_000],
)
def test_garbage_is_refused_in_one_line(text: str) -> None:
    """Whatever arrives in place of a manifest, the user reads one line."""
    with pytest.raises(UsageError) as caught:
        SignedManifest.from_json(text)
    assert "\n" not in str(caught.value)


def test_the_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    """Mode 0600 whatever the umask, and the same key the next time."""
    path = tmp_path / "deep" / "organizer.pem"
    before = os.umask(0)
    try:
        key = OrganizerKey.load_or_create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (
        OrganizerKey.load_or_create(path).public_hex == OrganizerKey.load(path).public_hex == key.public_hex
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["organizer.pem"]


def test_workers_that_begin_at_once_share_one_key(tmp_path: Path) -> None:
    """Of several first starts one makes the key; nobody reads half of it."""
    path = tmp_path / "organizer.pem"
    with ThreadPoolExecutor(1) as pool, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as others:
        futures = [pool.submit(public_key, path), *(others.submit(public_key, path) for _ in range(4))]
        assert len({future.result(timeout=60) for future in futures}) == 1


def public_key(path: Path) -> str:
    return OrganizerKey.load_or_create(path).public_hex


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, key: OrganizerKey) -> None:
    """The line holds the command that mends it."""
    path = tmp_path / "organizer.pem"
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"type chmod 600 .*organizer\.pem"):
        OrganizerKey.load(path)


def test_bad_key_files_are_named(tmp_path: Path) -> None:
    """Missing and malformed keys have their own lines."""
    with pytest.raises(UsageError, match="No such file"):
        OrganizerKey.load(tmp_path / "none.pem")
    bad = tmp_path / "bad.pem"
    bad.write_text("no key")
    bad.chmod(0o600)
    with pytest.raises(UsageError, match="holds no Ed25519 key"):
        OrganizerKey.load_or_create(bad)
