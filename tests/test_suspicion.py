"""Laws of accusing: cheats are found in a few looks, honest members practically never, however unequal they are."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dtrain.trainer.suspicion import (
    GUILTY,
    LEAST_SCORES,
    MISSES,
    SHOWS_NOTHING,
    WRONG_DATA,
    WRONG_WORK,
    Look,
    Suspicions,
)

OWN = 1.7  # mean score of an update that was made from the data that it should be


def look(draws: random.Random, mean: float, likeness: float = 1.0, own: float = OWN) -> Look:
    """Scores vary by one standard error, likenesses by a fifth."""
    kinds = likeness * 0.4 * draws.gauss(1.0, 0.2), 0.4 * draws.gauss(1.0, 0.1)
    return Look(draws.gauss(mean, 1.0), draws.gauss(own, 1.0), *kinds)


def looks_until(draws: random.Random, make: Callable[[], Look], warm_up: int = 12) -> tuple[int, str]:
    """Looks at a peer until it is accused, by a worker that has looked at others before; and of what."""
    suspicions = Suspicions()
    for number in range(warm_up):
        suspicions.note(f"honest-{number}", look(draws, OWN))
    for number in range(1, 1000):
        if reason := suspicions.note("peer", make()):
            return number, reason
    return 1000, ""


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6])
def test_honest_streams_are_accused_less_than_once_in_a_thousand_looks(share: float) -> None:
    """Members whose own effect is as large as ours, or clearly smaller, as a slower machine's; 20,000 looks each."""
    draws, accused = random.Random(0), 0
    for _ in range(100):  # workers
        suspicions = Suspicions()
        for number in range(200):
            accused += bool(suspicions.note(f"peer-{number % 10}", look(draws, share * OWN)))
    assert accused < 20


def test_who_trains_on_other_text_is_found_by_its_scores() -> None:
    """Its updates are as good as any, but know nothing of what it was given."""
    draws = random.Random(1)
    ends = [looks_until(draws, lambda: look(draws, 0.0)) for _ in range(200)]
    assert {reason for _, reason in ends} == {WRONG_DATA}
    assert 4 < sorted(number for number, _ in ends)[100] < 20


def test_who_makes_its_updates_up_is_found_in_two_looks() -> None:
    """They do not point where training points."""
    draws = random.Random(2)
    ends = [looks_until(draws, lambda: look(draws, 0.0, likeness=0.1)) for _ in range(200)]
    assert sum(reason == WRONG_WORK for _, reason in ends) > 190
    assert sorted(number for number, _ in ends)[100] == 2


def test_where_our_own_update_shows_nothing_nobody_is_accused() -> None:
    """As early in a run, or where steps are too small to be seen: the question has no answer then."""
    draws = random.Random(3)
    suspicions = Suspicions()
    for _ in range(2000):
        blind = look(draws, 0.0, likeness=0.0, own=0.0)
        assert suspicions.note("peer", Look(blind.score, blind.own_score, blind.likeness, 0.05)) == ""
    few = Suspicions()
    for _ in range(LEAST_SCORES):
        assert few.expected == 0.0
        few.note("peer", Look(0.0, 3.0, 1.0, 1.0))
    assert few.expected > 0.0


def test_good_looks_clear_a_peer() -> None:
    """Who was accused and trains honestly from then on is not accused for ever."""
    draws = random.Random(4)
    suspicions = Suspicions()
    for number in range(12):
        suspicions.note(f"honest-{number}", look(draws, OWN))
    for _ in range(100):
        suspicions.note("peer", look(draws, 0.0, likeness=0.0))
    assert suspicions.doubt("peer") == 1.0
    ends = [suspicions.note("peer", look(draws, OWN)) for _ in range(30)]
    assert ends[0] and not any(ends[-15:])
    assert suspicions.doubt("peer") < 1.0 < GUILTY


def test_who_shows_nothing_is_accused_only_while_others_answer() -> None:
    """Where nobody answers, our own line is at fault."""
    draws = random.Random(5)
    suspicions = Suspicions()
    assert not any(suspicions.missed(f"peer-{number % 4}") for number in range(40))
    reasons = []
    for _ in range(MISSES):
        suspicions.note("honest", look(draws, OWN))
        reasons.append(suspicions.missed("silent"))
    assert reasons == [""] * (MISSES - 1) + [SHOWS_NOTHING]
    suspicions.note("silent", look(draws, OWN))
    assert suspicions.missed("silent") == ""
