"""Invites: one URL-safe string with all that a newcomer needs to find a run and to know it is the right one."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

import msgpack

SCHEME = "dtrain://"
_VERSION = 1
_CHECK_BYTES = 4
MAX_ADDRESSES = 16


class InviteError(ValueError):
    """The text is not an invite; the message says what is wrong with it."""


@dataclass(frozen=True)
class Invite:
    """Run id, manifest hash (32 bytes), organizer's ed25519 public key (32 bytes), libp2p bootstrap addresses."""

    run_id: str
    manifest_hash: bytes
    organizer: bytes
    addresses: tuple[str, ...]

    def encode(self) -> str:
        fields = [_VERSION, self.run_id, self.manifest_hash, self.organizer, list(self.addresses)]
        body = msgpack.packb(fields)
        check = hashlib.sha256(body).digest()[:_CHECK_BYTES]
        return SCHEME + base64.urlsafe_b64encode(body + check).decode().rstrip("=")


def decode(text: str) -> Invite:
    """Parse an invite, with or without its scheme. Raises InviteError."""
    stripped = "".join(text.split())
    stripped = stripped[len(SCHEME) :] if stripped.startswith(SCHEME) else stripped
    try:
        blob = base64.b64decode(stripped + "=" * (-len(stripped) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise InviteError("this is not an invite; copy the whole line that starts with dtrain://") from None
    body, check = blob[:-_CHECK_BYTES], blob[-_CHECK_BYTES:]
    if hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
        raise InviteError("the invite is damaged or cut off; copy the whole line that starts with dtrain://")
    try:
        version, *fields = msgpack.unpackb(body)
    except Exception:  # msgpack raises half a dozen types
        raise InviteError("the invite cannot be read; ask for a new one") from None
    if version != _VERSION:
        raise InviteError(
            f"the invite has version {version!r:.20}; this dtrain reads {_VERSION}: upgrade dtrain"
        )
    if len(fields) != 4:
        raise InviteError("the invite cannot be read; ask for a new one")
    run_id, manifest_hash, organizer, addresses = fields
    fits = (
        isinstance(run_id, str)
        and isinstance(manifest_hash, bytes)
        and isinstance(organizer, bytes)
        and len(manifest_hash) == len(organizer) == 32
        and isinstance(addresses, list)
        and 0 < len(addresses) <= MAX_ADDRESSES
        and all(isinstance(address, str) for address in addresses)
    )
    if not fits:
        raise InviteError("the invite cannot be read; ask for a new one")
    return Invite(run_id, manifest_hash, organizer, tuple(addresses))
