"""A peer's identity: an ed25519 key whose public half *is* the peer id.

libp2p inlines ed25519 public keys in the peer id (identity multihash), so whoever knows a peer id can check that
peer's signatures without any certificate: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

# Protobuf framing of libp2p's crypto.proto: field 1 = key type 1 (Ed25519), field 2 = the key bytes.
_PRIVATE_PREFIX = b"\x08\x01\x12\x40"
_PUBLIC_PREFIX = b"\x08\x01\x12\x20"
_INLINE_MULTIHASH = b"\x00\x24"
PEER_ID_BYTES = len(_INLINE_MULTIHASH) + len(_PUBLIC_PREFIX) + 32


class IdentityError(ValueError):
    """The identity file cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Identity:
    """A peer's key pair. `path` is the libp2p key file that the p2p daemon reads."""

    path: Path
    key: Ed25519PrivateKey

    @property
    def peer_id_bytes(self) -> bytes:
        public = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return _INLINE_MULTIHASH + _PUBLIC_PREFIX + public

    @property
    def peer_id(self) -> str:
        return base58.b58encode(self.peer_id_bytes).decode()


def load_or_create(path: Path) -> Identity:
    """Read the identity at `path`, or make one there (mode 0600, never over an existing file).

    Raises IdentityError when the file is not a key of ours or cannot be written.
    """
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        return _create(path)
    except OSError as error:
        raise IdentityError(f"cannot read the identity file {path}: {error.strerror}") from None
    if len(blob) != len(_PRIVATE_PREFIX) + 64 or not blob.startswith(_PRIVATE_PREFIX):
        raise IdentityError(
            f"{path} is not an ed25519 identity file; move it away and a new one will be made"
        )
    seed, public = blob[len(_PRIVATE_PREFIX) :][:32], blob[-32:]
    identity = Identity(path, Ed25519PrivateKey.from_private_bytes(seed))
    if not identity.peer_id_bytes.endswith(public):
        raise IdentityError(f"{path} is damaged; move it away and a new one will be made")
    return identity


def _create(path: Path) -> Identity:
    key = Ed25519PrivateKey.generate()
    seed = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_PRIVATE_PREFIX + seed + public)
    except OSError as error:
        raise IdentityError(f"cannot write the identity file {path}: {error.strerror}") from None
    return Identity(path, key)


def public_key_of(peer_id_bytes: bytes) -> Ed25519PublicKey | None:
    """The public key inside a peer id, or None when the id does not carry an ed25519 key."""
    prefix = _INLINE_MULTIHASH + _PUBLIC_PREFIX
    if len(peer_id_bytes) != PEER_ID_BYTES or not peer_id_bytes.startswith(prefix):
        return None
    return Ed25519PublicKey.from_public_bytes(peer_id_bytes[len(prefix) :])


def verify(peer_id_bytes: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) over `message` was made by the owner of that peer id."""
    key = public_key_of(peer_id_bytes)
    if key is None:
        return False
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def bytes_of(peer_id: str) -> bytes:
    """A peer id in its binary form; b"" for a text that is none."""
    try:
        return base58.b58decode(peer_id)
    except ValueError:
        return b""
