"""Standing in the in-memory swarm: what newcomers, accused members and crowds of one network count for there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.standing import FIRST_SHARE, PROBATION, Said
from dtrain.compression.verdicts import OUT_ROUNDS
from dtrain.experiments.memory import MemoryExchange, MemorySwarm
from dtrain.trainer.exchange import DONE, NO_GROUP, STALE, Outcome
from dtrain.trainer.manifest import preset_manifest

# Blocks enough for each of eight members to have a span.
SHAPES = [("matrix", (512, 256))]
MANIFEST = preset_manifest(
    "test", overrides={"exchange.matchmaking_s": 60.0, "exchange.heartbeat_s": 0.05, "codec.value_bits": 8}
)
CODEC = Codec(MANIFEST.codec, SHAPES)
BASE, DEADLINE_S, OLD = b"b" * 32, 60.0, PROBATION + 1
DIRECTION = torch.randn(SHAPES[0][1], generator=torch.Generator().manual_seed(1))


class Lab:
    """Workers that each do one round after the other."""

    def __init__(
        self,
        names: str,
        network_of: Callable[[str], bytes] = str.encode,
        say: Callable[[str, dict[str, Said]], dict[str, Said]] = lambda name, said: said,
    ):
        self.swarm = MemorySwarm(MANIFEST, CODEC, network_of=network_of, say=say)
        self.exchanges: dict[str, MemoryExchange] = {}
        self.round = 0
        self.enter(names)

    def enter(self, names: str) -> None:
        for name in names:
            self.exchanges[name] = MemoryExchange(self.swarm, name)

    def meet(self, payloads: Mapping[str, bytes] | None = None) -> dict[str, Outcome]:
        """One round of everybody, in threads; each brings an update that points roughly one way."""
        for exchange in self.exchanges.values():
            exchange.announce({"round": self.round, "state": "training"})

        def call(name: str) -> Outcome:
            made = (payloads or {}).get(name) or self.payload(name)
            return self.exchanges[name].run_round(
                round=self.round, base_digest=BASE, payload=made, weight=100.0
            )

        with ThreadPoolExecutor(len(self.exchanges)) as pool:
            futures = {name: pool.submit(call, name) for name in self.exchanges}
            outcomes = {name: future.result(timeout=DEADLINE_S) for name, future in futures.items()}
        self.round += 1
        return outcomes

    def payload(self, name: str, factor: float = 1.0) -> bytes:
        noise = torch.randn(
            SHAPES[0][1], generator=torch.Generator().manual_seed(1000 * self.round + ord(name))
        )
        values = factor * (DIRECTION + noise)
        feedback = CODEC.error_feedback()
        return CODEC.encode([values], feedback, decay=1.0, run=MANIFEST.run_tag, round=self.round)


def weights(outcome: Outcome) -> list[dict[str, float]]:
    """What each aggregate counts of the members."""
    return [
        {outcome.members[index]: weight for index, weight in CODEC.contributors(aggregate)}
        for aggregate in outcome.aggregates
    ]


def test_a_newcomers_bad_update_has_a_quarter_of_the_influence_in_its_first_round() -> None:
    """Seven have been there from the beginning; the eighth counts more with every round, whoever looks."""
    lab = Lab("abcdefg")
    for _ in range(OLD):
        outcomes = lab.meet()
        assert all(set(found.values()) == {100.0} for found in weights(outcomes["a"]))
    lab.enter("h")
    for rounds in range(PROBATION + 1):
        # Not seen by the screen: it points with the others, and is as long as it may be.
        outcomes = lab.meet({"h": lab.payload("h", 1.9)})
        expected = 100.0 * (FIRST_SHARE + (1 - FIRST_SHARE) * rounds / PROBATION)
        assert {outcome.verdict for outcome in outcomes.values()} == {DONE}
        for found in weights(outcomes["a"]):
            assert found.pop("h") == pytest.approx(expected)
            assert set(found.values()) == {100.0}


def test_who_is_accused_by_more_than_a_third_is_out_for_all() -> None:
    """Two of eight accuse in vain; with a third one the accused is told so, and is let in no more for a while."""
    lab = Lab("abcdefgh")
    lab.meet()
    for name in "ab":
        lab.exchanges[name].accuse("h", "wrong-data")
    assert lab.meet()["h"].verdict == DONE
    lab.exchanges["c"].accuse("h", "wrong-data")
    outcomes = lab.meet()
    assert outcomes["h"].verdict == STALE and "bad" in outcomes["h"].problem
    assert {outcomes[name].verdict for name in "abcdefg"} == {DONE}
    assert "h" not in outcomes["a"].members
    assert [view.peer_id for view in lab.exchanges["a"].swarm()] == list("bcdefg")
    again = lab.exchanges["h"].run_round(round=3, base_digest=BASE, payload=lab.payload("h"), weight=100.0)
    assert again.verdict == NO_GROUP
    assert lab.swarm._out == {"h": 2 + OUT_ROUNDS}


def test_slander_by_a_third_changes_nothing() -> None:
    """Two of eight accuse everybody, praise themselves and put all others into their own network."""

    def say(name: str, said: dict[str, Said]) -> dict[str, Said]:
        if name not in "gh":
            return said
        return {peer: Said(0, b"gh", True) if peer not in "gh" else Said(PROBATION) for peer in said}

    lab = Lab("abcdefgh", network_of=lambda name: b"gh" if name in "gh" else name.encode(), say=say)
    for _ in range(PROBATION + 2):
        outcomes = lab.meet()
        assert {outcome.verdict for outcome in outcomes.values()} == {DONE}
        assert all(set(found.values()) == {100.0} for found in weights(outcomes["a"]))


def test_a_crowd_of_one_network_counts_for_a_third() -> None:
    """Four of nine are in one house."""
    lab = Lab("abcdefghi", network_of=lambda name: b"house" if name in "fghi" else name.encode())
    for found in weights(lab.meet()["a"]):
        assert sum(found[name] for name in "fghi") / sum(found.values()) == pytest.approx(0.34)


def test_members_show_each_other_what_they_sent() -> None:
    """The payloads of the last two rounds, to members that were in them."""
    lab = Lab("abc")
    sent = []
    for _ in range(3):
        sent.append(lab.payload("b"))
        lab.meet()
    lab.enter("d")
    show = lab.exchanges["a"].fetch_contribution
    assert [show("b", round) for round in range(4)] == [None, sent[1], sent[2], None]
    assert show("nobody", 2) is None
    assert lab.exchanges["d"].fetch_contribution("b", 2) is None
