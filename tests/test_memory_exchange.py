"""The in-memory swarm: who meets in a round, what each member gets, and what faults cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.experiments.memory import Faults, MemoryExchange, MemorySwarm
from dtrain.trainer.exchange import ALONE, DONE, NO_GROUP, STALE, Exchange, Outcome
from dtrain.trainer.feedback import ErrorFeedback
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.outer import OuterState
from dtrain.trainer.strategies import make_strategy

SHAPES = [("matrix", (256, 128)), ("vector", (300,))]
BASE, OTHER = b"b" * 32, b"o" * 32
DEADLINE_S = 60.0


def terms(**changes: object) -> Manifest:
    """A manifest whose swarm waits very long, so that a test that needs no waiting proves it by ending."""
    settings: dict[str, object] = {"matchmaking_s": DEADLINE_S, "heartbeat_s": 0.05, "heartbeat_ttl_s": 0.3}
    overrides: dict[str, object] = {f"exchange.{key}": v for key, v in (settings | changes).items()}
    overrides["codec.aggregate_k"] = 0  # residuals of such sums empty soon
    return preset_manifest("test", overrides=overrides)


MANIFEST = terms()
CODEC = Codec(MANIFEST.codec, SHAPES)


class Lab:
    """A swarm and its workers, all of them standing at round 1."""

    def __init__(self, names: str, manifest: Manifest = MANIFEST, faults: Faults | None = None) -> None:
        self.manifest = manifest
        self.swarm = MemorySwarm(manifest, CODEC, faults)
        self.exchanges = {name: MemoryExchange(self.swarm, name) for name in names}
        for name in names:
            self.announce(name)

    def announce(self, name: str, round: int = 1, state: str = "training", **more: object) -> None:
        self.exchanges[name].announce({"round": round, "state": state, "name": name, **more})

    def payload(self, name: str, round: int = 1, seed: int = 0) -> bytes:
        generator = torch.Generator().manual_seed(seed * 1000 + ord(name))
        delta = [torch.randn(shape, generator=generator) for _, shape in SHAPES]
        feedback = CODEC.error_feedback()
        return CODEC.encode(delta, feedback, decay=1.0, run=self.manifest.run_tag, round=round)

    def meet(
        self,
        names: str,
        round: int = 1,
        digests: Mapping[str, bytes] | None = None,
        weights: Mapping[str, float] | None = None,
        payloads: Mapping[str, bytes] | None = None,
    ) -> dict[str, Outcome]:
        """All of `names` call run_round at once, each in its own thread."""

        def call(name: str) -> Outcome:
            return self.exchanges[name].run_round(
                round=round,
                base_digest=(digests or {}).get(name, BASE),
                payload=(payloads or {}).get(name) or self.payload(name, round),
                weight=(weights or {}).get(name, 1.0),
            )

        with ThreadPoolExecutor(len(names)) as pool:
            futures = {name: pool.submit(call, name) for name in names}
            return {name: future.result(timeout=DEADLINE_S) for name, future in futures.items()}


def mean_of(lab: Lab, names: str, weights: Sequence[float]) -> list[torch.Tensor]:
    """What the payloads of `names` hold, averaged without any exchange."""
    sections = [(i, w, lab.payload(n)) for i, (n, w) in enumerate(zip(names, weights, strict=True))]
    whole = {"first_chunk": 0, "num_chunks": CODEC.num_chunks}
    return CODEC.decode([CODEC.reduce(sections, run=lab.manifest.run_tag, round=1, **whole)])


def equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_all_members_get_the_same_bytes_and_they_are_the_mean() -> None:
    """One theta: every member gets equal aggregates, and they decode to the weighted mean of all payloads."""
    lab = Lab("abc")
    outcomes = lab.meet("cab", weights={"a": 1.0, "b": 2.0, "c": 3.0})
    assert {outcome.verdict for outcome in outcomes.values()} == {DONE}
    assert len({tuple(outcome.aggregates) for outcome in outcomes.values()}) == 1
    outcome = outcomes["b"]
    assert list(outcome.members) == list(outcome.contributors) == ["a", "b", "c"]
    assert outcome.base_digest == BASE
    assert len(outcome.aggregates) == 3
    assert not outcome.undelivered
    assert not outcome.problem
    assert equal(CODEC.decode(outcome.aggregates), mean_of(lab, "abc", [1.0, 2.0, 3.0]))


def test_a_worker_that_is_alone_gets_its_own_contribution() -> None:
    """One volunteer can begin a run; nobody is waited for."""
    lab = Lab("a")
    outcome = lab.meet("a")["a"]
    assert outcome.verdict == ALONE
    assert list(outcome.contributors) == ["a"]
    assert equal(CODEC.decode(outcome.aggregates), mean_of(lab, "a", [1.0]))


@pytest.mark.parametrize("state", ["joining", "finished", "leaving", "stopped"])
def test_absent_workers_are_not_waited_for(state: str) -> None:
    """A newcomer that still downloads theta holds nobody up, nor does one that leaves."""
    lab = Lab("ab")
    lab.announce("b", state=state)
    assert lab.meet("a")["a"].verdict == ALONE


def test_a_worker_that_closed_is_not_waited_for() -> None:
    """Leaving takes effect at once."""
    lab = Lab("ab")
    lab.exchanges["b"].close()
    assert lab.meet("a")["a"].verdict == ALONE


def test_a_dead_worker_is_waited_for_only_until_its_heartbeat_runs_out() -> None:
    """A silent death costs the others no more than heartbeat_ttl_s of waiting."""
    lab = Lab("abc")
    lab.swarm.kill("c")
    outcomes = lab.meet("ab")
    assert {outcome.verdict for outcome in outcomes.values()} == {DONE}
    assert list(outcomes["a"].contributors) == ["a", "b"]


def test_a_majority_goes_on_without_a_worker_that_does_not_come() -> None:
    """After matchmaking_s the round begins with those who are there."""
    lab = Lab("abc", terms(matchmaking_s=0.2))
    assert list(lab.meet("ab")["a"].members) == ["a", "b"]


def test_half_of_a_swarm_never_goes_on_alone() -> None:
    """Without a majority there is no round: otherwise two halves could both go on, to different thetas."""
    lab = Lab("ab", terms(matchmaking_s=0.2))
    outcome = lab.meet("a")["a"]
    assert outcome.verdict == NO_GROUP
    assert not outcome.aggregates
    assert {o.verdict for o in lab.meet("ab").values()} == {DONE}  # and the next try finds everybody


def test_round_0_begins_when_enough_workers_have_come() -> None:
    """start_workers is honoured before round 0, and not asked for again when somebody leaves."""
    lab = Lab("abc", terms(start_workers=3, matchmaking_s=0.2))
    for name in "ab":
        lab.announce(name, round=0)
    lab.announce("c", round=0, state="joining")
    assert {o.verdict for o in lab.meet("ab", round=0).values()} == {NO_GROUP}
    lab.announce("c", round=0)
    assert {o.verdict for o in lab.meet("ab", round=0).values()} == {DONE}


def test_the_theta_of_the_majority_wins() -> None:
    """Who stands on another theta than most learns it, and its payload is in no aggregate."""
    lab = Lab("abc")
    outcomes = lab.meet("abc", digests={"a": OTHER})
    assert outcomes["a"].verdict == STALE
    assert not outcomes["a"].aggregates
    assert list(outcomes["b"].members) == ["b", "c"]


@pytest.mark.parametrize(("weights", "stale"), [({"a": 5.0}, "b"), ({"b": 5.0}, "a"), ({}, "b")])
def test_ties_between_thetas_go_to_more_weight_then_to_the_smaller_digest(
    weights: dict[str, float], stale: str
) -> None:
    """Every member comes to the same answer."""
    outcomes = Lab("ab").meet("ab", digests={"b": OTHER}, weights=weights)
    assert outcomes[stale].verdict == STALE
    assert [name for name, outcome in outcomes.items() if outcome.verdict == DONE] == sorted(
        {"a", "b"} - {stale}
    )


def test_a_worker_that_is_behind_is_stale_at_once() -> None:
    """It must catch up before it contributes, and is not kept waiting."""
    lab = Lab("abc")
    lab.meet("abc")
    for name in "ab":
        lab.announce(name, round=2)
    assert lab.meet("c", round=1)["c"].verdict == STALE


def test_a_fast_worker_waits_for_one_that_has_just_finished_the_round() -> None:
    """Members of a round are expected at the next one even before they have announced it."""
    lab = Lab("ab")
    lab.meet("ab")
    assert {outcome.verdict for outcome in lab.meet("ab", round=2).values()} == {DONE}


def test_a_lost_section_costs_its_sender_that_span_only() -> None:
    """The others' sections of the span arrive; the sender learns what to put back into its feedback."""
    lab = Lab("abc", faults=Faults(sections=frozenset({(1, "c", "a")})))
    outcomes = lab.meet("abc")
    spans = CODEC.spans([1.0, 1.0, 1.0])
    assert list(outcomes["c"].undelivered) == [spans[0]]
    assert "c" in outcomes["c"].problem
    assert not outcomes["a"].undelivered
    assert not outcomes["b"].undelivered
    assert list(outcomes["a"].contributors) == ["a", "b", "c"]
    assert [CODEC.contributors(a) for a in outcomes["a"].aggregates] == [
        ((0, 1.0), (1, 1.0)),
        ((0, 1.0), (1, 1.0), (2, 1.0)),
        ((0, 1.0), (1, 1.0), (2, 1.0)),
    ]


