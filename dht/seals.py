"""Signatures of a round: who sent which section, and which aggregate a reducer made of them.

A connection proves to its two ends who speaks. A signature proves it to everybody, later too: so a reducer can be asked
for the sections that it summed, and what it signed can be held against it. Each signature is bound to its round by the
hash of the round's setting (run, round, theta, group, members with their weights), so it means nothing in any other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgpack

from dtrain.compression.errors import PayloadError
from dtrain.dht.identity import Identity, bytes_of, verify
from dtrain.dht.membership import Member

SIGNATURE_BYTES = 64
NOTHING = bytes(32)
_SECTION, _AGGREGATE = b"dtrain section 1\n", b"dtrain aggregate 1\n"

Span = tuple[int, int]
"""(first chunk, number of chunks)"""


@dataclass(frozen=True)
class Setting:
    """What all members of a round agree on before anything is sent."""

    run: bytes  # tag
    round: int
    base_digest: bytes
    group: bytes
    members: tuple[tuple[str, float], ...]  # (peer id, weight that counts) in canonical order

    @classmethod
    def of(
        cls, run: bytes, round: int, base_digest: bytes, group: bytes, members: Sequence[Member]
    ) -> Setting:
        pairs = tuple((member.peer_id, float(member.counts)) for member in members)
        return cls(run, round, base_digest, group, pairs)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of everything here."""
        return hashlib.sha256(b"dtrain round 1\n" + self.pack()).digest()

    def pack(self) -> bytes:
        fields = [self.run, self.round, self.base_digest, self.group, [list(pair) for pair in self.members]]
        packed = msgpack.packb(fields)
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def unpack(cls, blob: bytes) -> Setting:
        """The other end. Raises ValueError when it is none, or not written as `pack` writes it."""
        try:
            run, round, base_digest, group, members = msgpack.unpackb(blob)
            setting = cls(run, round, base_digest, group, tuple((str(p), float(w)) for p, w in members))
            fits = all(isinstance(field, bytes) for field in (run, base_digest, group)) and type(round) is int
            fits = fits and setting.pack() == blob
        except Exception:  # msgpack and what follows raise half a dozen types
            fits = False
        if not fits:
            raise ValueError("not a round's setting")
        return setting


# ---------------------------------------------------------------------- sections


def sign_section(identity: Identity, setting: Setting, span: Span, section: bytes) -> bytes:
    """Our word that this is our section of that span, in this round."""
    return identity.key.sign(_section_message(setting, span, identity.peer_id, section))


def is_section_of(sender: str, setting: Setting, span: Span, section: bytes, signature: object) -> bool:
    """Whether that peer signed this section for this span and round."""
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        return False
    return verify(bytes_of(sender), _section_message(setting, span, sender, section), signature)


def _section_message(setting: Setting, span: Span, sender: str, section: bytes) -> bytes:
    content = hashlib.sha256(section).digest()
    return _SECTION + setting.digest + struct.pack("<II", *span) + bytes_of(sender) + content


# ---------------------------------------------------------------------- aggregates


