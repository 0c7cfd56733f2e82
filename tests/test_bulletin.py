"""Laws of bulletins: what a worker tells observers arrives as it was, and nothing else gets through."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_worker import quick_manifest, swarm_of

from dtrain.compression.codec import Codec
from dtrain.experiments.memory import MemoryExchange, MemorySwarm
from dtrain.trainer.bulletin import (
    KEPT,
    MAX_BULLETIN_BYTES,
    MAX_TEXT,
    SAMPLE_TOPIC,
    TOPIC,
    Bulletin,
    EvalLine,
    RoundLine,
    Sample,
    unpack_bulletin,
    unpack_sample,
)
from dtrain.trainer.sampling import PERIOD_S, Sampler


def line(number: int) -> RoundLine:
    return RoundLine(number, 1.25, 0.5, 0.25, 0.125, 3, True, 2.5, 15360)


def full() -> Bulletin:
    """A bulletin with as much in it as there can be."""
    bulletin = Bulletin()
    for number in range(1, 3 * KEPT):
        bulletin.rounds.append(line(number))
        bulletin.evals.append(EvalLine(number, 1.5))
        bulletin.event(1e9, "problem", "x" * 1000)
    return bulletin


def test_what_is_packed_comes_back() -> None:
    """The last rounds, evaluations and events arrive, oldest first; a loss that is not finite arrives as NaN."""
    bulletin = full()
    bulletin.evals.append(EvalLine(99, math.inf))
    view = unpack_bulletin(bulletin.pack(1e9, (5, 7)))
    assert view is not None
    assert (view.since, view.up, view.down) == (1e9, 5, 7)
    assert view.rounds == tuple(line(n) for n in range(2 * KEPT, 3 * KEPT))
    assert math.isnan(view.evals[-1].loss)
    assert view.events[-1].text == "x" * MAX_TEXT


def test_a_bulletin_is_small() -> None:
    """However much happens, it stays far below what a record may hold."""
    assert len(full().pack(1e9, (2**50, 2**50))) < MAX_BULLETIN_BYTES / 4


GOOD: dict[str, Any] = json.loads(full().pack(1e9, (5, 7)))


@pytest.mark.parametrize(
    "changes",
    [
        {"up": -1},
        {"up": 1.5},
        {"up": True},
        {"down": 2**60},
        {"since": "now"},
        {"rounds": "abc"},
        {"rounds": [[1]] * 2},
        {"rounds": GOOD["rounds"] * 2},
        {"rounds": [["1", *GOOD["rounds"][0][1:]]]},
        {"evals": [[1, -1.0]]},
        {"events": [[1.0, "problem", "x" * 5000]]},
        {"events": None},
        {"since": 10**400},
        {"refused": {"x" * 100: 1}},
        {"refused": {"no-token": -1}},
        {"refused": {str(i): 1 for i in range(100)}},
        {"refused": [1]},
    ],
)
def test_what_does_not_fit_is_no_bulletin(changes: dict[str, Any]) -> None:
    """One unfit field, and nothing of it is taken."""
    assert unpack_bulletin(json.dumps(GOOD).encode()) is not None
    assert unpack_bulletin(json.dumps({**GOOD, **changes}).encode()) is None


@given(st.one_of(st.binary(), st.text(), st.none(), st.integers()))
def test_garbage_is_refused(garbage: object) -> None:
    """No bytes from the network raise."""
    assert unpack_bulletin(garbage) is None
    assert unpack_sample(garbage) is None


def test_deep_nesting_is_refused() -> None:
    """Neither does JSON that is nested deeper than Python can follow."""
    assert unpack_bulletin(b"[" * 8000) is None
    assert unpack_bulletin(b" " * (MAX_BULLETIN_BYTES + 1)) is None


def test_a_sample_comes_back() -> None:
    """Whatever characters theta writes."""
    sample = Sample(7, "def \x00", "\ufffd\u202e</script>")
    assert unpack_sample(sample.pack()) == sample


def test_one_worker_writes_for_all() -> None:
    """Of the workers that take part, the one with the smallest id writes, and not all the time."""
    swarm = MemorySwarm(quick_manifest(), Codec(quick_manifest().codec, [("t", (4096,))]))
    first, second = MemoryExchange(swarm, "a"), MemoryExchange(swarm, "b")
    for exchange in (first, second):
        exchange.announce({"round": 0, "digest": "", "state": "training"})
    assert not Sampler().is_due(second, 0.0)
    sampler = Sampler()
    assert sampler.is_due(first, 0.0)
    assert not sampler.is_due(first, PERIOD_S / 2)
    assert sampler.is_due(first, 1.5 * PERIOD_S)
    first.announce({"round": 0, "digest": "", "state": "leaving"})
    assert Sampler().is_due(second, 0.0)


def test_a_worker_posts_what_it_did(tmp_path: Path) -> None:
    """Rounds, contributions, bytes, evaluations and text of a real loop are in its notes."""
    manifest = quick_manifest(exchange__start_workers=2)
    with swarm_of(manifest, tmp_path) as threads:
        for name in ("a", "b"):
            threads.start(name, max_rounds=3, eval_every=3, sample_text=True)
        notes = {name: threads.swarm.peer(name).notes for name in threads.workers}
        threads.join()
    for name in ("a", "b"):
        view = unpack_bulletin(notes[name][TOPIC])
        assert view is not None
        assert [round.round for round in view.rounds] == [1, 2, 3]
        assert all(round.group == 2 and round.included and round.compute_s > 0 for round in view.rounds)
        assert view.contributions == 3 and view.up > 0 and view.down > 0
        assert view.evals[-1].round == 3 and view.evals[-1].loss > 0
    sample = unpack_sample(notes["a"][SAMPLE_TOPIC])
    assert sample is not None and sample.prompt and sample.text
