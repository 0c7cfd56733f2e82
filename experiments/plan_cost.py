"""What one round costs by the network and cost model: bytes, seconds, memory. The simulator's clock goes by the same.

Payloads are not estimated: the run's codec encodes a sample and its size is scaled. All workers are taken to be equal,
but that some may be hidden behind routers that let nobody dial them: those reduce nothing, and where two of them meet a
third passes on what they say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dtrain.compression.codec import Codec
from dtrain.experiments.network import Link, ModelledLinks, arrivals_s
from dtrain.trainer.inner import DELTA
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.strategies import make_strategy

SAMPLE_SHAPE = (1024, 512)  # 128 chunks of 4096
RUN = bytes(8)
FP32 = 4
# Bytes per parameter on the worker: local weights, gradients, theta, decoded mean, feedback; the moments of AdamW, and
# of Muon, which has one for all but the tables.
WEIGHTS, GRADIENTS, THETA, MEAN, FEEDBACK = FP32, FP32, FP32, FP32, FP32
MOMENTS = {"adamw": 2 * FP32, "adamw8bit": 2, "muon": FP32}


@dataclass(frozen=True)
class RoundCost:
    """One round of one worker, of one that reduces where not all do."""

    payload_bytes: float
    up_bytes: float
    """Sent: sections to the reducers, then the own span's aggregate to all."""
    down_bytes: float
    compute_s: float
    """Inner steps."""
    exchange_s: float
    """From the last inner step to the outer step: codec, meeting, transfers."""
    round_s: float
    """From one round's beginning to the next one's."""
    memory_bytes: float
    """Weights and all that training and strategy keep; activations are not in it."""

    @property
    def compute_share(self) -> float:
        return self.compute_s / self.round_s


def round_cost(
    manifest: Manifest,
    num_params: float,
    num_workers: int,
    link: Link,
    step_time_s: float,
    *,
    num_hidden: int = 0,
) -> RoundCost:
    """What a round of `num_workers` equal workers with `num_params` parameters costs each of them.

    `num_hidden` of them, fewer than all, nobody can dial.
    """
    reducers = num_workers - num_hidden
    payload = bytes_per_param(manifest) * num_params
    section = payload / reducers
    exact = num_workers <= max(1, manifest.exchange.exact_up_to)
    aggregate = (
        section * num_workers if exact else aggregate_bytes_per_param(manifest) * num_params / reducers
    )
    others, other_reducers = num_workers - 1, reducers - 1
    compute_s = manifest.train.inner_steps * step_time_s
    exchange_s = _exchange_s(num_params, num_workers, num_hidden, link, section, aggregate)
    overlaps = manifest.exchange.overlap == "eager"
    return RoundCost(
        payload_bytes=payload,
        up_bytes=other_reducers * section + others * aggregate,
        down_bytes=others * section + other_reducers * aggregate,
        compute_s=compute_s,
        exchange_s=exchange_s,
        round_s=max(compute_s, exchange_s) if overlaps else compute_s + exchange_s,
        memory_bytes=num_params * memory_per_param(manifest),
    )


def _exchange_s(
    num_params: float, num_workers: int, num_hidden: int, link: Link, section: float, aggregate: float
) -> float:
    names = [str(index) for index in range(num_workers)]
    links = ModelledLinks(int(num_params))
    for name in names:
        links.add(name, link if not num_hidden else replace(link, rtt_ms=2 * link.rtt_ms))
    to_reducers = 1.0 - np.eye(num_workers)
    to_reducers[:, num_workers - num_hidden :] = 0.0  # the last ones are hidden
    scattered = arrivals_s([link] * num_workers, section * to_reducers, np.zeros(num_workers))
    gathered = arrivals_s([link] * num_workers, aggregate * to_reducers.T, scattered.max(axis=0))
    return links.codec_s(names[0]) + links.meet_s(names) + float(gathered.max())


def _sample(manifest: Manifest) -> tuple[Codec, bytes]:
    codec = Codec(manifest.codec, [("sample", SAMPLE_SHAPE)])
    values = torch.randn(SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    return codec, codec.encode([values], codec.error_feedback(), decay=1.0, run=RUN, round=0)


def bytes_per_param(manifest: Manifest) -> float:
    """Payload bytes per parameter, as the codec writes a sample of matrices."""
    codec, payload = _sample(manifest)
    return len(payload) / codec.num_params


def aggregate_bytes_per_param(manifest: Manifest) -> float:
    """The same of a recompressed aggregate, of so many workers that each of its values is taken by one."""
    codec, payload = _sample(manifest)
    place = (0, codec.num_chunks)
    residual = codec.residual(*place).normal_(generator=torch.Generator().manual_seed(1))
    aggregate = codec.reduce(
        [(0, 1.0, payload)],
        residual=residual,
        run=RUN,
        round=0,
        first_chunk=place[0],
        num_chunks=place[1],
    )
    return len(aggregate) / codec.num_params


def memory_per_param(manifest: Manifest) -> float:
    """Bytes per parameter that a worker holds, activations and buffers aside."""
    strategy = make_strategy(manifest, [("sample", SAMPLE_SHAPE)])
    shared = sum(tensor.numel() for tensor in strategy.shared_state().values()) * FP32
    own = WEIGHTS + GRADIENTS + THETA + MEAN + FEEDBACK + shared / (SAMPLE_SHAPE[0] * SAMPLE_SHAPE[1])
    if strategy.collects != DELTA:
        return own + FP32  # gradients are summed up
    return own + MOMENTS[manifest.train.optimizer]
