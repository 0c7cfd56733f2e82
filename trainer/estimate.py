"""What joining a run will cost this machine, before it joins: measured where that is quick, else computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from dtrain.trainer.exchange import ABSENT, PeerView, can_give, work_of
from dtrain.trainer.voice import duration

if TYPE_CHECKING:
    from dtrain.trainer.manifest import Manifest
    from dtrain.trainer.worker import Worker

EXCHANGE_S = 2.0  # of a small group on home links; only the traffic's estimate depends on it
HEARTBEAT_BYTES_PER_S = 450  # for each other peer: `dtrain bench heartbeats`
BYTES_PER_PARAM = 28  # theta, local weights, gradients, two moments, error feedback, one delta: fp32 each
LIBRARIES_BYTES = 600e6  # torch and the network process, before any model


@dataclass(frozen=True)
class Estimate:
    """The cost of one worker here. Bytes of traffic are per hour, in the group as it is now with us in it."""

    download_bytes: float
    up_bytes_per_h: float
    down_bytes_per_h: float
    memory_bytes: float
    tokens_per_s: float
    share_percent: float
    round_s: float
    round: int
    workers: int

    def lines(self, manifest: Manifest, num_params: int) -> str:
        """Two lines for who is asked whether to join."""
        model = manifest.model
        others = f"{self.workers} workers" if self.workers != 1 else "1 worker"
        now = f"{others} in it, {self.round} rounds done" if self.workers else "nobody in it now"
        if self.round and not self.workers:
            now += f", {self.round} rounds done and kept"
        return (
            f"Run {manifest.run_id}: a {model.title} language model with {num_params / 1e6:.1f}M parameters to train, "
            f"trained on {manifest.data.title}; {now}; organizer {manifest.organizer[:8]}.\n"
            f"Here: {size(self.download_bytes)} to download first, then up to {size(self.up_bytes_per_h)} up and "
            f"{size(self.down_bytes_per_h)} down an hour, {size(self.memory_bytes)} of memory; about "
            f"{self.tokens_per_s:,.0f} tokens/s ({self.share_percent:.0f} % of the swarm), "
            f"{duration(self.round_s)} a round."
        )


def estimate(worker: Worker) -> Estimate:
    """What `worker`, built but not yet run, will cost. Takes two training steps, which change nothing."""
    manifest, num_params = worker.manifest, worker.codec.num_params
    tokens_per_step = manifest.train.batch_size * manifest.train.seq_len
    step_s = _step_s(worker)
    own_rate = tokens_per_step / step_s
    swarm = worker.exchange.swarm()
    others = [view for view in swarm if view.status["state"] not in ABSENT]
    donors = [view for view in swarm if can_give(view) and work_of(view) > 0]
    rate = own_rate + sum(
        _number(view, "tokens_per_s") or own_rate for view in others
    )  # 0: it does not say now
    if manifest.exchange.round_tokens:
        train_s = min(manifest.exchange.round_tokens / rate, manifest.exchange.round_deadline_s)
    else:
        train_s = manifest.train.inner_steps * step_s
    round_s = train_s + EXCHANGE_S * bool(others)
    traffic = round_bytes(manifest, num_params, len(others) + 1)
    per_h = 3600 * (traffic / round_s + HEARTBEAT_BYTES_PER_S * len(swarm))
    batch_bytes = 4.0 * tokens_per_step * manifest.model.vocab_size * 3
    return Estimate(
        download_bytes=4.0 * num_params if donors else 0.0,
        up_bytes_per_h=per_h,
        down_bytes_per_h=per_h,
        memory_bytes=LIBRARIES_BYTES + BYTES_PER_PARAM * num_params + batch_bytes,
        tokens_per_s=own_rate,
        share_percent=100 * own_rate / rate,
        round_s=round_s,
        round=max((int(_number(view, "round")) for view in [*others, *donors]), default=0),
        workers=len(others),
    )


def round_bytes(manifest: Manifest, num_params: int, members: int) -> float:
    """What each of the group's members sends, and receives, in a round."""
    if members == 1:
        return 0.0
    codec, others = manifest.codec, members - 1
    if codec.kind != "topk":
        payload = aggregate = num_params * codec.dense_bits / 8
    else:
        payload = _sparse_bytes(num_params, codec.chunk, codec.k, codec.value_bits)
        aggregate = _sparse_bytes(num_params, codec.chunk, *codec.of_aggregates)
    if members <= manifest.exchange.exact_up_to:
        aggregate = payload * members  # all of them, as they came
    return (payload + aggregate) * others / members


def _sparse_bytes(num_params: int, chunk: int, k: int, value_bits: int) -> float:
    """Expected bytes of k values a chunk: positions at their entropy, values, two scales a chunk."""
    positions = math.lgamma(chunk + 1) - math.lgamma(k + 1) - math.lgamma(chunk - k + 1)
    bits = positions / math.log(2) + k * value_bits + 16
    return num_params / chunk * bits / 8


def _step_s(worker: Worker) -> float:
    """Seconds of one training step here; the first one, which also warms up, does not count."""
    batches = worker.feed.batches(0)
    for _ in range(2):
        x, y = next(batches)
        began = worker.clock.monotonic()
        float(worker.compute.backward(x, y, worker.model.zero_grad))
        worker.model.zero_grad()
        seconds = worker.clock.monotonic() - began
    return max(1e-6, seconds)


def free_memory_bytes() -> float:
    """Memory that programs can still have on this machine."""
    return float(psutil.virtual_memory().available)


def size(num_bytes: float) -> str:
    """ "3.7 MB", "1.2 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _number(view: PeerView, key: str) -> float:
    value = view.status.get(key, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0
