"""Laws of a reducer's residual on the disk: whenever its process is killed, the books close afterwards."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from round_tools import CODEC, NUM_ELEMENTS, RUN, Group, play, quicken

from dtrain.compression.residual import Piece
from dtrain.dht.kept_residual import AHEAD, KEPT, KeptResidual

EDGES = [*range(0, CODEC.num_chunks, 32), CODEC.num_chunks]
STEPS = ("reduce", "lose", "release", "checkpoint", "network", "worker")


def add(total: torch.Tensor, pieces: list[Piece], factor: float = 1.0) -> None:
    for first, count, values in pieces:
        total[CODEC.layout.elements(first, count)] += factor * values


class Books:
    """A reducer with its worker, and beside it what must be somewhere. All in units of weight times value."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.residual = KeptResidual(CODEC, RUN, folder)
        self.produced, self.delivered = torch.zeros(NUM_ELEMENTS), torch.zeros(NUM_ELEMENTS)
        self.feedback, self.received = torch.zeros(NUM_ELEMENTS), 0  # in the worker's memory
        self.checkpoint = (self.feedback.clone(), 0)
        self.restarted()

    def reduce(self, random: random.Random, round: int, *, counts: bool, killed: bool) -> None:
        """A round with one sum of ours; a killed process hears from others whether it counted."""
        a, b = sorted(random.sample(EDGES, 2))
        place, weight = CODEC.layout.elements(a, b - a), random.uniform(0.5, 8.0)
        generator = torch.Generator().manual_seed(random.getrandbits(32))
        drawn = self.residual.draw(a, b - a, weight)
        mean, left = (torch.randn(len(drawn), generator=generator) for _ in range(2))
        aggregate = random.randbytes(20)
        self.residual.reduced(round, (a, b - a), weight, left, aggregate)
        others_have = [random.randbytes(20), *([aggregate] if counts else [])]
        if counts:  # else what was sent to us went back to its senders
            self.produced[place] += weight * mean
            self.delivered[place] += weight * (drawn + mean - left)
        if killed:
            self.network_dies()
            assert self.residual.unsure is not None and self.residual.unsure.round == round
        self.residual.judge(others_have)

    def release(self, random: random.Random, *, killed: bool) -> None:
        """The span moved; a process that is killed before its reply was read has handed over nothing."""
        a, b = sorted(random.sample(EDGES, 2))
        pieces = self.residual.release(a, b - a)
        if killed:
            self.network_dies()
        else:
            add(self.feedback, pieces)
            self.received = self.residual.num_handed

    def save(self) -> None:
        self.checkpoint = (self.feedback.clone(), self.received)
        self.residual.saved(self.received)

    def network_dies(self) -> None:
        self.residual = KeptResidual(CODEC, RUN, self.folder)
        self.restarted()

    def worker_dies(self) -> None:
        self.residual = KeptResidual(CODEC, RUN, self.folder)
        self.feedback, self.received = self.checkpoint[0].clone(), self.checkpoint[1]
        self.restarted()

    def restarted(self) -> None:
        """As `DhtExchange` does it with a new network process."""
        self.residual.saved(self.checkpoint[1])
        self.residual.take_back(self.received)

    def check(self) -> None:
        total = self.delivered + self.feedback
        add(total, self.residual.release())
        torch.testing.assert_close(total, self.produced, rtol=1e-4, atol=1e-3)


@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.booleans()), max_size=12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_whenever_a_process_is_killed_the_books_close(
    steps: list[tuple[str, bool]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Delivered + error feedback + residual = produced, whatever is killed at whatever step, worker or network process.

    A killed worker begins at its checkpoint; what it delivered itself is not in these books.
    """
    random_, books = random.Random(seed), Books(tmp_path_factory.mktemp("reducer"))
    for round, (step, killed) in enumerate(steps):
        if step in ("reduce", "lose"):
            books.reduce(random_, round, counts=step == "reduce", killed=killed)
        elif step == "release":
            books.release(random_, killed=killed)
        elif step == "checkpoint":
            books.save()
        elif step == "network":
            books.network_dies()
        else:
            books.worker_dies()
    books.check()


@pytest.mark.parametrize("killed", [0, 2])
def test_a_reducer_killed_after_the_exchange_settles_by_what_the_others_have(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real rounds with sums compressed again: who is killed before it knew that its round counted learns it."""
    quicken(monkeypatch)

    async def scenario() -> None:
        group = Group(3, recompress=True)
        for i, runner in enumerate(group.runners):
            kept = KeptResidual(CODEC, RUN, tmp_path / str(i))
            group.residuals[i] = runner._reducer._residual = kept
        records = await group.meet()
        assert (tmp_path / str(killed) / AHEAD).exists() and not (tmp_path / str(killed) / KEPT).exists()
        group.residuals[killed] = KeptResidual(CODEC, RUN, tmp_path / str(killed))
        others = records[1]
        for residual in group.residuals:
            assert residual is not None
            residual.judge(others.aggregates)
        group.check(records)

    play(scenario)


def settled_once(folder: Path) -> KeptResidual:
    residual = KeptResidual(CODEC, RUN, folder)
    residual.reduced(3, (0, CODEC.num_chunks), 2.0, torch.ones(NUM_ELEMENTS), b"sum")
    residual.settle()
    return residual


@pytest.mark.parametrize("damage", ["cut", "noise", "other run"])
def test_what_is_not_ours_or_not_whole_is_not_taken_up(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file, or one of another run, gets a line in the log and is gone."""
    settled_once(tmp_path)
    path, run = tmp_path / KEPT, RUN
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "noise":
        path.write_bytes(random.Random(0).randbytes(1000))
    else:
        run = b"another!"
    assert KeptResidual(CODEC, run, tmp_path).release() == []
    assert "is not taken up" in caplog.text and not path.exists()


def test_a_full_disk_costs_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be written is still kept in memory; a file that is no longer true is removed."""
    residual = settled_once(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dtrain.dht.kept_residual.save_file", refuse)
    residual.reduced(4, (0, CODEC.num_chunks), 2.0, torch.full((NUM_ELEMENTS,), 3.0), b"next")
    residual.settle()
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
    [(_, _, values)] = residual.release()
    assert (values == 6.0).all()


def test_a_round_that_nobody_remembers_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nearly every round does; the log says that it is assumed."""
    residual = KeptResidual(CODEC, RUN, tmp_path)
    residual.reduced(3, (0, CODEC.num_chunks), 2.0, torch.ones(NUM_ELEMENTS), b"sum")
    residual = KeptResidual(CODEC, RUN, tmp_path)
    residual.judge(None)
    assert "we assume that it did" in caplog.text
    assert len(residual.release()) == 1