def test_a_lost_span_is_lost_for_all_alike_and_given_back_to_all() -> None:
    """Thetas stay equal, and nobody's work is gone."""
    lab = Lab("abc", faults=Faults(spans=frozenset({(1, "b")})))
    outcomes = lab.meet("abc")
    assert len({tuple(outcome.aggregates) for outcome in outcomes.values()}) == 1
    assert len(outcomes["a"].aggregates) == 2
    span = CODEC.spans([1.0, 1.0, 1.0])[1]
    assert all(list(outcome.undelivered) == [span] for outcome in outcomes.values())


@pytest.mark.parametrize("bad", ["garbage", "other round", "other run"])
def test_a_bad_payload_is_dropped_and_named(bad: str) -> None:
    """What breaks the format is in no aggregate; the round goes on without it."""
    lab = Lab("abc")
    foreign = Lab("b", terms(matchmaking_s=1.0))
    payloads = {
        "garbage": b"no payload",
        "other round": lab.payload("b", round=7),
        "other run": foreign.payload("b"),
    }
    outcomes = lab.meet("abc", payloads={"b": payloads[bad]})
    assert list(outcomes["a"].contributors) == ["a", "c"]
    assert list(outcomes["b"].undelivered) == CODEC.spans([1.0, 1.0, 1.0])
    assert "refused a section of b" in outcomes["b"].problem


