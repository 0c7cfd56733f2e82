"""What members contributed, as a whole, for those who check each other's work.

A reducer sees its own span of everybody's payload. Who wants all of it asks the sender, and gets it with the sender's
signatures of every section, as they went to the reducers: a sender that shows another payload than it sent has signed
two, and whoever reduced a section of that payload sees it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, AsyncIterator  # noqa: UP035  # hivemind recognizes streams by typing's AsyncIterator only

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.dht.averager import SwarmAverager
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.identity import Identity
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.seals import SIGNATURE_BYTES, Setting, Span, is_section_of, sign_section
from dtrain.dht.streams import Call, Header, StreamError, answer, ask, first_header

KEPT_ROUNDS, KEPT_BYTES = 2, 512 * 1024 * 1024  # of payloads and sections; at least the newest round's
TWO_PAYLOADS = "two-payloads"


@dataclass(frozen=True)
class Sent:
    """What a member keeps of a round: its own payload, and the sections of its span."""

    setting: Setting
    spans: Sequence[Span]
    payload: bytes
    own_span: Span
    received: Mapping[str, bytes]  # sections of `own_span`, by their senders' peer ids

    @classmethod
    def of(cls, runner: RoundRunner) -> Sent:
        """Of a round that was run here. An exact union's sections are in everybody's hands anyway."""
        kept = runner.kept.sections if runner.kept is not None else ()
        received = {runner.members[index].peer_id: section for index, section, _ in kept}
        spans = [span for span in runner.spans if span[1]]
        return cls(runner.setting, spans, runner.payload, runner.own_span, received)

    @property
    def num_bytes(self) -> int:
        return len(self.payload) + sum(len(section) for section in self.received.values())


class TwoPayloads(StreamError):
    """A peer shows another payload than it has signed before."""


class Contributions:
    """A member's last contributions, and its look at others'."""

    def __init__(self, codec: Codec, identity: Identity):
        self._codec, self._identity = codec, identity
        self._kept: OrderedDict[bytes, Sent] = OrderedDict()  # by the digest of the round's setting
        self._answered: set[tuple[bytes, str]] = set()

    def note(self, runner: RoundRunner) -> None:
        """A round was run."""
        sent = Sent.of(runner)
        self._kept[sent.setting.digest] = sent
        size = sum(kept.num_bytes for kept in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > KEPT_ROUNDS or size > KEPT_BYTES):
            digest, dropped = self._kept.popitem(last=False)
            size -= dropped.num_bytes
            self._answered = {pair for pair in self._answered if pair[0] != digest}

    def find(self, peer_id: str, round: int) -> Sent | None:
        """The round, if that peer was in it with us."""
        rounds = [s for s in self._kept.values() if s.setting.round == round]
        return rounds[-1] if rounds and peer_id in dict(rounds[-1].setting.members) else None

    async def give(self, asker: str, header: Header) -> tuple[dict[str, bytes], bytes]:
        """Signatures and our payload for who asks. Raises StreamError to refuse."""
        digest = header.get("setting")
        sent = self._kept.get(digest) if isinstance(digest, bytes) else None
        if sent is None or not isinstance(digest, bytes):
            raise StreamError("that round is not kept here")
        if asker not in dict(sent.setting.members) or (digest, asker) in self._answered:
            raise StreamError("only members of the round are answered, and once")
        self._answered.add((digest, asker))
        return {"signatures": await asyncio.to_thread(self._sign, sent)}, sent.payload

    def _sign(self, sent: Sent) -> bytes:
        cut = self._codec.cut
        return b"".join(
            sign_section(self._identity, sent.setting, span, cut(sent.payload, *span)) for span in sent.spans
        )

    def check(self, sent: Sent, peer_id: str, header: Header, payload: bytes) -> None:
        """What that peer shows of its contribution. Raises PayloadError or StreamError when it is none, and
        TwoPayloads."""
        codec, setting, signatures = self._codec, sent.setting, header.get("signatures")
        codec.check(payload, run=setting.run, round=setting.round, first_chunk=0, num_chunks=codec.num_chunks)
        if not isinstance(signatures, bytes) or len(signatures) != SIGNATURE_BYTES * len(sent.spans):
            raise StreamError("not one signature for each span")
        for number, span in enumerate(sent.spans):
            signature = signatures[number * SIGNATURE_BYTES : (number + 1) * SIGNATURE_BYTES]
            section = codec.cut(payload, *span)
            if not is_section_of(peer_id, setting, span, section, signature):
                raise StreamError("it has not signed what it shows")
            if span == sent.own_span and sent.received.get(peer_id, section) != section:
                raise TwoPayloads("it shows another payload than it sent")


class ContributionDesk(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """The same on the network. `refuses(peer id)` says why a peer is not answered, or ""; `accuse(peer id, reason)`
    hears of whoever has signed two payloads."""

    def __init__(
        self,
        p2p: P2P,
        contributions: Contributions,
        *,
        prefix: str,
        max_bytes: int,
        timeout_s: float,
        refuses: Callable[[str], str],
        accuse: Callable[[str, str], None],
    ):
        self._p2p, self._prefix, self._contributions = p2p, prefix, contributions
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._refuses, self._accuse = refuses, accuse

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    async def fetch(self, peer_id: str, round: int) -> bytes | None:
        """See `trainer.exchange`."""
        sent = self._contributions.find(peer_id, round)
        if sent is None:
            return None
        try:
            stub = self.get_stub(self._p2p, PeerID.from_base58(peer_id), namespace=self._prefix)
            call: Call = stub.rpc_contribution
            reply, payload = await ask(
                call, {"setting": sent.setting.digest}, max_bytes=self._max_bytes, timeout_s=self._timeout_s
            )
            await asyncio.to_thread(self._contributions.check, sent, peer_id, reply, payload)
        except TwoPayloads as error:
            logging.warning("%s: %s in round %d", peer_id, error, round)
            self._accuse(peer_id, TWO_PAYLOADS)
            return None
        except (PayloadError, StreamError) as error:
            logging.warning("%s does not show what it sent in round %d: %s", peer_id, round, error)
            return None
        except Exception as error:  # hivemind and its daemon raise many types when a peer is gone
            logging.info("%s cannot be asked for what it sent: %r", peer_id, error)
            return None
        return payload

    async def rpc_contribution(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A member of a round asks for our payload of it."""

        async def handle() -> tuple[dict[str, Any], bytes]:
            asker = str(context.remote_id)
            header = await first_header(stream, lambda: self._refuses(asker), self._timeout_s)
            return await self._contributions.give(asker, header)

        async for message in answer(stream, handle):
            yield message


async def open_contributions(
    p2p: P2P,
    identity: Identity,
    averager: SwarmAverager,
    heartbeats: Heartbeats,
) -> ContributionDesk:
    """Show what we contribute from now on to members that ask."""
    codec, terms = averager.codec, averager.terms
    contributions = Contributions(codec, identity)
    desk = ContributionDesk(
        p2p,
        contributions,
        prefix=terms.prefix,
        max_bytes=codec.max_payload_bytes(0, codec.num_chunks),
        timeout_s=terms.sender_timeout_s,
        refuses=heartbeats.refuses,
        accuse=averager.repute.accuse,
    )
    await desk.open()
    averager.on_group = contributions.note
    return desk
