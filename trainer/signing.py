"""The organizer's key, and manifests signed with it: newcomers know whose settings they are given.

The key is Ed25519 (RFC 8032), made once per organizer and kept in a file that only its owner can read.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import Manifest

DOMAIN = b"dtrain manifest 1\n"
"""Signed before the manifest, so that the signature means nothing anywhere else."""


@dataclass(frozen=True)
class SignedManifest:
    """A manifest and its organizer's signature. Every instance is verified: a false one raises UsageError."""

    manifest: Manifest
    """The settings; `manifest.organizer` is the public key."""
    signature: bytes
    """64 bytes over DOMAIN and the manifest's canonical bytes."""

    def __post_init__(self) -> None:
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.manifest.organizer))
            key.verify(self.signature, DOMAIN + self.manifest.canonical_bytes())
        except (InvalidSignature, ValueError):
            raise UsageError(
                f"the manifest of run {self.manifest.run_id} is not signed by the organizer it names: "
                "ask the organizer for a fresh invite"
            ) from None

    def to_json(self) -> str:
        """{"manifest": {...}, "signature": hex}, compact."""
        tree = {"manifest": self.manifest.to_dict(), "signature": self.signature.hex()}
        return json.dumps(tree, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> SignedManifest:
        """What `to_json` wrote; UsageError if it is malformed or the signature is false."""
        try:
            tree = json.loads(text)
            manifest, signature = tree["manifest"], bytes.fromhex(tree["signature"])
            parsed = Manifest.from_dict(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError("this is no signed manifest: ask the organizer for a fresh invite") from None
        return cls(parsed, signature)


class OrganizerKey:
    """An Ed25519 private key in a file of mode 0600."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public_hex(self) -> str:
        """The public key, 64 lower-case hex digits."""
        return self.public.hex()

    def sign(self, manifest: Manifest) -> SignedManifest:
        """The manifest with this key as its organizer, signed."""
        owned = replace(manifest, organizer=self.public_hex)
        return SignedManifest(owned, self._key.sign(DOMAIN + owned.canonical_bytes()))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign_bytes(self, message: bytes) -> bytes:
        """64 bytes over a message that begins with a domain of its own, such as `dht/tokens.py` has."""
        assert not message.startswith(DOMAIN)
        return self._key.sign(message)

    @classmethod
    def load_or_create(cls, path: Path) -> OrganizerKey:
        """The key in `path`; a new one, written there, if there is no such file."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls.load(path) if path.exists() else cls._create(path)
        except FileExistsError:
            return cls.load(path)
        except OSError as error:
            raise UsageError(f"cannot keep the organizer's key in {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> OrganizerKey:
        """The key in `path`. UsageError if it is missing, malformed or readable by others."""
        try:
            data = path.read_bytes()
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            raise UsageError(f"cannot read the organizer's key {path}: {error.strerror}") from None
        if os.name == "posix" and mode & 0o077:
            raise UsageError(f"others may read the organizer's key {path}: type chmod 600 {path}")
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{path} holds no Ed25519 key: move it away, and a new one will be made")
        return cls(key)

    @classmethod
    def _create(cls, path: Path) -> OrganizerKey:
        # Created exclusively with mode 0600 (as mkstemp does) and linked to its name when whole: at no moment can
        # others read it, and of two processes that begin at once one makes the key and the other reads it.
        key = Ed25519PrivateKey.generate()
        handle, unborn = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
                file.flush()
                os.fsync(file.fileno())
            os.link(unborn, path)
        finally:
            os.unlink(unborn)
        return cls(key)
