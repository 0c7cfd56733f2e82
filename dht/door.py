"""The door of a run: who may take part, judged by one member from what it has seen.

A pass proves what no member can doubt: whose it is, and that the organizer meant this run (`proves`). The rest depends
on what a member knows: whether the token had ended when it was first used, how many peers use it, what is revoked
(`admit`). Members tell each other whom they have seen use a token, so that a newcomer among them counts on from there.
Every refusal is counted by its reason.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from dtrain.dht.identity import bytes_of
from dtrain.dht.tokens import Grant, Pass, Revocations, TokenError, decode_grant, decode_pass

OPEN, TOKEN, LIST = "open", "token", "list"
MODES = (OPEN, TOKEN, LIST)
REMEMBERED = 4096  # verdicts on passes, and tokens whose uses are counted


@dataclass(frozen=True)
class Admission:
    """Whom a run's manifest admits."""

    mode: str
    manifest_hash: bytes
    organizer: bytes  # ed25519 public key
    allowed: frozenset[str] = frozenset()  # peer ids, with LIST


class Door:
    """Judges peers for one member. `now()` is Unix time; with `ledger`, the uses are kept in that file."""

    def __init__(self, admission: Admission, now: Callable[[], float], ledger: Path | None = None):
        assert admission.mode in MODES
        self.admission, self._now, self._ledger = admission, now, ledger
        self.refusals: Counter[str] = Counter()
        self.revocations = Revocations()
        self._proofs: OrderedDict[tuple[str, bytes], str] = OrderedDict()
        self._passes: dict[str, Pass] = {}  # of peers that have been admitted
        self._uses: OrderedDict[bytes, tuple[Grant, dict[str, bytes]]] = (
            OrderedDict()
        )  # by token: bound peers
        self._load()

    # ------------------------------------------------------------------ judging

    def proves(self, peer_id: str, blob: object) -> str:
        """The reason why this cannot be that peer's pass, or "". Every member comes to the same answer."""
        if self.admission.mode == OPEN:
            return ""
        if self.admission.mode == LIST:
            return "" if peer_id in self.admission.allowed else "not-listed"
        try:
            shown = decode_pass(blob)
        except TokenError as error:
            return error.reason
        key = (peer_id, shown.encode())
        if key not in self._proofs:
            self._proofs[key] = self._checked(peer_id, shown)
            while len(self._proofs) > REMEMBERED:
                self._proofs.popitem(last=False)
        return self._proofs[key]

    def _checked(self, peer_id: str, shown: Pass) -> str:
        try:
            shown.check(self.admission.manifest_hash, self.admission.organizer, bytes_of(peer_id))
        except TokenError as error:
            return error.reason
        return ""

    def admit(self, peer_id: str, blob: object) -> str:
        """Let a peer in, or say why not; its first use of a token binds it for good."""
        reason = self.proves(peer_id, blob) or self._is_revoked(peer_id, blob)
        if not reason and self.admission.mode == TOKEN:
            reason = self._bind(peer_id, decode_pass(blob))
        return self._counted(reason)

    def refuses(self, peer_id: str) -> str:
        """Why a peer that asks for something now is refused, or "". Whoever has shown no pass has none."""
        return self._counted(self.opinion(peer_id))

    def opinion(self, peer_id: str) -> str:
        """The same, without counting: nothing was asked for."""
        reason = self._is_revoked(peer_id, None)
        if not reason and self.admission.mode == LIST:
            reason = self.proves(peer_id, None)
        if not reason and self.admission.mode == TOKEN and peer_id not in self._passes:
            reason = "no-token"
        return reason

    def is_new(self, peer_id: str, blob: object) -> bool:
        """Whether admitting this peer would be a use of its token that is not on record here."""
        if self.admission.mode != TOKEN or self.proves(peer_id, blob):
            return False
        return peer_id not in self._bound_by(decode_pass(blob).grant.key)

    def origin(self, peer_id: str, blob: object) -> bytes:
        """What a peer that proves its right has it from: the token, or the organizer's list; b"" where all may come."""
        if self.admission.mode == OPEN:
            return b""
        return peer_id.encode() if self.admission.mode == LIST else decode_pass(blob).grant.key

    def count(self, reason: str) -> None:
        """Something was refused elsewhere for that reason."""
        self._counted(reason)

    def _counted(self, reason: str) -> str:
        if reason:
            self.refusals[reason] += 1
        return reason

    def _is_revoked(self, peer_id: str, blob: object) -> str:
        held = self._passes.get(peer_id)
        if self.admission.mode == TOKEN and blob is not None:
            held = decode_pass(blob)
        gone = held is not None and held.grant.key in self.revocations.tokens
        return "revoked" if gone or bytes_of(peer_id) in self.revocations.peers else ""

    # ------------------------------------------------------------------ uses of a token

    def _bound_by(self, key: bytes) -> dict[str, bytes]:
        return self._uses[key][1] if key in self._uses else {}

    def _bind(self, peer_id: str, shown: Pass) -> str:
        grant, bound = shown.grant, self._bound_by(shown.grant.key)
        if peer_id not in bound:
            if grant.expires and self._now() > grant.expires:
                return "expired"
            if len(bound) >= grant.uses:
                return "used-up"
            self._record(grant, peer_id, shown.binding)
        self._passes[peer_id] = shown
        return ""

    def _record(self, grant: Grant, peer_id: str, binding: bytes) -> None:
        _, bound = self._uses.setdefault(grant.key, (grant, {}))
        bound[peer_id] = binding
        self._uses.move_to_end(grant.key)
        while len(self._uses) > REMEMBERED:
            self._uses.popitem(last=False)
        self._save()

    def uses_of(self, key: bytes) -> list[tuple[str, bytes]]:
        """(peer id, pass) of everybody that is known to be bound by a token."""
        if key not in self._uses:
            return []
        grant, bound = self._uses[key]
        return [(peer_id, Pass(grant, binding).encode()) for peer_id, binding in bound.items()]

    @property
    def tokens(self) -> list[bytes]:
        """Public keys of all tokens in use."""
        return list(self._uses)

    def learn(self, seen: Iterable[tuple[str, object]]) -> None:
        """Take over uses that other members saw, (peer id, pass) each, as far as the token goes: they came before."""
        for peer_id, blob in seen:
            if not self.is_new(peer_id, blob):
                continue
            shown = decode_pass(blob)
            if len(self._bound_by(shown.grant.key)) < shown.grant.uses:
                self._record(shown.grant, peer_id, shown.binding)

    # ------------------------------------------------------------------ revocations

    def hear_revocations(self, blob: object) -> bool:
        """Take over a list if it is the organizer's and newer than ours; whether it was."""
        try:
            heard = Revocations.decode(blob, self.admission.manifest_hash, self.admission.organizer)
        except TokenError as error:
            self.count(error.reason)
            return False
        if heard.serial <= self.revocations.serial:
            return False
        self.revocations = heard
        self._save()
        return True

    # ------------------------------------------------------------------ across restarts

    def _load(self) -> None:
        if self._ledger is None or not self._ledger.exists():
            return
        path, self._ledger = self._ledger, None  # nothing is written before all is read
        try:
            revocations, uses = msgpack.unpackb(path.read_bytes())
            if revocations:
                self.hear_revocations(revocations)
            for packed, bound in uses:
                grant = decode_grant(packed)
                self.learn((peer_id, Pass(grant, binding).encode()) for peer_id, binding in bound.items())
        except Exception as error:  # msgpack and what follows raise half a dozen types
            logging.warning("the record of uses %s is damaged and is begun anew: %r", path, error)
        self._ledger = path

    def _save(self) -> None:
        if self._ledger is None:
            return
        uses = [[grant.encode(), bound] for grant, bound in self._uses.values()]
        temporary = self._ledger.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgpack.packb([self.revocations.blob, uses]))
            os.replace(temporary, self._ledger)
        except OSError as error:  # it is known here all the same
            logging.warning("cannot keep the record of uses %s: %s", self._ledger, error.strerror)


@dataclass(frozen=True)
class Entry:
    """A member's door, and its own pass for those of others."""

    door: Door
    own_pass: bytes


def entry_of(args: Mapping[str, Any], now: Callable[[], float]) -> Entry | None:
    """As a worker asks for it when it opens a run: "manifest_hash", and in "admission" "mode", "organizer", "allowed"
    (peer ids), "pass", "ledger" (a path or "") and "revocations" (the organizer's list or b""). None: no "admission".
    """
    asked = args.get("admission")
    if not asked:
        return None
    admission = Admission(
        asked["mode"], args["manifest_hash"], asked["organizer"], frozenset(asked["allowed"])
    )
    door = Door(admission, now, Path(asked["ledger"]) if asked["ledger"] else None)
    if asked["revocations"]:
        door.hear_revocations(asked["revocations"])
    return Entry(door, asked["pass"])