@dataclass(frozen=True)
class Seal:
    """A reducer's word on one aggregate, and on what its compressed sum left out."""

    setting: bytes  # digest
    reducer: str
    span: Span
    aggregate: bytes  # SHA-256
    root: bytes = NOTHING  # of the residual after this sum (`compression/audit.py`); NOTHING: there is none
    previous: bytes = NOTHING  # digest of the seal of the residual before it; NOTHING: it was all zeros
    signature: bytes = field(default=b"", compare=False)

    @property
    def message(self) -> bytes:
        place = struct.pack("<II", *self.span) + bytes_of(self.reducer)
        return _AGGREGATE + self.setting + place + self.aggregate + self.root + self.previous

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.message).digest()

    @property
    def is_genuine(self) -> bool:
        """Whether its reducer signed just this."""
        return verify(bytes_of(self.reducer), self.message, self.signature)

    def pack(self) -> bytes:
        fields = [self.setting, self.reducer, list(self.span), self.aggregate, self.root, self.previous]
        packed = msgpack.packb([*fields, self.signature])
        assert isinstance(packed, bytes)
        return packed

    @classmethod
    def unpack(cls, blob: bytes) -> Seal:
        """The other end, genuine. Raises ValueError."""
        try:
            setting, reducer, (first, count), *rest = msgpack.unpackb(blob)
            aggregate, root, previous, signature = rest
            seal = cls(setting, reducer, (first, count), aggregate, root, previous, signature)
            fits = all(len(part) == 32 for part in (setting, aggregate, root, previous)) and seal.is_genuine
        except Exception:  # msgpack and what follows raise half a dozen types
            fits = False
        if not fits:
            raise ValueError("not a reducer's seal")
        return seal


def sign_aggregate(
    identity: Identity,
    setting: Setting,
    span: Span,
    aggregate: bytes,
    *,
    root: bytes = NOTHING,
    previous: bytes = NOTHING,
) -> Seal:
    """Our word that this is our aggregate of that span, in this round."""
    content = hashlib.sha256(aggregate).digest()
    seal = Seal(setting.digest, identity.peer_id, span, content, root, previous)
    return replace(seal, signature=identity.key.sign(seal.message))


@dataclass(frozen=True)
class Stamp:
    """What travels with an aggregate: its seal, and for an exact union the signatures of the sections in it."""

    seal: Seal
    signatures: tuple[bytes, ...] = ()

    def header(self) -> dict[str, bytes]:
        """64 bytes for a union and 64 for each section in it; 128 for a recompressed aggregate."""
        if self.seal.root == NOTHING:
            return {"seal": self.seal.signature, "signatures": b"".join(self.signatures)}
        return {"seal": self.seal.root + self.seal.previous + self.seal.signature}


def check_stamp(
    header: Mapping[str, Any],
    setting: Setting,
    reducer: str,
    span: Span,
    aggregate: bytes,
    union: Sequence[Any],
) -> Stamp:
    """The stamp of a checked aggregate. Raises PayloadError "bad-seal", "bad-signature".

    union: (index of the contributor, section) of an exact union; empty for a recompressed aggregate.
    """
    seal = _read_seal(header.get("seal"), setting, reducer, span, aggregate, is_union=bool(union))
    if not seal.is_genuine:
        raise PayloadError("bad-seal", f"{reducer} has not signed this aggregate")
    if not union:
        return Stamp(seal)
    joined = header.get("signatures")
    if not isinstance(joined, bytes) or len(joined) != SIGNATURE_BYTES * len(union):
        raise PayloadError(
            "bad-signature", "the sections of an exact union come with their senders' signatures"
        )
    signatures = [joined[at : at + SIGNATURE_BYTES] for at in range(0, len(joined), SIGNATURE_BYTES)]
    for (index, section), signature in zip(union, signatures, strict=True):
        sender, _ = setting.members[index]
        if not is_section_of(sender, setting, span, section, signature):
            raise PayloadError("bad-signature", f"{sender} has not signed what {reducer} says that it sent")
    return Stamp(seal, tuple(signatures))


def _read_seal(
    blob: object, setting: Setting, reducer: str, span: Span, aggregate: bytes, *, is_union: bool
) -> Seal:
    expected = SIGNATURE_BYTES if is_union else 64 + SIGNATURE_BYTES
    if not isinstance(blob, bytes) or len(blob) != expected:
        raise PayloadError("bad-seal", f"an aggregate of {reducer} without its seal")
    content = hashlib.sha256(aggregate).digest()
    committed = (NOTHING, NOTHING) if is_union else (blob[:32], blob[32:64])
    return Seal(setting.digest, reducer, span, content, *committed, signature=blob[-SIGNATURE_BYTES:])
