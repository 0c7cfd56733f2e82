"""Laws of identities: a key is made once, stays private, and the peer id alone tells whose signature it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import base58
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.dht.identity import Identity, IdentityError, load_or_create, public_key_of, verify


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    folder = tmp_path_factory.mktemp("identities")
    return load_or_create(folder / "a.key"), load_or_create(folder / "b.key")


def test_an_identity_is_private_and_stays_the_same(tmp_path: Path) -> None:
    """The file has mode 0600 whatever the umask, folders are made on the way, and a second load gives the same key."""
    path = tmp_path / "new" / "folder" / "identity.key"
    before = os.umask(0)
    try:
        made = load_or_create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    blob = path.read_bytes()
    again = load_or_create(path)
    assert (again.peer_id, path.read_bytes()) == (made.peer_id, blob)


def test_an_identity_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that appears between the look and the write, as when two workers start at once, is left as it is."""
    path = tmp_path / "identity.key"
    path.write_bytes(b"somebody else's")

    def unseen(_: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", unseen)
    with pytest.raises(IdentityError, match="cannot write the identity file"):
        load_or_create(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"somebody else's"


def test_the_daemon_has_the_same_key_format(pair: tuple[Identity, Identity]) -> None:
    """The file is libp2p's: 4 bytes of framing, the seed, the public key; the peer id is the key, inlined."""
    blob = pair[0].path.read_bytes()
    assert blob[:4] == b"\x08\x01\x12\x40" and len(blob) == 68
    assert pair[0].peer_id_bytes == b"\x00\x24\x08\x01\x12\x20" + blob[-32:]
    assert pair[0].peer_id.startswith("12D3KooW")
    assert base58.b58decode(pair[0].peer_id) == pair[0].peer_id_bytes


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:-1],
        lambda blob: blob + b"\n",
        lambda blob: b"\x08\x00" + blob[2:],  # an RSA key's framing
        lambda blob: blob[:36] + bytes(32),  # the public half belongs to another seed
        lambda blob: b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    ],
)
def test_a_wrong_file_is_refused_and_kept(tmp_path: Path, damage: object) -> None:
    """What is no ed25519 identity is refused with one line that names the file; the file is not touched."""
    path = tmp_path / "identity.key"
    load_or_create(path)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    blob = path.read_bytes()
    with pytest.raises(IdentityError) as caught:
        load_or_create(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == blob


def test_a_place_that_cannot_hold_a_file_is_named(tmp_path: Path) -> None:
    """A folder in the file's place, or a file in the folder's place, gives one line with the path."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "file" / "identity.key"):
        with pytest.raises(IdentityError, match=str(path)):
            load_or_create(path)


def test_only_the_owner_signs(pair: tuple[Identity, Identity]) -> None:
    """A signature holds for its owner's peer id and its message, and for nothing else."""
    a, b = pair
    signature = a.key.sign(b"message")
    assert verify(a.peer_id_bytes, b"message", signature)
    assert not verify(b.peer_id_bytes, b"message", signature)
    assert not verify(a.peer_id_bytes, b"massage", signature)
    assert not verify(a.peer_id_bytes, b"message", bytes([signature[0] ^ 1]) + signature[1:])


@given(
    owner=st.binary(max_size=50), key=st.binary(min_size=32, max_size=32), signature=st.binary(max_size=100)
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_garbage_never_verifies_and_never_raises(owner: bytes, key: bytes, signature: bytes) -> None:
    """Whatever a peer id or a signature is made of, the answer is False and no exception."""
    assert public_key_of(owner) is None
    assert not verify(owner, b"m", signature)
    assert not verify(b"\x00\x24\x08\x01\x12\x20" + key, b"m", signature)
