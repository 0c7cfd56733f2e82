"""Error feedback: nothing that a worker computed is lost."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError
from dtrain.compression.screen import screen
from dtrain.trainer.errors import RunError
from dtrain.trainer.exchange import Exchange
from dtrain.trainer.feedback import ErrorFeedback
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.owed import Owed

SHAPES = [("matrix", (128, 64)), ("vector", (100,)), ("scalar", ())]
MANIFEST = preset_manifest("test", overrides={"codec.dense_bits": 32, "strategy.feedback_decay": 1.0})
CODEC = Codec(MANIFEST.codec, SHAPES)


def draw(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _, shape in SHAPES]


def decoded(payload: bytes, round: int) -> list[torch.Tensor]:
    place = {"first_chunk": 0, "num_chunks": CODEC.num_chunks}
    return CODEC.decode([CODEC.reduce([(0, 1.0, payload)], run=MANIFEST.run_tag, round=round, **place)])


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def total(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def drained(feedback: ErrorFeedback) -> list[torch.Tensor]:
    """Everything that is still owed, sent round after round with no new training until it is gone."""
    sent = [torch.zeros(shape) for _, shape in SHAPES]
    for round in range(1, 60):
        nothing = [torch.zeros(shape) for _, shape in SHAPES]
        sent = total(sent, decoded(feedback.encode(nothing, round), round))
    return sent


def undecayed() -> ErrorFeedback:
    return ErrorFeedback(MANIFEST, CODEC)


def test_what_a_payload_leaves_out_comes_later() -> None:
    """With no decay, the payloads of later rounds bring the whole contribution in the end."""
    feedback = undecayed()
    sent = decoded(feedback.encode(draw(1), 0), 0)
    assert not close(sent, draw(1))
    assert close(total(sent, drained(feedback)), draw(1))


def test_an_undelivered_payload_is_not_lost() -> None:
    """Given back, a payload leaves the feedback as if it had never been made."""
    feedback = undecayed()
    feedback.give_back(feedback.encode(draw(1), 0), [(0, CODEC.num_chunks)])
    assert close(drained(feedback), draw(1))


def test_an_undelivered_span_is_not_lost() -> None:
    """What one span of a payload held comes back; what the others held does not come twice."""
    feedback = undecayed()
    payload = feedback.encode(draw(1), 0)
    first, second = CODEC.spans([1.0, 1.0])
    feedback.give_back(payload, [first])
    place = {"first_chunk": second[0], "num_chunks": second[1]}
    cut = CODEC.cut(payload, *second)
    delivered = CODEC.decode([CODEC.reduce([(0, 1.0, cut)], run=MANIFEST.run_tag, round=0, **place)])
    assert close(total(delivered, drained(feedback)), draw(1))


def test_a_contribution_that_never_became_a_payload_is_not_lost() -> None:
    """Training that was stopped half way goes into the feedback, on top of what is there."""
    feedback = undecayed()
    feedback.absorb(draw(1))
    feedback.absorb(draw(3))
    assert close(drained(feedback), total(draw(1), draw(3)))


def test_the_state_goes_through_a_checkpoint() -> None:
    """A resumed worker sends what the other would have sent."""
    feedback, resumed = ErrorFeedback(MANIFEST, CODEC), ErrorFeedback(MANIFEST, CODEC)
    feedback.encode(draw(1), 0)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in feedback.state_dict().items()})
    assert resumed.encode(draw(2), 1) == feedback.encode(draw(2), 1)


@pytest.mark.parametrize("tensors", [{}, {"feedback": torch.zeros(3)}])
def test_a_state_that_does_not_fit_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    """Feedback of another model is an error, not noise in the next round."""
    with pytest.raises(RunError, match="error feedback does not fit"):
        ErrorFeedback(MANIFEST, CODEC).load_state_dict(tensors)


def test_a_diverged_worker_sends_nothing() -> None:
    """NaN is refused by name of its tensor, and the feedback stays clean."""
    feedback = ErrorFeedback(MANIFEST, CODEC)
    made = draw(2)
    made[1][5] = float("nan")
    with pytest.raises(CompressionError, match="vector"):
        feedback.encode(made, 0)
    assert torch.equal(feedback.state_dict()["feedback"], CODEC.error_feedback())


class Reducer:
    """An exchange that owes one piece of the first chunks, [sum of 16 weights of 100 times a value of 1]."""

    def __init__(self) -> None:
        self.pieces = [(0, 2, (1600 * torch.ones(size(0, 2))).numpy().tobytes())]

    def release_residual(self, *, all: bool) -> tuple[int, list[tuple[int, int, bytes]]]:
        released, self.pieces = self.pieces, []
        return 1, released


def size(first: int, count: int) -> int:
    place = CODEC.layout.elements(first, count)
    return int(place.stop - place.start)


def test_what_a_reducer_owes_is_paid_by_and_by() -> None:
    """Sixteen members stood behind it: no payload takes more of it than its own inner steps have made, so that one of a
    few tokens, by who came late to a round, takes little. A checkpoint holds the rest; at last all has gone."""
    feedback, reducer = ErrorFeedback(MANIFEST, CODEC), cast(Exchange, Reducer())
    place = CODEC.layout.elements(0, 2)
    kept = feedback.state_dict()["feedback"]
    owed = Owed(CODEC, feedback)
    assert owed.take_over(reducer) == 1 and not kept.any()
    made = [torch.ones(shape) for _, shape in SHAPES]
    paid = torch.zeros(size(0, 2))
    for weight in (25.0, 0.0, *[100.0] * 16):
        kept.zero_()
        owed.pay(made, weight)
        assert kept.max() <= 1.0001 and owed.state_dict().keys() <= {"0-2"}
        paid += kept[place] * weight
        again = Owed(CODEC, feedback)
        again.load_state_dict(owed.state_dict())  # killed, and started again
        owed = again
    assert not owed.state_dict() and torch.allclose(paid, torch.tensor(1600.0))
    assert not kept[CODEC.layout.elements(2, 1)].any()


def test_training_that_diverged_takes_nothing_of_what_is_owed() -> None:
    feedback = ErrorFeedback(MANIFEST, CODEC)
    owed = Owed(CODEC, feedback)
    assert owed.take_over(cast(Exchange, Reducer())) == 1
    before = owed.state_dict()
    owed.pay([torch.full(shape, math.nan) for _, shape in SHAPES], 100.0)
    after = owed.state_dict()
    assert not feedback.state_dict()["feedback"].any()
    assert after.keys() == before.keys() == {"0-2"} and torch.equal(after["0-2"], before["0-2"])


def test_who_owes_much_is_not_left_out_for_it() -> None:
    """A hundred times as much as a payload holds: the reducers take every one of its sections, and in full."""
    manifest = preset_manifest("test", preset="tiny")
    shapes = [("matrix", (256, 64))]
    codec = Codec(manifest.codec, shapes)
    everything = (0, codec.num_chunks)
    feedbacks = [ErrorFeedback(manifest, codec) for _ in range(8)]
    owed = Owed(codec, feedbacks[0])
    draws = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(256, 64, generator=draws)

    common = noise()
    owed.load_state_dict({f"0-{codec.num_chunks}": 100 * noise().flatten()})
    for round in range(60):
        sections = []
        for index, feedback in enumerate(feedbacks):
            made = [common + noise()]
            if index == 0:
                owed.pay(made, 1.0)
            payload = feedback.encode(made, round)
            sections.append((index, 1.0, codec.cut(payload, *everything)))
        screened = screen(codec, sections, *everything)
        assert not screened.refused and {weight for _, weight, _ in screened.sections} == {1.0}, round
    [left] = owed.state_dict().values()
    assert left.norm() < 0.5 * 100 * 128
