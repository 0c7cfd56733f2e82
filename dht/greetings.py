"""Heartbeats straight from peer to peer, over the connections that rounds need anyway.

The DHT tells who is there; what they do from second to second they tell each other themselves. That reaches everybody
at once, and costs a peer one small message per other peer, where a look into the DHT costs the heartbeats of all from
each node that is asked. Who says something is known from the connection, so nothing needs to be signed.

They also introduce peers to each other: two that came at the same time may have missed each other in the DHT, and would
meet in rounds with everybody but each other. Whoever knows other peers than its caller does tells it of a few of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.dht.records import MAX_PASS_TEXT, MAX_STATUS_TEXT, pack_status, unpack_status
from dtrain.dht.streams import in_background

ANSWER_S = 3.0  # longest wait for an answer
MAX_GREETING_BYTES = 16 * 1024
MAX_INTRODUCED = 4  # addresses in one answer
CROWD_BYTES = 4
NOBODY = ("", 0.0)

Leads = tuple[str, float]  # (key of the group that this peer would lead or "", DHT time until which it waits)


@dataclass(frozen=True)
class News:
    """What a peer last said of itself."""

    said: float  # DHT time, by the speaker's clock
    status: Mapping[str, Any]
    leads: Leads = NOBODY


@dataclass(frozen=True)
class Greeting:
    """A message or its answer."""

    have: float  # `said` of the newest that its sender has of the other's news; 0 = nothing
    said: float = 0.0  # 0 = nothing new
    status: Mapping[str, Any] | None = None  # None = as before
    leads: Leads = NOBODY
    shown: bytes = b""  # the speaker's pass, to whom knows nothing of it
    refused: str = ""  # why the listener is not let in
    crowd: bytes = b""  # digest of the peers that the speaker knows
    introduces: tuple[str, ...] = ()  # addresses of some of them, if the listener knows others


class Greetings(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """Tells our news to other peers and hears theirs.

    `hear(peer id, greeting, is_answer)` takes in what another says, of itself or when asked; `have(peer id)` is `said`
    of the newest of its news; `own_pass` is shown to whom knows nothing of us; `refusal(peer id)` says why a peer is
    not let in; `count(reason)` is told of what cannot be read. `crowd()` are the addresses of the peers that we know
    and others can dial, by peer id; `meet(address)` takes in one that another knows.
    """

    def __init__(
        self,
        p2p: P2P,
        prefix: str,
        *,
        hear: Callable[[str, Greeting, bool], None],
        have: Callable[[str], float],
        own_pass: bytes = b"",
        refusal: Callable[[str], str] = lambda peer: "",
        count: Callable[[str], None] = lambda reason: None,
        crowd: Callable[[], Mapping[str, str]] = dict,
        meet: Callable[[str], None] = lambda address: None,
    ):
        self._p2p, self._prefix, self._hear, self._have = p2p, prefix, hear, have
        self._own_pass, self._refusal, self._count = own_pass, refusal, count
        self._crowd, self._meet = crowd, meet
        self.own: News | None = None  # None = we only listen
        self._told: dict[str, News] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    async def greet(self, peers: Sequence[str]) -> None:
        """Tell these peers what they have not heard yet, and hear what is new of them. Bounded by ANSWER_S each."""
        for peer in peers:
            if peer not in self._telling:
                self._telling[peer] = in_background(self._tell(peer))
        telling = [self._telling[peer] for peer in peers if peer in self._telling]
        if telling:
            await asyncio.wait(telling)

    async def _tell(self, peer: str) -> None:
        """Until that peer has our newest news, or cannot be reached."""
        try:
            stub = self.get_stub(self._p2p, PeerID.from_base58(peer), namespace=self._prefix)
            for _ in range(8):
                own = self.own
                reply = await stub.rpc_greet(BytesValue(value=self._message(peer)), timeout=ANSWER_S)
                greeting = self._read(reply.value)
                if own is not None:
                    self._told[peer] = own
                    if greeting.have < own.said:
                        del self._told[peer]  # it has forgotten our status
                self._hear(peer, greeting, True)
                for address in greeting.introduces:
                    self._meet(address)
                if own is None or self._told.get(peer) is self.own:
                    return
        except Exception as error:  # hivemind and its daemon raise many types when a peer is gone
            self._told.pop(peer, None)
            logging.debug("%s cannot be greeted: %r", peer, error)
        finally:
            del self._telling[peer]

    def _read(self, blob: bytes) -> Greeting:
        try:
            return unpack_greeting(blob)
        except ValueError:
            self._count("greeting-schema")
            raise

    def _message(self, peer: str) -> bytes:
        own, told, crowd = self.own, self._told.get(peer), digest_of(self._crowd())
        if own is None or told is own:
            return pack_greeting(Greeting(self._have(peer), crowd=crowd))
        status = own.status if told is None or told.status != own.status else None
        shown = self._own_pass if told is None else b""
        return pack_greeting(Greeting(self._have(peer), own.said, status, own.leads, shown, crowd=crowd))

    async def rpc_greet(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Another peer says what it is doing, and gets what it has not heard of us."""
        peer, greeting = str(context.remote_id), self._read(request.value)
        self._hear(peer, greeting, False)
        reply, own = Greeting(self._have(peer), refused=self._refusal(peer)), self.own
        crowd = self._crowd()
        if greeting.crowd and greeting.crowd != digest_of(crowd) and not reply.refused:
            others = [address for known, address in crowd.items() if known != peer]
            reply = replace(reply, introduces=tuple(random.sample(others, min(MAX_INTRODUCED, len(others)))))
        if own is not None and greeting.have < own.said:
            shown = b"" if greeting.have else self._own_pass
            reply = replace(reply, said=own.said, status=own.status, leads=own.leads, shown=shown)
        return BytesValue(value=pack_greeting(reply))


