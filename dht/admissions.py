"""What the members of a run tell each other about admission, through the DHT.

Who uses a token: each user says so itself, and a few members that saw it say so too, so that the count outlives the
user. What is revoked: the organizer's list, kept alive by the same few. Everything in these records carries its own
proof, so a record says no more than its writer could prove.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import base58
import msgpack
from hivemind.dht.node import DHTNode
from hivemind.utils import get_dht_time

from dtrain.dht.door import TOKEN, Door
from dtrain.dht.tokens import MAX_REVOCATIONS_BYTES, MAX_USES, PASS_BYTES

LIFETIME_S = 1800.0
PERIOD_S = 600.0  # between two storings of what has not changed
LOOK_S = 15.0  # between two looks for newer revocations
REFRESH_S = 10.0
LOOK_UP_S = 3.0  # longest wait for what the DHT says of a token
ANSWER_LASTS_S = 60.0
WITNESSES = 5  # members that keep a record of a token, or of the revocations, beside the users themselves


class Admissions:
    """A member's part in admission. `others()` names the members that it sees."""

    def __init__(self, node: DHTNode, prefix: str, door: Door, others: Callable[[], Sequence[str]]):
        self._node, self._prefix, self.door = node, prefix, door
        self._own_id, self._others = str(node.peer_id), others
        self._stored: dict[str, tuple[float, bytes]] = {}  # by key: when, and what
        self._refreshed = 0.0
        self._answers: dict[str, tuple[float, str]] = {}  # of each peer: when, and why it refuses us or ""

    # ------------------------------------------------------------------ others at our door

    async def consider(self, peer_id: str, shown: object) -> str:
        """Let a peer in or say why not. The first use of a token that is new here waits for what others saw of it."""
        door = self.door
        if door.is_new(peer_id, shown) and isinstance(shown, bytes):
            key = shown[8:40]
            if key not in door.tokens:
                door.learn(await self._seen_by_others(key, peer_id))
        return door.admit(peer_id, shown)

    async def _seen_by_others(self, key: bytes, newcomer: str) -> list[tuple[str, object]]:
        """Uses of a token that somebody else than the user vouches for, those with most vouchers first."""
        vouched: Counter[tuple[str, bytes]] = Counter()
        for owner, value in (await self._read(_token_topic(key))).items():
            for peer_id, shown in _unpack_uses(value):
                vouched[peer_id, shown] += owner not in (peer_id, newcomer)
        ranked = sorted(vouched, key=lambda use: (-vouched[use], use))
        return [(peer_id, shown) for peer_id, shown in ranked if vouched[peer_id, shown]]

    # ------------------------------------------------------------------ we at others' doors

    def heard(self, peer_id: str, refusal: str) -> None:
        """A peer has answered us: it refuses us for a reason, or for none."""
        self._answers[peer_id] = float(get_dht_time()), refusal

    @property
    def refusal(self) -> str:
        """Why most of those that have answered of late do not let us in, else ""."""
        since = float(get_dht_time()) - ANSWER_LASTS_S
        self._answers = {peer: answer for peer, answer in self._answers.items() if answer[0] > since}
        refusals = Counter(reason for _, reason in self._answers.values() if reason)
        if 2 * sum(refusals.values()) <= len(self._answers):
            return ""
        return refusals.most_common(1)[0][0]

    # ------------------------------------------------------------------ in the background

    async def keep(self) -> None:
        """Refresh when it is time."""
        if get_dht_time() - self._refreshed > LOOK_S:
            await self.refresh()

    async def refresh(self) -> None:
        """Hear what is revoked; keep what we know of that and of uses alive. Bounded in time."""
        self._refreshed = float(get_dht_time())
        try:
            await asyncio.wait_for(self._refresh(), REFRESH_S)
        except Exception as error:  # hivemind raises many types
            logging.info("the DHT does not answer about admission: %r", error)

    async def _refresh(self) -> None:
        for blob in set((await self._read("revoked")).values()):
            if isinstance(blob, bytes) and len(blob) <= MAX_REVOCATIONS_BYTES:
                self.door.hear_revocations(blob)
        if self.door.revocations.serial and self._is_witness(b"revoked"):
            await self._store("revoked", self.door.revocations.blob)
        if self.door.admission.mode == TOKEN:
            for key in self.door.tokens:
                uses = self.door.uses_of(key)[:MAX_USES]
                if not self._is_witness(key):
                    uses = [use for use in uses if use[0] == self._own_id]
                if uses:
                    await self._store(_token_topic(key), msgpack.packb([list(use) for use in uses]))

    def _is_witness(self, key: bytes) -> bool:
        def rank(peer_id: str) -> bytes:
            return hashlib.sha256(key + peer_id.encode()).digest()

        own = rank(self._own_id)
        return sum(rank(other) < own for other in self._others()) < WITNESSES

    async def _read(self, topic: str) -> dict[str, object]:
        """Everybody's record under a topic, by peer id."""
        getting = self._node.get(f"{self._prefix}.{topic}", latest=True)
        try:
            found = await asyncio.wait_for(getting, LOOK_UP_S)
        except asyncio.TimeoutError:
            return {}
        records = found.value if found is not None and isinstance(found.value, dict) else {}
        return {
            base58.b58encode(owner).decode(): getattr(record, "value", None)
            for owner, record in records.items()
            if isinstance(owner, bytes)
        }

    async def _store(self, topic: str, value: bytes) -> None:
        now = float(get_dht_time())
        when, before = self._stored.get(topic, (0.0, b""))
        if value == before and now - when < PERIOD_S:
            return
        await store(self._node, self._prefix, topic, value)
        self._stored[topic] = now, value


async def store(node: DHTNode, prefix: str, topic: str, value: bytes) -> bool:
    """Store our record under a topic; whether anybody has it."""
    stored = await node.store(
        f"{prefix}.{topic}",
        value,
        expiration_time=get_dht_time() + LIFETIME_S,
        subkey=node.peer_id.to_bytes(),
        exclude_self=node.protocol.client_mode,
    )
    return bool(stored)


def _token_topic(key: bytes) -> str:
    return f"token.{key[:8].hex()}"


def _unpack_uses(value: object) -> list[tuple[str, bytes]]:
    """(peer id, pass) of each use in a record; nothing of one that does not fit the form."""
    try:
        uses = msgpack.unpackb(value)
        fits = isinstance(uses, list) and len(uses) <= MAX_USES
        fits = fits and all(
            isinstance(peer_id, str) and isinstance(shown, bytes) and len(shown) == PASS_BYTES
            for peer_id, shown in uses
        )
    except Exception:  # msgpack raises half a dozen types
        return []
    return [(peer_id, shown) for peer_id, shown in uses] if fits else []
