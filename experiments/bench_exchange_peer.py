"""One peer of the exchange benchmark, in a process of its own: reads a command per line, writes an answer per line.

Commands and answers are JSON. The first line written says who and where the peer is; the end of stdin ends it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.compression.warm_up import warm_up
from dtrain.experiments.bench_exchange_report import IMPLEMENTATIONS, PeerRound
from dtrain.trainer.config import ExchangeConfig
from dtrain.trainer.exchange import DONE, Outcome
from dtrain.trainer.outer import OuterState

RUN_ID = "bench-exchange"
TOKENS = 1000.0  # every peer's weight; a round adds as many to the history's work
SEE_EACH_OTHER_S = 90.0
ROUND_TIMEOUT_S = 60.0
SETTLE_S = 0.5  # acknowledgements and goodbyes of a round are counted with it
DECAY = 0.95  # of the error feedback, as by default


class Peer(Protocol):
    """One implementation's peer."""

    peer_id: str
    addresses: list[str]

    def meet(self, peer_ids: Sequence[str]) -> None:
        """All peers are up; these are their ids."""

    def exchange(self, round: int, delta: Tensor) -> tuple[PeerRound, Tensor]:
        """What this peer's part in the round took, without bytes and digest, and the average it came to."""

    def traffic(self) -> tuple[int, int]: ...

    def close(self) -> None: ...


class _Sparse:
    """The codec's half of the two peers that send payloads."""

    def __init__(self, args: argparse.Namespace):
        self.spec = CodecSpec(k=args.k)
        self.terms_hash = hashlib.sha256(json.dumps(self.spec.to_dict()).encode()).digest()
        self.tag = self.terms_hash[:8]  # names the run in every payload
        warm_up(self.spec)
        self.codec = Codec(self.spec, [("delta", (args.params,))])
        self._feedback = self.codec.error_feedback()
        self._average = [torch.zeros(args.params)]

    def encode(self, round: int, delta: Tensor) -> bytes:
        return self.codec.encode([delta], self._feedback, decay=DECAY, run=self.tag, round=round)

    def decode(self, aggregates: Sequence[bytes]) -> Tensor:
        return self.codec.decode(aggregates, out=self._average)[0]


class DtrainPeer(_Sparse):
    """Our exchange with a run's default terms, as a worker uses it: heartbeats, matchmaking, spans."""

    def __init__(self, args: argparse.Namespace):
        from dtrain.dht.exchange import DhtExchange
        from dtrain.dht.peer_settings import PeerSettings

        self._exchange = DhtExchange(
            PeerSettings(args.folder / "identity.key", "127.0.0.1", initial_peers=tuple(args.join))
        )
        super().__init__(args)
        self._exchange.connect()
        terms = ExchangeConfig()
        self._exchange.open_run(
            run_id=RUN_ID,
            manifest=b"",
            manifest_hash=self.terms_hash,
            codec=self.spec.to_dict(),
            shapes=self.codec.shapes,
            matchmaking_s=terms.matchmaking_s,
            round_timeout_s=terms.round_timeout_s,
            sender_timeout_s=terms.sender_timeout_s,
            exact_up_to=args.exact_up_to,
            max_weight=2 * TOKENS,
            heartbeat_s=terms.heartbeat_s,
            heartbeat_ttl_s=terms.heartbeat_ttl_s,
        )
        self.peer_id, self.addresses = self._exchange.peer_id, self._exchange.addresses
        self._rank = args.rank

    def meet(self, peer_ids: Sequence[str]) -> None:
        self._announce(0, "training")
        until = time.monotonic() + SEE_EACH_OTHER_S
        while len(self._exchange.swarm()) < len(peer_ids) - 1:
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self._exchange.swarm())} of {len(peer_ids) - 1} others are visible")
            time.sleep(0.1)

    def exchange(self, round: int, delta: Tensor) -> tuple[PeerRound, Tensor]:
        began = time.monotonic()
        self._announce(round, "exchanging")
        payload = self.encode(round, delta)
        outcome = self._exchange.run_round(
            round=round, base_digest=_base(round), payload=payload, weight=TOKENS
        )
        average = self.decode(outcome.aggregates)
        seconds = time.monotonic() - began
        self._announce(round + 1, "training")
        contributors = len(outcome.contributors) if outcome.verdict == DONE else 0
        problem = outcome.problem or ("" if outcome.verdict == DONE else outcome.verdict)
        sent = self._sent(payload, outcome) if outcome.verdict == DONE else None
        times = outcome.wait_s, outcome.exchange_s
        return PeerRound(seconds, len(payload), contributors, *times, problem, sent), average

    def _sent(self, payload: bytes, outcome: Outcome) -> int | None:
        """Bytes of our payload's sections and of our span's aggregate that went to others in a round."""
        others = len(outcome.members) - 1
        if len(outcome.aggregates) <= others:
            return None  # a span got lost: which one is ours is not told
        own = list(outcome.members).index(self.peer_id)
        spans = [self.codec.span_of(aggregate) for aggregate in outcome.aggregates]
        sections = [self.codec.cut(payload, *span) for j, span in enumerate(spans) if j != own]
        return sum(map(len, sections)) + others * len(outcome.aggregates[own])

    def _announce(self, round: int, state: str) -> None:
        self._exchange.announce(
            {  # a worker's own fields, so that a heartbeat has its real size
                "round": round,
                "digest": _base(round).hex(),
                "work": round * TOKENS,
                "state": state,
                "name": f"worker-{self._rank}",
                "device": "cpu",
                "tokens": int(round * TOKENS),
                "tokens_per_s": 1234.5,
                "training_round": round,
                "round_tokens": 0,
                "round_ends_in_s": 0.0,
                "compute_share": 0.9876,
                "loss": 1.2345,
            }
        )

    def traffic(self) -> tuple[int, int]:
        return self._exchange.traffic()

    def close(self) -> None:
        self._exchange.close()


