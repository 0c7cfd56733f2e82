"""Tokens: what an organizer signs so that others may take part, and how a peer makes one its own.

    grant    the public half of a token: the organizer's word on when it ends and how many peers may use it
    token    a grant with the private key that its public half names; travels in an invite, and is a secret
    pass     a grant bound to one peer by that key's signature over the peer id; public, and of use to that peer only

All have a fixed length and are bound to one run. The organizer also signs the list of what is revoked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dtrain.dht.identity import PEER_ID_BYTES

GRANT_DOMAIN = b"dtrain token 1\n"
BIND_DOMAIN = b"dtrain pass 1\n"
REVOKE_DOMAIN = b"dtrain revocations 1\n"

_TERMS = struct.Struct(">8s32sQI")  # run tag, the token's public key, expiry, uses
_SIGNATURE_BYTES = 64
GRANT_BYTES = _TERMS.size + _SIGNATURE_BYTES
TOKEN_BYTES = 32 + GRANT_BYTES
PASS_BYTES = GRANT_BYTES + _SIGNATURE_BYTES
MAX_USES = 250  # a record with as many passes is within the DHT's 64 KB
MAX_REVOKED = 500
MAX_REVOCATIONS_BYTES = 48 * 1024

# What a member that lets somebody not in, or not any more, says and counts; `reason_text` has the line for the user.
REASONS = {
    "no-token": "this run admits by invite: ask its organizer for one",
    "malformed": "the pass cannot be read: ask the organizer for a new invite",
    "wrong-run": "the invite's token is for another run: ask the organizer for a new one",
    "bad-signature": "the invite's token is not signed by the run's organizer: ask for a new one",
    "wrong-peer": "the pass belongs to another machine: ask the organizer for an invite of your own",
    "expired": "the invite has expired: ask the organizer for a new one",
    "revoked": "the organizer has revoked the invite or this machine",
    "used-up": "the invite has been used as often as it may be: ask the organizer for a new one",
    "not-listed": "this run admits listed machines only: ask the organizer to list this one",
    "wrong-sum": "the others have proof that this machine made a wrong sum: is its software altered, its memory bad?",
    "two-sums": "the others have proof that this machine made two sums of one round: does another one use its key?",
    "put-out-norm": "its updates were far longer than the others', round after round: is its software altered?",
    "put-out-empty": "its updates said nothing beside the others', round after round: is its software altered?",
    "put-out-against": "its updates pointed away from the others', round after round: is its data the run's?",
    "put-out-malformed": "what it sent broke the format, round after round: is its software altered, its memory bad?",
    "put-out-late": "what it sent came too late, round after round: is its uplink too slow for this run?",
    "put-out-accused": "more than a third of the others found its work to be bad: is its data the run's?",
    "audit-unanswered": "the others asked this machine in vain what its sums were made of: is its uplink too slow?",
}


def reason_text(reason: str) -> str:
    """A refusal by others as the user reads it."""
    return REASONS.get(reason, "the other workers do not let this machine take part")


Sign = Callable[[bytes], bytes]


class TokenError(ValueError):
    """A token, pass or list that does not hold. `reason` is one word, as it is counted; the text is for the user."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Grant:
    """The organizer's word. `signature` is over the run's whole hash, of which `run_tag` is the beginning."""

    run_tag: bytes  # 8 bytes
    key: bytes  # ed25519 public key of the token, 32 bytes
    expires: int  # Unix seconds; 0 = never
    uses: int  # peers that may be bound
    signature: bytes

    def encode(self) -> bytes:
        return _TERMS.pack(self.run_tag, self.key, self.expires, self.uses) + self.signature

    @property
    def id(self) -> str:
        """How users name the token: 16 hex digits."""
        return self.key[:8].hex()

    def check(self, manifest_hash: bytes, organizer: bytes) -> None:
        """Raise TokenError "wrong-run" or "bad-signature" unless the run's organizer signed it for this run."""
        if self.run_tag != manifest_hash[:8]:
            raise TokenError("wrong-run", "the invite's token is for another run")
        message = GRANT_DOMAIN + manifest_hash + self.encode()[: _TERMS.size]
        if not _verifies(organizer, message, self.signature):
            raise TokenError("bad-signature", "the invite's token is not signed by the run's organizer")


@dataclass(frozen=True)
class Token:
    """A grant and the private key that binds it to peers."""

    grant: Grant
    seed: bytes  # 32 bytes

    def encode(self) -> bytes:
        return self.seed + self.grant.encode()

    def bind(self, manifest_hash: bytes, peer_id: bytes) -> Pass:
        """The pass of one peer, whose id is given as bytes."""
        signature = Ed25519PrivateKey.from_private_bytes(self.seed).sign(_binding(manifest_hash, peer_id))
        return Pass(self.grant, signature)


@dataclass(frozen=True)
class Pass:
    """A grant bound to a peer."""

    grant: Grant
    binding: bytes

    def encode(self) -> bytes:
        return self.grant.encode() + self.binding

    def check(self, manifest_hash: bytes, organizer: bytes, peer_id: bytes) -> None:
        """Raise TokenError unless this is that peer's pass to that run: also "wrong-peer", if it is another peer's."""
        self.grant.check(manifest_hash, organizer)
        if not _verifies(self.grant.key, _binding(manifest_hash, peer_id), self.binding):
            raise TokenError("wrong-peer", "the pass is another peer's")