def test_large_groups_recompress_and_what_that_leaves_out_comes_later() -> None:
    """Above exact_up_to aggregates are as small as payloads, and the reducers' residuals lose nothing."""
    lab = Lab("abcde", terms(exact_up_to=4))
    total = [torch.zeros(shape) for _, shape in SHAPES]
    expected = [torch.zeros(shape) for _, shape in SHAPES]
    silence = [torch.zeros(shape) for _, shape in SHAPES]
    for round in range(1, 40):
        for name in "abcde":
            lab.announce(name, round=round)
        empty = CODEC.encode(
            silence, CODEC.error_feedback(), decay=1.0, run=lab.manifest.run_tag, round=round
        )
        payloads = {} if round == 1 else dict.fromkeys("abcde", empty)
        outcomes = lab.meet("abcde", round=round, payloads=payloads)
        decoded = CODEC.decode(outcomes["a"].aggregates)
        if round == 1:
            expected = mean_of(lab, "abcde", [1.0] * 5)
            assert not equal(decoded, expected)
            assert sum(map(len, outcomes["a"].aggregates)) < 1.5 * len(lab.payload("a"))
        for have, more in zip(total, decoded, strict=True):
            have += more
    for have, wanted in zip(total, expected, strict=True):
        # Small tensors travel as fp16, so they come to within its rounding.
        assert torch.allclose(have, wanted, atol=1e-2)


def test_a_straggler_gets_a_past_round_as_it_was() -> None:
    """Applying a fetched round gives the theta that its members have."""
    lab = Lab("abc")
    lab.announce("c", state="joining")
    outcomes = lab.meet("ab")
    fetched = lab.exchanges["c"].fetch_round(1)
    assert fetched is not None
    assert tuple(fetched.aggregates) == tuple(outcomes["a"].aggregates)
    assert (fetched.round, fetched.base_digest, list(fetched.members)) == (1, BASE, ["a", "b"])
    assert lab.exchanges["c"].fetch_round(2) is None


@dataclass(frozen=True)
class Note:
    """What a donor says of its state."""

    round: int
    work: float
    digest: bytes = BASE
    hashes: Sequence[bytes] = ()


