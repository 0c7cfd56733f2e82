"""Every strategy through the one worker loop: one theta, nothing lost, and the training that its paper describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from swarm_tools import eventually
from test_worker import Threads, assert_one_theta, quick_manifest, swarm_of
from torch import Tensor

from dtrain.compression import dct
from dtrain.compression.codec import Codec
from dtrain.compression.warm_up import warm_up
from dtrain.trainer.data import Corpus, open_corpus
from dtrain.trainer.feedback import ErrorFeedback
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import InnerLoop, learning_rate
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.model import GPT
from dtrain.trainer.strategies import STRATEGIES

NAMES = ("a", "b", "c")


def strategy_manifest(name: str, **overrides: object) -> Manifest:
    """`quick_manifest` with the strategy's own number of inner steps."""
    steps = STRATEGIES[name].defaults.get("train.inner_steps", 3)
    settings = {"train__inner_steps": steps, "exchange__start_workers": len(NAMES), **overrides}
    return quick_manifest(strategy__name=name, **settings)


@pytest.mark.parametrize("overlap", ["none", "eager"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_theta_nothing_lost_and_the_loss_falls(name: str, overlap: str, tmp_path: Path) -> None:
    """The laws hold for every strategy, in turn with training and under it; a late joiner takes part."""
    manifest = strategy_manifest(name, exchange__overlap=overlap)
    rounds = 36 // manifest.train.inner_steps
    warm_up(manifest.codec)  # compiling may take longer than the swarm's deadline
    with swarm_of(manifest, tmp_path) as threads:
        for worker in NAMES:
            threads.start(worker, max_rounds=rounds, audit=True)
        threads.join()
        assert_one_theta(threads, rounds)
        for worker in NAMES:
            events = threads.events(worker, "round")
            assert [e["contributors"] for e in events] == [list(NAMES)] * rounds
            assert events[-1]["loss"] < events[0]["loss"] - 0.3
            audits = threads.events(worker, "audit")
            assert len(audits) == rounds
            assert all(e["error"] <= 1e-5 * max(e["scale"], 1e-3) for e in audits)


@pytest.mark.parametrize("name", ["diloco", "ddp"])
def test_newcomers_and_the_digest_have_the_momentum_too(name: str, tmp_path: Path) -> None:
    """Who joins late or resumes takes the same outer steps; momentum that differs shows in the digest at once."""
    manifest = strategy_manifest(name, exchange__start_workers=1)
    with swarm_of(manifest, tmp_path) as threads:
        threads.start("a", max_rounds=4, checkpoint_every=1)
        threads.join()
        threads.start("a")
        eventually(lambda: len(threads.events("a", "joined")) == 2, "it never came back")
        late = threads.start("b")  # not before: it would find nobody and begin a run of its own
        eventually(lambda: num_shared_rounds(threads) >= 3, "they never met")
        late.stop("enough")
        threads.workers["a"].stop("enough")
        threads.join()
        assert threads.events("a", "joined")[-1]["source"] == "checkpoint"
        digests = [{e["round"]: e["digest"] for e in threads.events(worker, "round")} for worker in "ab"]
        common = digests[0].keys() & digests[1].keys()
        assert len(common) >= 3
        assert all(digests[0][round] == digests[1][round] for round in common)
        shared = late.strategy.shared_state()
        assert all(bool(tensor.any()) for tensor in shared.values())
        digest = late.outer.state.digest(shared)
        next(iter(shared.values()))[0] += 1.0
        assert late.outer.state.digest(shared) != digest


def num_shared_rounds(threads: Threads) -> int:
    return sum(len(e["contributors"]) == 2 for e in threads.events("b", "round"))


@dataclass
class Reference:
    """The same model and data as the swarm's, trained by a few lines of a test."""

    manifest: Manifest
    corpus: Corpus

    def model(self) -> tuple[GPT, FlatParameters]:
        model = GPT(self.manifest.model, seed=self.manifest.train.seed)
        return model, FlatParameters(model)

    def batches(self, worker: str, round: int) -> list[tuple[Tensor, Tensor]]:
        train = self.manifest.train
        endless = self.corpus.batches(
            seed=train.seed,
            run_id=self.manifest.run_id,
            round=round,
            peer_id=worker,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
        )
        return list(islice(endless, train.inner_steps))


def theta_of_swarm(manifest: Manifest, rounds: int, folder: Path) -> Tensor:
    with swarm_of(manifest, folder) as threads:
        for worker in NAMES:
            threads.start(worker, max_rounds=rounds)
        threads.join()
        return threads.workers["a"].outer.state.theta_flat


def test_ddp_is_one_machine_with_everybodys_batches(tmp_path: Path) -> None:
    """M workers end where plain AdamW on the joint batch ends."""
    manifest = strategy_manifest("ddp", train__lr=1e-3, train__warmup_steps=2)
    reference, train = Reference(manifest, open_corpus(manifest.data)), manifest.train
    model, flat = reference.model()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
    )
    for round in range(8):
        parts = [reference.batches(worker, round)[0] for worker in NAMES]
        x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        optimizer.zero_grad()
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(train, round)
        optimizer.step()
    theta = theta_of_swarm(manifest, 8, tmp_path)
    moved = (flat.flat - reference.model()[1].flat).norm()
    assert (theta - flat.flat).norm() < 1e-3 * moved


def test_diloco_is_local_adamw_and_nesterov(tmp_path: Path) -> None:
    """M workers end where the paper's loop, written down in a few lines, ends (arXiv 2311.08105, algorithm 1)."""
    manifest = strategy_manifest("diloco", codec__dense_bits=32)
    reference = Reference(manifest, open_corpus(manifest.data))
    models = {worker: reference.model() for worker in NAMES}
    loops = {worker: InnerLoop(model, manifest.train) for worker, (model, _) in models.items()}
    theta = reference.model()[1].flat.clone().requires_grad_(True)
    outer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    for round in range(4):
        deltas = []
        for worker, (_, flat) in models.items():
            flat.flat.copy_(theta.detach())
            for step, (x, y) in enumerate(reference.batches(worker, round)):
                loops[worker].step(x, y, round * manifest.train.inner_steps + step)
            deltas.append(theta.detach() - flat.flat)
        theta.grad = torch.stack(deltas).mean(0)
        outer.step()
    ours = theta_of_swarm(manifest, 4, tmp_path)
    moved = (theta.detach() - reference.model()[1].flat).norm()
    assert (ours - theta.detach()).norm() < 1e-3 * moved


@pytest.mark.parametrize("bits", [8, 16])
def test_diloco_with_fewer_bits_ends_close_to_fp32(bits: int, tmp_path: Path) -> None:
    """fp16 and 8-bit deltas with error feedback train as fp32 does, for a half and a quarter of the bytes."""
    thetas, sizes = [], []
    for width in (32, bits):
        manifest = strategy_manifest("diloco", codec__dense_bits=width)
        (tmp_path / str(width)).mkdir()
        with swarm_of(manifest, tmp_path / str(width)) as threads:
            for worker in NAMES:
                threads.start(worker, max_rounds=6)
            threads.join()
            thetas.append(threads.workers["a"].outer.state.theta_flat)
            sizes.append(threads.events("a", "round")[-1]["payload_bytes"])
    first = Reference(manifest, open_corpus(manifest.data)).model()[1].flat
    # The paths part slowly, since training amplifies any difference; both have gone the same way.
    assert (thetas[0] - thetas[1]).norm() < 0.2 * (thetas[0] - first).norm()
    assert sizes[1] == pytest.approx(sizes[0] * bits / 32, rel=0.1)


def blocks(matrix: Tensor) -> Tensor:
    """[128, 64] as two blocks of 64 x 64."""
    return matrix.view(2, 64, 64)


def by_definition(change: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Apply `change` [2, 4096] to a matrix's DCT coefficients, computed from the transform's definition."""
    basis = dct.matrix()
    coefficients = basis @ blocks(matrix) @ basis.T
    changed = change(coefficients.reshape(2, -1)).view(2, 64, 64)
    return (basis.T @ changed @ basis).reshape(128, 64)


def top_k(coefficients: Tensor) -> Tensor:
    kept = torch.zeros_like(coefficients)
    places = coefficients.abs().topk(64, dim=1).indices
    return kept.scatter(1, places, coefficients.gather(1, places))


def test_demo_sends_the_fast_components_of_the_momentum() -> None:
    """m <- beta m + g; q = top-k of DCT(m); m <- m - q (arXiv 2411.19870, algorithm 1), up to the value bits."""
    manifest = strategy_manifest("demo", codec__k=64, codec__value_bits=16)
    codec = Codec(manifest.codec, [("matrix", (128, 64))])
    feedback = ErrorFeedback(manifest, codec)
    momentum = torch.zeros(128, 64)
    for round in range(6):
        gradient = torch.randn(128, 64, generator=torch.Generator().manual_seed(round))
        momentum = manifest.strategy.feedback_decay * momentum + gradient
        sent = by_definition(top_k, momentum)
        momentum = momentum - sent
        payload = feedback.encode([gradient.clone()], round)
        place = {"first_chunk": 0, "num_chunks": codec.num_chunks}
        ours = codec.decode([codec.reduce([(0, 1.0, payload)], run=manifest.run_tag, round=round, **place)])[
            0
        ]
        torch.testing.assert_close(ours, sent, atol=2e-3, rtol=0)
