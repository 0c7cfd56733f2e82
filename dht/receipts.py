"""Asking the members of our rounds for receipts, and giving them theirs: after a round, never on its way.

A worker asks at most `credit.MAX_SIGNERS` others once in PERIOD_S and when it leaves: about 250 bytes each, there and
back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.dht.credit import MAX_SIGNERS, WINDOW, Ledger, Receipt, sign
from dtrain.dht.credit_file import load, save
from dtrain.dht.identity import Identity
from dtrain.dht.streams import in_background

PERIOD_S = 30.0
ANSWER_S = 3.0


class Receipts(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """One worker's receipts: those that it gives, and those that it gets, which are kept in `path`."""

    def __init__(
        self,
        p2p: P2P,
        identity: Identity,
        *,
        run: bytes,
        prefix: str,
        path: Path,
        traffic: Callable[[], tuple[int, int]],
    ):
        self._p2p, self._identity, self._run, self._prefix = p2p, identity, run, prefix
        self._path, self._traffic = path, traffic
        self._ledger = Ledger()
        self.tally, self.purse = load(path, run, identity.peer_id)
        self._bytes_before = self.tally.bytes_up, self.tally.bytes_down
        self._last_seen: dict[str, int] = {}  # peer id -> the newest round that we shared
        self._windows: set[int] = set()  # that there may be more receipts to have for
        self._asked_at = time.monotonic()

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    def note(self, round: int, weights: Mapping[str, float]) -> None:
        """A round has come about with these contributions, by peer id, in tokens."""
        self._ledger.note(round, weights)
        own = weights.get(self._identity.peer_id)
        if own is None:
            return
        self.tally.rounds += 1
        self.tally.tokens += int(own)
        others = [peer for peer in weights if peer != self._identity.peer_id]
        if not others:
            return
        self._last_seen.update(dict.fromkeys(others, round))
        self._windows.add(round // WINDOW)
        if time.monotonic() - self._asked_at > PERIOD_S:
            self._asked_at = time.monotonic()
            in_background(self.collect())

    async def collect(self) -> None:
        """Ask those that were with us last, and keep what they give. Bounded by ANSWER_S."""
        newest = max(self._windows, default=0)
        peers = sorted(self._last_seen, key=lambda peer: (-self._last_seen[peer], peer))[:MAX_SIGNERS]
        try:
            await asyncio.gather(*(self._ask(peer, window) for window in self._windows for peer in peers))
        finally:
            self.keep()
        self._windows = {window for window in self._windows if window == newest}
        self._last_seen = {peer: self._last_seen[peer] for peer in peers}

    def keep(self) -> None:
        """Write everything down. A disk that refuses costs the receipts, not the training."""
        up, down = self._traffic()
        self.tally.bytes_up, self.tally.bytes_down = self._bytes_before[0] + up, self._bytes_before[1] + down
        try:
            save(self._path, self._run, self._identity.peer_id, self.tally, self.purse)
        except OSError as error:
            logging.warning("the receipts of this worker cannot be kept: %s", error)

    async def _ask(self, peer: str, window: int) -> None:
        try:
            stub = self.get_stub(self._p2p, PeerID.from_base58(peer), namespace=self._prefix)
            reply = await stub.rpc_receipt(BytesValue(value=pack_question(window)), timeout=ANSWER_S)
            rounds, tokens, signature = unpack_answer(reply.value)
        except Exception as error:  # hivemind and its daemon raise many types when a peer is gone
            logging.debug("no receipt of %s: %r", peer, error)
            return
        receipt = Receipt(self._run, self._identity.peer_id, peer, window, rounds, tokens, signature)
        if receipt.is_genuine:
            self.purse.add(receipt)

    async def rpc_receipt(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """Another member asks for what we saw of it, and of nobody else, in a window."""
        peer, window = str(context.remote_id), unpack_question(request.value)
        seen = self._ledger.of(peer, window)
        if seen is None:
            raise ValueError("nothing was seen of you")
        receipt = sign(self._identity, self._run, peer, window, *seen)
        return BytesValue(value=msgpack.packb([receipt.rounds, receipt.tokens, receipt.signature]))


def pack_question(window: int) -> bytes:
    packed = msgpack.packb(window)
    assert isinstance(packed, bytes)
    return packed


def unpack_question(blob: bytes) -> int:
    """Raises ValueError for what is none."""
    window = msgpack.unpackb(blob) if len(blob) <= 9 else None
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window < 2**40:
        raise ValueError("not a question for a receipt")
    return window


def unpack_answer(blob: bytes) -> tuple[int, int, bytes]:
    """(rounds, tokens, signature); its values are judged by the signature. Raises ValueError for what is none."""
    values: Any = msgpack.unpackb(blob) if len(blob) <= 128 else None
    rounds, tokens, signature = values
    if type(rounds) is not int or type(tokens) is not int or not isinstance(signature, bytes):
        raise ValueError("not a receipt")
    return rounds, tokens, signature
