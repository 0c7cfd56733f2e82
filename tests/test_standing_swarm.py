"""Standing among real network processes: what members say of each other travels, and all act on it alike."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from swarm_tools import eventually

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.compression.standing import FIRST_SHARE, PROBATION
from dtrain.dht.exchange import DhtExchange
from dtrain.dht.outcome import Outcome
from dtrain.dht.peer_settings import PeerSettings
from dtrain.dht.tokens import reason_text
from dtrain.trainer.exchange import DONE, STALE, Exchange

pytestmark = pytest.mark.xdist_group("processes")

RUN, BASE, WEIGHT, LONG_S = bytes(32), bytes(32), 100.0, 60.0
SPEC, SHAPES = CodecSpec(chunk=64, k=32, value_bits=8), [("t", (64 * 32 * 8,))]
CODEC = Codec(SPEC, SHAPES)
DIRECTION = torch.randn(SHAPES[0][1], generator=torch.Generator().manual_seed(1))
OPEN = {"mode": "open", "organizer": b"", "allowed": [], "pass": b"", "ledger": "", "revocations": b""}


@contextmanager
def member(folder: Path, through: list[str]) -> Iterator[DhtExchange]:
    folder.mkdir()
    settings = PeerSettings(folder / "identity.key", "127.0.0.1", initial_peers=tuple(through))
    exchange = DhtExchange(settings)
    try:
        exchange.connect()
        exchange.open_run(
            run_id="standing",
            manifest=b"manifest",
            manifest_hash=RUN,
            codec=SPEC.to_dict(),
            shapes=SHAPES,
            matchmaking_s=LONG_S,
            round_timeout_s=LONG_S,
            sender_timeout_s=LONG_S,
            exact_up_to=1,
            max_weight=1e9,
            screens=True,
            max_share=0.34,
            heartbeat_s=0.5,
            heartbeat_ttl_s=LONG_S,
            admission=OPEN,
        )
        yield exchange
    finally:
        exchange.close()


def payload(round: int, seed: int) -> bytes:
    noise = torch.randn(SHAPES[0][1], generator=torch.Generator().manual_seed(100 * round + seed))
    return CODEC.encode([DIRECTION + noise], CODEC.error_feedback(), decay=1.0, run=RUN[:8], round=round)


def meet(members: list[DhtExchange], round: int) -> list[Outcome]:
    """One round of all of them, once they see each other at it."""
    for exchange in members:
        exchange.announce({"round": round, "digest": BASE.hex(), "work": 0.0, "state": "training"})
    for exchange in members:
        eventually(lambda e=exchange: len(e.swarm()) >= len(members) - 1, "they do not see each other")  # type: ignore[misc]
    with ThreadPoolExecutor(len(members)) as pool:
        rounds = [
            pool.submit(
                exchange.run_round,
                round=round,
                base_digest=BASE,
                payload=payload(round, seed),
                weight=WEIGHT,
            )
            for seed, exchange in enumerate(members)
        ]
        return [made.result() for made in rounds]


def weights(outcome: Outcome) -> list[dict[str, float]]:
    """What each sum counts of the members."""
    return [
        {outcome.members[i]: weight for i, weight in CODEC.contributors(aggregate)}
        for aggregate in outcome.aggregates
    ]


def test_a_newcomer_is_on_probation_and_who_is_accused_is_put_out(tmp_path: Path) -> None:
    """Five have done some rounds when a sixth comes. Three of the six accuse it: it is out, it hears why, the others
    go on; before, it shows them what it has sent."""
    with ExitStack() as stack:
        members = [stack.enter_context(member(tmp_path / "0", []))]
        members += [stack.enter_context(member(tmp_path / str(i), members[0].addresses)) for i in range(1, 5)]
        for round in range(PROBATION):
            outcomes = meet(members, round)
            assert {outcome.verdict for outcome in outcomes} == {DONE}
            assert all(set(found.values()) == {WEIGHT} for found in weights(outcomes[0]))

        newcomer = stack.enter_context(member(tmp_path / "5", members[0].addresses))
        outcomes = meet([*members, newcomer], PROBATION)
        assert {outcome.verdict for outcome in outcomes} == {DONE}
        assert len({tuple(outcome.aggregates) for outcome in outcomes}) == 1
        for found in weights(outcomes[0]):
            assert found.pop(newcomer.peer_id) == FIRST_SHARE * WEIGHT
            assert set(found.values()) == {WEIGHT}

        seam: Exchange = members[0]
        assert seam.fetch_contribution(newcomer.peer_id, PROBATION) == payload(PROBATION, 5)
        assert seam.fetch_contribution(newcomer.peer_id, PROBATION) is None  # once
        assert seam.fetch_contribution(newcomer.peer_id, 0) is None  # it was not there

        for accuser in members[:3]:
            accuser.accuse(newcomer.peer_id, "wrong-data")
        outcomes = meet([*members, newcomer], PROBATION + 1)
        words = reason_text("put-out-accused")
        assert outcomes[5].verdict == STALE and words in outcomes[5].problem
        assert {outcome.verdict for outcome in outcomes[:5]} == {DONE}
        assert all(newcomer.peer_id not in outcome.members for outcome in outcomes[:5])
        assert sum(words in outcome.problem for outcome in outcomes[:5]) == 1  # one of them says so
        for exchange in members:
            eventually(lambda e=exchange: e.refusals().get("put-out-accused"), "it is not counted")  # type: ignore[misc]
            eventually(lambda e=exchange: len(e.swarm()) == 4, "it is still seen")  # type: ignore[misc]
        eventually(lambda: newcomer.refused == words, "it is not told")