def issue(sign: Sign, manifest_hash: bytes, *, expires: int, uses: int) -> Token:
    """A new token; `sign` signs with the organizer's key. ValueError if the terms cannot be written."""
    if not 0 <= expires < 2**63 or not 1 <= uses <= MAX_USES:
        raise ValueError(f"uses must be 1 to {MAX_USES}, and the expiry a time")
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    terms = _TERMS.pack(manifest_hash[:8], public, expires, uses)
    grant = Grant(manifest_hash[:8], public, expires, uses, sign(GRANT_DOMAIN + manifest_hash + terms))
    return Token(grant, key.private_bytes_raw())


def decode_grant(blob: bytes) -> Grant:
    """Raises TokenError "malformed"."""
    if len(blob) != GRANT_BYTES:
        raise TokenError("malformed", f"a grant of {len(blob)} bytes, not {GRANT_BYTES}")
    run_tag, key, expires, uses = _TERMS.unpack_from(blob)
    if not 1 <= uses <= MAX_USES or expires >= 2**63:
        raise TokenError("malformed", "a token with impossible terms")
    return Grant(run_tag, key, expires, uses, bytes(blob[_TERMS.size :]))


def decode_token(blob: bytes) -> Token:
    """What `Token.encode` wrote, its signature unchecked. Raises TokenError "malformed"."""
    if len(blob) != TOKEN_BYTES:
        raise TokenError("malformed", "the invite's token is cut off: copy the whole line")
    token = Token(decode_grant(blob[32:]), bytes(blob[:32]))
    key = Ed25519PrivateKey.from_private_bytes(token.seed).public_key().public_bytes_raw()
    if key != token.grant.key:
        raise TokenError("malformed", "the invite's token does not fit together: ask for a new invite")
    return token


def decode_pass(blob: object) -> Pass:
    """What `Pass.encode` wrote, its signatures unchecked. Raises TokenError "no-token" or "malformed"."""
    if not isinstance(blob, bytes) or not blob:
        raise TokenError("no-token", "this run admits by invite: ask its organizer for one")
    if len(blob) != PASS_BYTES:
        raise TokenError("malformed", f"a pass of {len(blob)} bytes, not {PASS_BYTES}")
    return Pass(decode_grant(blob[:GRANT_BYTES]), bytes(blob[GRANT_BYTES:]))


@dataclass(frozen=True)
class Revocations:
    """What the organizer has taken back: tokens, by public key, with everybody bound by them, and single peers."""

    serial: int = 0  # of two lists the one with the higher number holds
    tokens: frozenset[bytes] = frozenset()
    peers: frozenset[bytes] = frozenset()  # peer ids as bytes
    blob: bytes = b""  # as it travels

    @classmethod
    def make(
        cls, sign: Sign, manifest_hash: bytes, serial: int, tokens: Iterable[bytes], peers: Iterable[bytes]
    ) -> Revocations:
        """A signed list. ValueError if it is too long."""
        listed = [sorted(set(tokens)), sorted(set(peers))]
        if sum(map(len, listed)) > MAX_REVOKED:
            raise ValueError(f"a list of more than {MAX_REVOKED} revocations: begin a new run instead")
        body = msgpack.packb([serial, *listed])
        return cls.decode(body + sign(REVOKE_DOMAIN + manifest_hash + body), manifest_hash, None)

    @classmethod
    def decode(cls, blob: object, manifest_hash: bytes, organizer: bytes | None) -> Revocations:
        """Raises TokenError "malformed" or "bad-signature"; `organizer` None trusts the signature."""
        if not isinstance(blob, bytes) or not _SIGNATURE_BYTES < len(blob) <= MAX_REVOCATIONS_BYTES:
            raise TokenError("malformed", "no list of revocations")
        body, signature = blob[:-_SIGNATURE_BYTES], blob[-_SIGNATURE_BYTES:]
        if organizer is not None and not _verifies(
            organizer, REVOKE_DOMAIN + manifest_hash + body, signature
        ):
            raise TokenError("bad-signature", "revocations that the run's organizer did not sign")
        try:
            serial, tokens, peers = msgpack.unpackb(body)
            fits = (
                type(serial) is int
                and 0 <= serial < 2**63
                and len(tokens) + len(peers) <= MAX_REVOKED
                and all(isinstance(key, bytes) and len(key) == 32 for key in tokens)
                and all(isinstance(peer, bytes) and len(peer) == PEER_ID_BYTES for peer in peers)
            )
        except Exception:  # msgpack raises half a dozen types
            fits = False
        if not fits:
            raise TokenError("malformed", "no list of revocations")
        return cls(serial, frozenset(tokens), frozenset(peers), blob)


def _binding(manifest_hash: bytes, peer_id: bytes) -> bytes:
    return BIND_DOMAIN + manifest_hash + peer_id


def _verifies(public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
