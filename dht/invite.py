"""Invites: one URL-safe string with all that a newcomer needs to find a run and to know it is the right one."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

import msgpack

from dtrain.dht.tokens import Token, TokenError, decode_token

SCHEME = "dtrain://"
_VERSION = 1
_CHECK_BYTES = 4
MAX_ADDRESSES = 16


class InviteError(ValueError):
    """The text is not an invite; the message says what is wrong with it."""


@dataclass(frozen=True)
class Invite:
    """Run id, manifest hash (32 bytes), organizer's ed25519 public key (32 bytes), libp2p bootstrap addresses, and an
    admission token where the run asks for one: then the text is a secret."""

    run_id: str
    manifest_hash: bytes
    organizer: bytes
    addresses: tuple[str, ...]
    token: Token | None = None

    def encode(self) -> str:
        fields: list[object] = [
            _VERSION,
            self.run_id,
            self.manifest_hash,
            self.organizer,
            list(self.addresses),
        ]
        if self.token is not None:
            fields.append(self.token.encode())
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
    if len(fields) not in (4, 5):
        raise InviteError("the invite cannot be read; ask for a new one")
    run_id, manifest_hash, organizer, addresses = fields[:4]
    fits = (
        isinstance(run_id, str)
        and isinstance(manifest_hash, bytes)
        and isinstance(organizer, bytes)
        and len(manifest_hash) == len(organizer) == 32
        and isinstance(addresses, list)
        and 0 < len(addresses) <= MAX_ADDRESSES
        and all(isinstance(address, str) for address in addresses)
        and all(isinstance(token, bytes) for token in fields[4:])
    )
    if not fits:
        raise InviteError("the invite cannot be read; ask for a new one")
    try:
        tokens = [decode_token(token) for token in fields[4:]]
        for token in tokens:
            token.grant.check(manifest_hash, organizer)
    except TokenError as error:
        raise InviteError(str(error)) from None
    return Invite(run_id, manifest_hash, organizer, tuple(addresses), *tokens)
