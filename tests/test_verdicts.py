"""Laws of verdicts: the same for everybody, of many reducers and rounds only, and never against most of a group."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from dtrain.compression import audit, verdicts
from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError
from dtrain.compression.spec import CodecSpec
from dtrain.compression.verdicts import ACCUSED, OUT_ROUNDS, Sentence, Verdicts
from dtrain.experiments.memory_round import Contribution, Faults, GroupReducer

CODEC = Codec(CodecSpec(chunk=64, k=16, value_bits=2), [("t", (64 * 64 * 9,))])
RUN = bytes(8)
NAMES = [f"peer-{i}" for i in range(9)]


def payload(round: int, seed: int) -> bytes:
    values = torch.randn(CODEC.num_params, generator=torch.Generator().manual_seed(seed))
    return CODEC.encode([values], CODEC.error_feedback(), decay=1.0, run=RUN, round=round)


def aggregates(round: int, refused: Mapping[int, Mapping[int, str]]) -> list[bytes]:
    """What nine reducers made of everybody's sections; `refused` {reducer: {member: reason}}."""
    whole, made = payload(round, 0), []
    for reducer, (first, count) in enumerate(CODEC.spans([1.0] * len(NAMES))):
        out = refused.get(reducer, {})
        section = CODEC.cut(whole, first, count)
        made.append(
            CODEC.reduce(
                [(i, 1.0, section) for i in range(len(NAMES)) if i not in out],
                residual=CODEC.residual(first, count),
                refused=out,
                run=RUN,
                round=round,
                first_chunk=first,
                num_chunks=count,
            )
        )
    return made


def by(num_reducers: int, member: int, reason: str) -> dict[int, dict[int, str]]:
    return {reducer: {member: reason} for reducer in range(num_reducers)}


def test_a_verdict_travels_in_the_aggregate_and_counts_for_nothing_else() -> None:
    """It is read back, passes every check, and whoever is refused is no contributor."""
    [made, *_] = aggregates(3, {0: {2: "against", 8: "late"}})
    first, count = CODEC.span_of(made)
    CODEC.check_aggregate(made, run=RUN, round=3, first_chunk=first, num_chunks=count, num_members=len(NAMES))
    assert CODEC.refused(made) == {2: "against", 8: "late"}
    assert [index for index, _ in CODEC.contributors(made)] == [0, 1, 3, 4, 5, 6, 7]
    assert CODEC.refused(aggregates(3, {})[0]) == {}


@pytest.mark.parametrize("refused", [{0: "against"}, {1: "rude"}, {-1: "late"}])
def test_no_reducer_can_write_a_verdict_that_is_none(refused: dict[int, str]) -> None:
    """Of a contributor, for a reason that does not exist, of nobody."""
    first, count = CODEC.spans([1.0])[0]
    with pytest.raises(CompressionError, match="cannot be refused"):
        CODEC.reduce(
            [(0, 1.0, payload(0, 0))],
            residual=CODEC.residual(first, count),
            refused=refused,
            run=RUN,
            round=0,
            first_chunk=first,
            num_chunks=count,
        )


def test_three_rounds_of_most_reducers_put_out() -> None:
    """Not one round, not half of the reducers; and nobody is sentenced twice while it is out."""
    court = Verdicts(CODEC)
    assert court.note(0, NAMES, aggregates(0, by(5, 4, "against"))) == []
    assert court.note(0, NAMES, aggregates(0, by(5, 4, "against"))) == []  # the same round again
    assert court.note(1, NAMES, aggregates(1, by(5, 4, "norm"))) == []
    assert court.note(2, NAMES, aggregates(2, by(4, 4, "against"))) == []  # four of nine are not most
    expected = Sentence("peer-4", 3 + OUT_ROUNDS, "against")
    assert court.note(3, NAMES, aggregates(3, by(9, 4, "against"))) == [expected]
    assert court.note(4, NAMES, aggregates(4, by(9, 4, "against"))) == []


