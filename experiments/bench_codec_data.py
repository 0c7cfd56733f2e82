"""What the codec's benchmark compresses: random numbers, and deltas of a short real training."""

from __future__ import annotations

import dataclasses

import torch

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.trainer.data import open_corpus
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import InnerLoop
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.model import GPT

Shapes = list[tuple[str, tuple[int, ...]]]

SIDE = 1024  # of the random matrices
RUN = bytes(8)


def uniform(num_params: int, seed: int) -> tuple[Shapes, list[torch.Tensor]]:
    """Matrices of normal numbers, at least `num_params` in all: positions of the largest are uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes: Shapes = [(f"matrix{i}", (SIDE, SIDE)) for i in range(max(1, -(-num_params // SIDE**2)))]
    return shapes, [torch.randn(shape, generator=generator) for _, shape in shapes]


def real(
    num_rounds: int, codec_spec: CodecSpec, batch_size: int
) -> tuple[Shapes, list[list[torch.Tensor]], list[float]]:
    """Train the tiny model alone for some rounds, the outer step being what the codec delivers of each delta.

    Returns the shapes, the deltas of the last rounds (up to 8, newest last) and every round's last loss.
    """
    manifest = preset_manifest("bench", preset="tiny")
    train = dataclasses.replace(manifest.train, batch_size=batch_size)
    model = GPT(manifest.model, seed=train.seed)
    local = FlatParameters(model)
    shapes: Shapes = [(name, tuple(shape)) for name, shape in local.shapes]
    codec = Codec(codec_spec, shapes)
    theta, feedback = local.flat.clone(), codec.error_feedback()
    corpus, inner = open_corpus(manifest.data), InnerLoop(model, train)
    deltas: list[list[torch.Tensor]] = []
    losses = []
    for round in range(num_rounds):
        batches = corpus.batches(
            seed=train.seed,
            run_id="bench",
            round=round,
            peer_id="bench",
            batch_size=batch_size,
            seq_len=train.seq_len,
        )
        for step in range(train.inner_steps):
            loss = inner.step(*next(batches), round * train.inner_steps + step)
        losses.append(float(loss))
        delta = local.views(theta - local.flat)
        deltas = [*deltas[-7:], [part.clone() for part in delta]]
        payload = codec.encode(delta, feedback, decay=0.95, run=RUN, round=round)
        union = codec.reduce(
            [(0, 1.0, payload)], run=RUN, round=round, first_chunk=0, num_chunks=codec.num_chunks
        )
        for part, step_taken in zip(local.views(theta), codec.decode([union]), strict=True):
            part -= step_taken
        local.flat.copy_(theta)
    return shapes, deltas, losses
