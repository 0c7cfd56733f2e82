"""Strategies: nothing that a worker computed is lost, and equal aggregates give bit-equal thetas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.strategies import SparseLoco, make_strategy

SHAPES = [("matrix", (128, 64)), ("vector", (100,)), ("scalar", ())]
MANIFEST = preset_manifest("test", overrides={"codec.dense_bits": 32})
CODEC = Codec(MANIFEST.codec, SHAPES)


def draw(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _, shape in SHAPES]


def aggregate(payloads: list[bytes], round: int) -> bytes:
    sections = [(index, 1.0, payload) for index, payload in enumerate(payloads)]
    return CODEC.reduce(
        sections, run=MANIFEST.run_tag, round=round, first_chunk=0, num_chunks=CODEC.num_chunks
    )


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def drained(strategy: SparseLoco, theta: list[torch.Tensor]) -> list[torch.Tensor]:
    """Everything the strategy still owes: its feedback, sent round after round with no new training until it
    is gone.
    """
    total = [torch.zeros_like(tensor) for tensor in theta]
    for round in range(1, 60):
        payload = strategy.encode(theta, theta, round)
        for have, more in zip(total, CODEC.decode([aggregate([payload], round)]), strict=True):
            have += more
    return total


def undecayed() -> SparseLoco:
    return SparseLoco(replace(MANIFEST, strategy=replace(MANIFEST.strategy, feedback_decay=1.0)), CODEC)


def test_what_a_payload_leaves_out_comes_later() -> None:
    """With no decay, the payloads of later rounds bring the whole delta in the end."""
    theta, local = draw(1), draw(2)
    strategy = undecayed()
    sent = CODEC.decode([aggregate([strategy.encode(theta, local, 0)], 0)])
    assert not close(sent, difference(theta, local))
    late = drained(strategy, theta)
    assert close([a + b for a, b in zip(sent, late, strict=True)], difference(theta, local))


def test_an_undelivered_payload_is_not_lost() -> None:
    """Given back, a payload leaves the feedback as if it had never been made."""
    theta, local = draw(1), draw(2)
    strategy = undecayed()
    payload = strategy.encode(theta, local, 0)
    strategy.give_back(payload, [(0, CODEC.num_chunks)])
    assert close(drained(strategy, theta), difference(theta, local))


def test_an_undelivered_span_is_not_lost() -> None:
    """What one span of a payload held comes back; what the others held does not come twice."""
    theta, local = draw(1), draw(2)
    strategy = undecayed()
    payload = strategy.encode(theta, local, 0)
    first, second = CODEC.spans([1.0, 1.0])
    strategy.give_back(payload, [first])
    cut = CODEC.cut(payload, *second)
    place = {"first_chunk": second[0], "num_chunks": second[1]}
    delivered = CODEC.decode([CODEC.reduce([(0, 1.0, cut)], run=MANIFEST.run_tag, round=0, **place)])
    late = drained(strategy, theta)
    assert close([a + b for a, b in zip(delivered, late, strict=True)], difference(theta, local))


def test_a_delta_that_never_became_a_payload_is_not_lost() -> None:
    """Training that was stopped half way goes into the feedback, on top of what is there."""
    theta, local = draw(1), draw(2)
    strategy = undecayed()
    strategy.absorb(difference(theta, local))
    strategy.absorb(draw(3))
    expected = [a + b for a, b in zip(difference(theta, local), draw(3), strict=True)]
    assert close(drained(strategy, theta), expected)


def test_the_outer_step_is_the_weighted_mean_times_alpha() -> None:
    """theta - alpha * sum(w q) / sum(w), in place."""
    manifest = replace(MANIFEST, strategy=replace(MANIFEST.strategy, outer_lr=0.5))
    strategy = SparseLoco(manifest, CODEC)
    payloads = [SparseLoco(manifest, CODEC).encode(draw(1), draw(seed), 0) for seed in (2, 3)]
    agreed = aggregate(payloads, 0)
    theta, before = draw(1), draw(1)
    strategy.apply(theta, [agreed])
    mean = CODEC.decode([agreed])
    assert close(theta, [a - 0.5 * b for a, b in zip(before, mean, strict=True)])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_equal_aggregates_give_bit_equal_thetas_for_any_number_of_threads(num_threads: int) -> None:
    """One theta: decode and outer step do not depend on the machine's threads."""
    payloads = [SparseLoco(MANIFEST, CODEC).encode(draw(1), draw(seed), 0) for seed in (2, 3, 4)]
    agreed, threads = aggregate(payloads, 0), torch.get_num_threads()
    results = []
    try:
        for count in (1, num_threads):
            torch.set_num_threads(count)
            theta = draw(1)
            SparseLoco(MANIFEST, CODEC).apply(theta, [agreed])
            results.append(theta)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_missing_span_changes_nothing_there() -> None:
    """A span that nobody could get leaves theta as it was, for every member alike."""
    theta = draw(1)
    SparseLoco(MANIFEST, CODEC).apply(theta, [])
    assert all(torch.equal(a, b) for a, b in zip(theta, draw(1), strict=True))


def test_the_state_goes_through_a_checkpoint() -> None:
    """A resumed worker sends what the other would have sent."""
    theta, local = draw(1), draw(2)
    strategy, resumed = SparseLoco(MANIFEST, CODEC), SparseLoco(MANIFEST, CODEC)
    strategy.encode(theta, local, 0)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in strategy.state_dict().items()})
    assert resumed.encode(theta, local, 1) == strategy.encode(theta, local, 1)
    assert strategy.shared_state() == {}


@pytest.mark.parametrize("tensors", [{}, {"feedback": torch.zeros(3)}])
def test_a_state_that_does_not_fit_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    """Feedback of another model is an error, not noise in the next round."""
    with pytest.raises(RunError, match="error feedback does not fit"):
        SparseLoco(MANIFEST, CODEC).load_state_dict(tensors)


def test_a_diverged_worker_sends_nothing() -> None:
    """NaN is refused by name of its tensor, and the feedback stays clean."""
    strategy = SparseLoco(MANIFEST, CODEC)
    local = draw(2)
    local[1][5] = float("nan")
    with pytest.raises(CompressionError, match="vector"):
        strategy.encode(draw(1), local, 0)
    assert torch.equal(strategy.state_dict()["feedback"], CODEC.error_feedback())


def test_an_unknown_strategy_lists_the_choices() -> None:
    """The line says what could have been typed."""
    manifest = replace(MANIFEST, strategy=replace(MANIFEST.strategy, name="fedavg"))
    with pytest.raises(UsageError, match="'fedavg': choose one of sparseloco"):
        make_strategy(manifest, CODEC)