class AllGatherPeer(_Sparse):
    """The same payloads, everybody's to everybody; the group is given, so nothing is spent on finding it."""

    def __init__(self, args: argparse.Namespace):
        from dtrain.dht.baselines import AllGather

        super().__init__(args)
        self._gather = AllGather(args.folder, args.join)
        self.peer_id, self.addresses = self._gather.peer_id, self._gather.addresses
        self._peer_ids: list[str] = []

    def meet(self, peer_ids: Sequence[str]) -> None:
        self._peer_ids = sorted(peer_ids)

    def exchange(self, round: int, delta: Tensor) -> tuple[PeerRound, Tensor]:
        began = time.monotonic()
        payload = self.encode(round, delta)
        place = {"run": self.tag, "round": round, "first_chunk": 0, "num_chunks": self.codec.num_chunks}
        asked = time.monotonic()
        payloads = self._gather.gather(
            round,
            payload,
            self._peer_ids,
            max_bytes=self.codec.max_payload_bytes(0, self.codec.num_chunks),
            timeout_s=ROUND_TIMEOUT_S,
        )
        exchange_s = time.monotonic() - asked
        for received in payloads:
            self.codec.check(received, **place)  # type: ignore[arg-type]
        union = self.codec.reduce([(i, TOKENS, p) for i, p in enumerate(payloads)], **place)  # type: ignore[arg-type]
        average = self.decode([union])
        seconds = time.monotonic() - began
        sent = (len(payloads) - 1) * len(payload)
        return PeerRound(seconds, len(payload), len(payloads), None, exchange_s, "", sent), average

    def traffic(self) -> tuple[int, int]:
        return self._gather.traffic()

    def close(self) -> None:
        self._gather.close()


class StockPeer:
    """hivemind's own averager; every tensor travels dense, in fp16."""

    def __init__(self, args: argparse.Namespace):
        from dtrain.dht.baselines import StockAverager

        self._averager = StockAverager(args.folder, args.join, num_params=args.params, num_peers=args.peers)
        self.peer_id, self.addresses = self._averager.peer_id, self._averager.addresses

    def meet(self, peer_ids: Sequence[str]) -> None:
        pass  # hivemind's matchmaking finds the others in the DHT

    def exchange(self, round: int, delta: Tensor) -> tuple[PeerRound, Tensor]:
        began = time.monotonic()
        average, members = self._averager.average(delta, ROUND_TIMEOUT_S)
        seconds = time.monotonic() - began
        problem = "" if members else "no group"
        return PeerRound(seconds, 2 * delta.numel(), members, None, None, problem), average

    def traffic(self) -> tuple[int, int]:
        return self._averager.traffic()

    def close(self) -> None:
        self._averager.close()


PEERS: dict[str, Callable[[argparse.Namespace], Peer]] = {
    "dtrain": DtrainPeer,
    "hivemind-float16": StockPeer,
    "all-gather": AllGatherPeer,
}
assert tuple(PEERS) == IMPLEMENTATIONS


def serve(peer: Peer, args: argparse.Namespace, commands: TextIO, answers: TextIO) -> None:
    """Carry out commands until there are no more."""

    def say(**answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    def delta(round: int) -> Tensor:
        """Equal for all implementations: what this peer has to contribute."""
        generator = torch.Generator().manual_seed(1000 * round + args.rank)
        return torch.randn(args.params, generator=generator)

    say(peer_id=peer.peer_id, addresses=peer.addresses)
    values = delta(0)
    for line in commands:
        command: dict[str, Any] = json.loads(line)
        if command["do"] == "meet":
            peer.meet(command["peer_ids"])
            say()
        elif command["do"] == "traffic":
            say(traffic=peer.traffic())
        elif command["do"] == "round":
            up, down = peer.traffic()
            done, average = peer.exchange(command["round"], values)
            time.sleep(SETTLE_S)
            up, down = peer.traffic()[0] - up, peer.traffic()[1] - down
            digest = OuterState(average).digest().hex()
            values = delta(command["round"] + 1)
            say(**asdict(replace(done, up_bytes=up, down_bytes=down, digest=digest)))


def _base(round: int) -> bytes:
    """Stands for the digest of the theta that a round begins with."""
    return hashlib.sha256(f"{RUN_ID} {round}".encode()).digest()


def main() -> int:
    """Exit code for the shell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("implementation", choices=tuple(PEERS))
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--params", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--exact-up-to", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--join", metavar="ADDRESS", nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    peer = PEERS[args.implementation](args)
    try:
        serve(peer, args, sys.stdin, answers)
    finally:
        peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