def test_old_rounds_are_forgotten_and_a_sentence_ends() -> None:
    """Three bad rounds in a year are nothing; who goes on after its time is put out again."""
    court = Verdicts(CODEC)
    for round in (0, 10, 20, 30):
        assert court.note(round, NAMES, aggregates(round, by(9, 1, "empty"))) == []
    assert court.note(31, NAMES, aggregates(31, by(9, 1, "empty"))) == []
    assert court.note(32, NAMES, aggregates(32, by(9, 1, "empty"))) != []
    later = 32 + OUT_ROUNDS
    sentences = [court.note(r, NAMES, aggregates(r, by(9, 1, "empty"))) for r in range(later, later + 3)]
    assert [len(made) for made in sentences] == [0, 0, 1]


def test_who_is_late_only_is_given_more_time() -> None:
    """A slow line is put out too, but not as soon."""
    court = Verdicts(CODEC)
    ends = [court.note(round, NAMES, aggregates(round, by(9, 6, "late"))) for round in range(verdicts.TARDY)]
    assert [len(made) for made in ends] == [0] * (verdicts.TARDY - 1) + [1]
    assert ends[-1][0].reason == "late"


def test_at_most_a_third_is_put_out() -> None:
    """Reducers that refuse nearly everybody put out three of nine, and no more while these are out."""
    court, out = Verdicts(CODEC), []
    everybody = dict.fromkeys(range(1, 9), "against")
    for round in range(6):
        out += court.note(round, NAMES, aggregates(round, dict.fromkeys(range(9), everybody)))
    assert len({sentence.peer_id for sentence in out}) == len(out) == 3


def test_who_is_accused_counts_among_those_that_are_out() -> None:
    """Told once, for as long as the reducers' sentences; and with it there is room for two more of nine."""
    court = Verdicts(CODEC)
    assert court.accused(0, ["peer-8"]) == [Sentence("peer-8", OUT_ROUNDS, ACCUSED)]
    assert court.accused(1, ["peer-8"]) == []
    out = []
    for round in range(6):
        everybody = dict.fromkeys(range(1, 8), "against")
        out += court.note(round, NAMES, aggregates(round, dict.fromkeys(range(9), everybody)))
    assert len(out) == 2
    assert [sentence.until for sentence in court.accused(OUT_ROUNDS, ["peer-8"])] == [2 * OUT_ROUNDS]


def test_two_reducers_are_no_court() -> None:
    """As where one reducer's sum alone was heard."""
    court = Verdicts(CODEC)
    for round in range(5):
        assert court.note(round, NAMES, aggregates(round, by(9, 4, "against"))[:2]) == []


def test_a_reducer_that_refuses_what_it_has_not_is_convicted() -> None:
    """The audit wants to see what was judged; that something came late or broken needs no proof."""
    [made, *_] = aggregates(0, {0: {2: "against"}})
    whole = payload(0, 0)
    span = CODEC.span_of(made)
    had = [(i, 1.0, CODEC.cut(whole, *span)) for i in range(len(NAMES)) if i != 2]
    assert audit.miscounted(CODEC, made, had, span, screens=True) == [2]
    [late, *_] = aggregates(0, {0: {2: "late"}})
    assert audit.miscounted(CODEC, late, had, span, screens=False) == []


def test_in_memory_the_swarm_puts_out_whom_it_refuses() -> None:
    """Reducers of the simulator write the same verdicts: of the opposed, the broken and the late."""
    direction = torch.randn(CODEC.num_params, generator=torch.Generator().manual_seed(1))
    reducer = GroupReducer(CODEC, RUN, 4, Faults(late=frozenset({NAMES[8]})), screens=True)
    sentences = []
    for round in range(verdicts.TARDY):
        members = []
        for i, name in enumerate(NAMES):
            noise = torch.randn(CODEC.num_params, generator=torch.Generator().manual_seed(100 * round + i))
            values = (direction + noise) * (-1.0 if i == 0 else 1.0)
            made = CODEC.encode([values], CODEC.error_feedback(), decay=1.0, run=RUN, round=round)
            broken = made[:-5] if i == 1 else made
            members.append(Contribution(name, bytes(32), broken, 100.0))
        sentences += reducer.reduce(round, members).sentences
    assert [(s.peer_id, s.until - OUT_ROUNDS, s.reason) for s in sentences] == [
        (NAMES[0], 2, "against"),
        (NAMES[1], 2, "malformed"),
        (NAMES[8], 5, "late"),
    ]
