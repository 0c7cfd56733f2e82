"""Hostile members of a simulated swarm: what each kind of attack does. SECURITY.md says what is done against them.

They hold to the protocol but for their attack: they train, meet in rounds and send what the codec allows, made again
from their own update; all attackers of a run do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dtrain.compression import wire
from dtrain.compression.codec import Codec
from dtrain.experiments.memory import MemoryExchange, MemorySwarm
from dtrain.experiments.memory_round import LEAVES_OUT, Contribution, Faults
from dtrain.trainer.data import Corpus

WORK_CLAIMED = 1e15  # tokens
TOKENS_CLAIMED = 1000.0  # times those that were trained


def _noise(update: Tensor, draw: torch.Generator) -> Tensor:
    """As long as the update, in a random direction, with as many values."""
    noise = torch.randn(update.shape, generator=draw) * (update != 0)
    factor = float(update.norm()) / max(float(noise.norm()), 1e-30)
    return noise * factor


UPDATES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "sign-flip": lambda update, draw: -update,
    "hundredfold": lambda update, draw: 100.0 * update,
    "random": _noise,
    "zero": lambda update, draw: torch.zeros_like(update),
}
"""Attacks on the update itself."""

REDUCERS = {"reducer-turned": "turned", "reducer-slanted": "slanted", "reducer-leaves-out": LEAVES_OUT}
"""Attacks on the sums that the attackers make, as the reducers that they are: kinds of `memory_round.Faults.sums`."""

OTHERS = ("boast", "not-finite", "replay", "copy", "wrong-data", "tokens", "slow-loris")

ATTACKS = (*UPDATES, *OTHERS, *REDUCERS)


class Boaster(MemoryExchange):
    """Says that its theta has far more work in it than the others', and that it is a round ahead of them."""

    def announce(self, status: Mapping[str, object]) -> None:
        """See `Exchange`."""
        claims = {"work": WORK_CLAIMED, "training_round": int(str(status.get("training_round", 0))) + 1}
        super().announce({**status, **claims})


class Attack:
    """What the attackers of one run do; `kind` is one of ATTACKS, or "" with no attackers."""

    def __init__(
        self,
        codec: Codec,
        run: bytes,
        kind: str,
        attackers: Collection[str],
        seed: int,
        *,
        one_network: bool = False,
    ):
        self._codec, self._run, self._kind, self.attackers = codec, run, kind, frozenset(attackers)
        self._one_network = one_network
        self._draw = torch.Generator().manual_seed(seed)
        self._first: dict[str, bytes] = {}  # payload of each attacker's first round

    @property
    def faults(self) -> Faults:
        """What the reducers do, and who is late."""
        if self._kind in REDUCERS:
            return Faults(sums=dict.fromkeys(self.attackers, REDUCERS[self._kind]))
        return Faults(late=self.attackers if self._kind == "slow-loris" else frozenset())

    def network_of(self, name: str) -> bytes:
        """Where a worker is; honest ones have a network each."""
        return b"attackers" if self._one_network and name in self.attackers else name.encode()

    def exchange_of(self, swarm: MemorySwarm, name: str) -> MemoryExchange:
        """A worker's way into the swarm."""
        boasts = self._kind == "boast" and name in self.attackers
        return Boaster(swarm, name) if boasts else MemoryExchange(swarm, name)

    def data_of(self, name: str, corpus: Corpus) -> Corpus:
        """What a worker trains on: with wrong data, text whose letters are in no order."""
        if self._kind != "wrong-data" or name not in self.attackers:
            return corpus
        order = np.random.default_rng(0).permutation(len(corpus.train))
        return replace(corpus, train=np.asarray(corpus.train)[order])

    def tamper(self, round: int, entries: dict[str, Contribution]) -> dict[str, Contribution]:
        """See `memory_swarm.Tamper`."""
        honest = [name for name in entries if name not in self.attackers]
        return {
            name: entry if name not in self.attackers else self._spoiled(round, entry, entries, honest)
            for name, entry in entries.items()
        }

    def _spoiled(
        self, round: int, own: Contribution, entries: dict[str, Contribution], honest: list[str]
    ) -> Contribution:
        if self._kind in UPDATES:
            values = UPDATES[self._kind](self._codec.values(own.payload), self._draw)
            tensors = [torch.zeros(shape) for _, shape in self._codec.shapes]
            made = self._codec.encode(tensors, values, decay=1.0, run=self._run, round=round)
            return replace(own, payload=made)
        if self._kind == "not-finite":
            return replace(own, payload=_not_finite(own.payload))
        if self._kind == "replay":
            first = self._first.setdefault(own.peer_id, own.payload)
            return replace(own, payload=_of_round(first, round))
        if self._kind == "copy" and honest:
            return replace(own, payload=entries[honest[0]].payload)
        if self._kind == "tokens":
            return replace(own, weight=TOKENS_CLAIMED * own.weight)
        return own


def _not_finite(payload: bytes) -> bytes:
    """All bits of the body set: no number in any float format."""
    head, body = wire.open_header(payload, (wire.PAYLOAD,))
    place = head.first_chunk, head.num_chunks
    return wire.seal(head.kind, head.codec_id, head.run, head.round, place, [b"\xff" * len(body)])


def _of_round(payload: bytes, round: int) -> bytes:
    """The same payload with another round in its header."""
    head, body = wire.open_header(payload, (wire.PAYLOAD,))
    return wire.seal(head.kind, head.codec_id, head.run, round, (head.first_chunk, head.num_chunks), [body])