class Watcher:
    """Notes how a download goes on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def progress(self, have: int, total: int) -> None:
        self.seen.append((have, total))

    def left(self, donor: str, reason: str) -> None:
        raise AssertionError(reason)

    def trouble(self, reason: str) -> None:
        raise AssertionError(reason)


def test_state_comes_from_where_most_work_is_and_broken_donors_are_passed_over() -> None:
    """Most work first; a donor that fails is replaced by the next; with nobody left there is none."""
    lab, watch = Lab("abcd"), Watcher()
    assert lab.exchanges["a"].fetch_state(watch) is None

    def broken(write: Callable[[memoryview], object]) -> Note:
        raise OSError("disk")

    def given(work: float) -> Callable[[Callable[[memoryview], object]], Note]:
        def provider(write: Callable[[memoryview], object]) -> Note:
            write(memoryview(b"x" * 100))
            return Note(4, work)

        return provider

    lab.announce("b", work=10.0)
    lab.announce("c", work=30.0)
    lab.announce("d", work=20.0)
    for name, provider in (("b", given(10.0)), ("c", broken), ("d", given(20.0))):
        lab.exchanges[name].serve_state(provider)
    state = lab.exchanges["a"].fetch_state(watch)
    assert state is not None
    assert (state.work, bytes(state.blob)) == (20.0, b"x" * 100)
    assert watch.seen[-1] == (100, 100)
    assert lab.exchanges["a"].traffic() == (0, 100)
    assert lab.exchanges["d"].traffic() == (100, 0)


def test_every_byte_sent_is_received() -> None:
    """The two sums of the swarm's traffic are equal, and a member sends about its payload and its span's
    copies.
    """
    lab = Lab("abc")
    outcomes = lab.meet("abc")
    traffic = [lab.exchanges[name].traffic() for name in "abc"]
    assert sum(up for up, _ in traffic) == sum(down for _, down in traffic)
    aggregates = sum(len(aggregate) for aggregate in outcomes["a"].aggregates)
    assert sum(up for up, _ in traffic) > 2 * aggregates


def test_workers_see_one_another() -> None:
    """Everybody but oneself, with what each said last; the dead disappear."""
    lab = Lab("abc")
    lab.announce("b", round=4, state="waiting")
    views = {view.peer_id: view for view in lab.exchanges["a"].swarm()}
    assert sorted(views) == ["b", "c"]
    assert (views["b"].status["round"], views["b"].status["state"]) == (4, "waiting")
    lab.exchanges["c"].close()
    assert [view.peer_id for view in lab.exchanges["a"].swarm()] == ["b"]


def test_the_exchange_fits_the_seam() -> None:
    """What the worker loop is written against; mypy checks the rest of the match on this line."""
    exchange: Exchange = Lab("a").exchanges["a"]
    assert exchange.peer_id == "a"


def run_rounds(num_rounds: int, order: str) -> set[bytes]:
    """Digests of the thetas that three workers hold after some rounds of made-up training."""
    lab = Lab("abc")

    def work(name: str) -> bytes:
        strategy, feedback = make_strategy(lab.manifest, SHAPES), ErrorFeedback(lab.manifest, CODEC)
        exchange = lab.exchanges[name]
        flat = torch.zeros(CODEC.num_params)
        sizes = [torch.Size(shape).numel() for _, shape in SHAPES]
        theta = [piece.view(shape) for piece, (_, shape) in zip(flat.split(sizes), SHAPES, strict=True)]
        state = OuterState(flat, round=1)
        for _ in range(num_rounds):
            generator = torch.Generator().manual_seed(state.round * 1000 + ord(name))
            delta = [torch.randn(tensor.shape, generator=generator) for tensor in theta]
            payload = feedback.encode(delta, state.round)
            outcome = exchange.run_round(
                round=state.round, base_digest=state.digest(), payload=payload, weight=1.0
            )
            assert outcome.verdict == DONE
            feedback.give_back(payload, outcome.undelivered)
            strategy.step(theta, CODEC.decode(outcome.aggregates), state.round)
            state.round += 1
            exchange.announce({"round": state.round, "state": "training", "name": name})
        return state.digest()

    with ThreadPoolExecutor(3) as pool:
        return {future.result(timeout=DEADLINE_S) for future in [pool.submit(work, name) for name in order]}


def test_three_workers_end_at_one_theta_and_so_does_every_repetition() -> None:
    """After some rounds all digests are equal, whatever the order in which the threads began."""
    assert len(run_rounds(4, "abc") | run_rounds(4, "cba")) == 1
