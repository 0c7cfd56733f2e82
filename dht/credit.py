"""Credit: the receipts that members of a round give each other, and the statement that a worker makes of its own.

A receipt says: in these rounds of the run I saw that peer's contribution counted, of so many tokens in all. Rounds are
taken together in windows of 64, so that a signer's newest receipt takes the place of its older ones, and a run of ten
thousand rounds fits into some tens of kilobytes. Checking it needs no network: a peer id *is* its owner's public key.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import base58

from dtrain.dht.identity import Identity, verify

WINDOW = 64  # rounds
KEPT_WINDOWS = 3  # that a signer can still sign for
MAX_PEERS = 4096  # that a signer remembers in a window
MAX_SIGNERS = 4  # whose receipts a worker keeps for a window
MAX_TOKENS = 2**62
_DOMAIN = b"dtrain receipt 1\n"


@dataclass(frozen=True)
class Receipt:
    """What `signer` saw of `peer` (both peer ids) in one window of the run whose manifest has the hash `run`."""

    run: bytes
    peer: str
    signer: str
    window: int
    rounds: int
    """Bit i stands for round 64 * window + i."""
    tokens: int
    signature: bytes

    @property
    def is_genuine(self) -> bool:
        """Whether its signer signed just this, and is not its bearer."""
        if self.signer == self.peer or not 0 < self.rounds < 2**WINDOW or not 0 <= self.tokens < MAX_TOKENS:
            return False
        try:
            signer = base58.b58decode(self.signer)
            message = _message(self.run, self.peer, self.window, self.rounds, self.tokens)
        except (ValueError, struct.error):
            return False
        return verify(signer, message, self.signature)


def sign(identity: Identity, run: bytes, peer: str, window: int, rounds: int, tokens: int) -> Receipt:
    """A receipt of our own for that peer."""
    signature = identity.key.sign(_message(run, peer, window, rounds, tokens))
    return Receipt(run, peer, identity.peer_id, window, rounds, tokens, signature)


def _message(run: bytes, peer: str, window: int, rounds: int, tokens: int) -> bytes:
    return _DOMAIN + run + base58.b58decode(peer) + struct.pack("<QQQ", window, rounds, tokens)


class Ledger:
    """What a member has seen of the others, a few windows back; of this it signs."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[str, tuple[int, int]]] = {}  # window -> peer id -> (rounds, tokens)

    def note(self, round: int, weights: Mapping[str, float]) -> None:
        """A round has come about in which these peers' contributions count, by tokens."""
        window, bit = round // WINDOW, 1 << round % WINDOW
        page = self._seen.setdefault(window, {})
        for peer, weight in weights.items():
            rounds, tokens = page.get(peer, (0, 0))
            if not rounds & bit and (rounds or len(page) < MAX_PEERS):
                page[peer] = rounds | bit, tokens + int(weight)
        while len(self._seen) > KEPT_WINDOWS:
            del self._seen[min(self._seen)]

    def of(self, peer: str, window: int) -> tuple[int, int] | None:
        """(rounds, tokens) that we saw of a peer in a window."""
        return self._seen.get(window, {}).get(peer)


class Purse:
    """The receipts that a worker holds: of each window, those of the few signers that saw the most."""

    def __init__(self, receipts: Iterable[Receipt] = ()) -> None:
        self._pages: defaultdict[int, dict[str, Receipt]] = defaultdict(dict)
        for receipt in receipts:
            self.add(receipt)

    def add(self, receipt: Receipt) -> None:
        """Keep a genuine receipt, if it says more than what is here."""
        page = self._pages[receipt.window]
        if receipt.signer in page and page[receipt.signer].tokens >= receipt.tokens:
            return
        page[receipt.signer] = receipt
        if len(page) > MAX_SIGNERS:
            del page[min(page, key=lambda signer: (page[signer].tokens, signer))]

    @property
    def receipts(self) -> list[Receipt]:
        return [page[signer] for _, page in sorted(self._pages.items()) for signer in sorted(page)]

    def totals(self) -> tuple[int, int, int]:
        """(rounds, tokens, signers) that the receipts show.

        A round counts once, however many saw it. Tokens are those of receipts that share no round, the largest first.
        """
        rounds = tokens = 0
        signers = set()
        for page in self._pages.values():
            union = taken = 0
            for receipt in sorted(page.values(), key=lambda r: (-r.tokens, r.signer)):
                union |= receipt.rounds
                signers.add(receipt.signer)
                if not receipt.rounds & taken:
                    taken |= receipt.rounds
                    tokens += receipt.tokens
            rounds += union.bit_count()
        return rounds, tokens, len(signers)
