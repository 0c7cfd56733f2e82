"""Compile the codec's kernels before they are needed: a first round must not time out on a compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec

_RUN = bytes(8)
STEPS = 4


def warm_up(spec: CodecSpec, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Run every operation of a codec once on a small tensor. Seconds on the first call on a machine, then cached.

    `progress(done, total)` is called after each of the parts that compile.
    """
    side = int(spec.chunk**0.5)
    shapes = [("matrix", (side * 2, side)), ("run", (spec.chunk + 8,)), ("dense", (8,))]
    codec = Codec(spec, shapes)
    feedback = codec.error_feedback()
    values = [torch.linspace(-1.0, 1.0, int(torch.Size(shape).numel())).view(shape) for _, shape in shapes]
    payload = codec.encode(values, feedback, decay=0.9, run=_RUN, round=0)
    progress(1, STEPS)
    first, count = 0, codec.num_chunks
    where = {"run": _RUN, "round": 0, "first_chunk": first, "num_chunks": count}
    codec.check(payload, **where)  # type: ignore[arg-type]
    progress(2, STEPS)
    codec.give_back(feedback, codec.cut(payload, first, count), first, count)
    progress(3, STEPS)
    sections = [(0, 1.0, payload), (1, 2.0, payload)]
    for residual in (None, codec.residual(first, count)):
        aggregate = codec.reduce(sections, residual=residual, **where)  # type: ignore[arg-type]
        codec.check_aggregate(aggregate, num_members=2, **where)  # type: ignore[arg-type]
        codec.decode([aggregate])
    progress(STEPS, STEPS)


if __name__ == "__main__":
    warm_up(CodecSpec())
