"""Error feedback: nothing that a worker computed is lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError
from dtrain.trainer.errors import RunError
from dtrain.trainer.feedback import ErrorFeedback
from dtrain.trainer.keeping import Keeper
from dtrain.trainer.manifest import preset_manifest

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


def test_a_short_round_does_not_blow_up_what_a_reducer_owes(tmp_path: Path) -> None:
    """Who comes late to a round sends one of a few tokens. What it owes elsewhere travels with the next payloads, which
    are as heavy as all before: divided by the light one's weight it would count many times over."""
    taken: list[float] = []
    owed = torch.full((4,), 6144.0).numpy().tobytes()
    stub: Any = SimpleNamespace(
        release_residual=lambda all: (1, [(0, 1, owed)]),
        residual_saved=lambda number: None,
        take_over=lambda first, count, values: taken.append(float(values[0])),
        **{"checkpoint_every": 0, "keep_checkpoints": 1, "checkpoint_to": "", "folder": tmp_path},
    )
    keeper = Keeper(stub, stub, stub, stub, stub, stub, stub, CODEC)
    for tokens in (2048, 2048, 256, 0, 2048):
        keeper.take_over_residual(tokens)
    assert taken == [3.0] * 5