def digest_of(crowd: Mapping[str, str]) -> bytes:
    """The same for the same peers."""
    return hashlib.blake2b("\n".join(sorted(crowd)).encode(), digest_size=CROWD_BYTES).digest()


def pack_greeting(greeting: Greeting) -> bytes:
    """Encode; ValueError when the status does not fit a heartbeat."""
    fields: dict[str, Any] = {"have": greeting.have}
    if greeting.said:
        fields["said"] = greeting.said
    if greeting.status is not None:
        fields["status"] = pack_status(greeting.status)
    if greeting.leads != NOBODY:
        fields["leads"] = list(greeting.leads)
    if greeting.shown:
        fields["pass"] = greeting.shown
    if greeting.refused:
        fields["refused"] = greeting.refused
    if greeting.crowd:
        fields["crowd"] = greeting.crowd
    if greeting.introduces:
        fields["introduces"] = list(greeting.introduces)
    packed = msgpack.packb(fields)
    assert isinstance(packed, bytes)
    return packed


def unpack_greeting(blob: bytes) -> Greeting:
    """Decode and check what comes from the network. Raises ValueError."""
    if len(blob) > MAX_GREETING_BYTES:
        raise ValueError(f"a greeting of {len(blob)} bytes; {MAX_GREETING_BYTES} is the most")
    try:
        fields = msgpack.unpackb(blob)
        have, said, leads = fields["have"], fields.get("said", 0.0), fields.get("leads", NOBODY)
        group, until = leads
        fits = all(isinstance(x, float) and 0 <= x < math.inf for x in (have, said, until))
        shown, refused = fields.get("pass", b""), fields.get("refused", "")
        fits = fits and isinstance(group, str) and len(group) <= MAX_STATUS_TEXT
        fits = fits and isinstance(shown, bytes) and isinstance(refused, str)
        fits = fits and len(shown) <= MAX_PASS_TEXT and len(refused) <= MAX_STATUS_TEXT
        crowd, introduces = fields.get("crowd", b""), tuple(fields.get("introduces", ()))
        fits = fits and isinstance(crowd, bytes) and len(crowd) in (0, CROWD_BYTES)
        fits = fits and len(introduces) <= MAX_INTRODUCED
        fits = fits and all(isinstance(text, str) and len(text) <= MAX_STATUS_TEXT for text in introduces)
        status = unpack_status(fields["status"]) if "status" in fields else None
    except Exception:  # msgpack raises half a dozen types on hostile bytes
        raise ValueError("not a greeting") from None
    if not fits or ("status" in fields and status is None):
        raise ValueError("a greeting with an unfit field")
    return Greeting(have, said, status, (group, until), shown, refused, crowd, introduces)
