"""How much memory the codec needs at most, as the system counts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec

RUN = bytes(8)
MIN_PARAMS = 8_000_000  # smaller tensors come from memory that the process holds already
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_ratio(
    spec: CodecSpec, shapes: Sequence[tuple[str, tuple[int, ...]]], deltas: Sequence[Sequence[torch.Tensor]]
) -> float | None:
    """Peak growth of this process over a feedback's life, an encode and a decode, over the parameters' fp32 bytes.

    The tensors that are encoded and those that are decoded into are the caller's and not counted. None where the
    system has no such count (only Linux has) or the allocator would hide the growth of so few parameters.
    """
    codec = Codec(spec, shapes)
    if codec.num_params < MIN_PARAMS:
        return None
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": codec.num_chunks}
    payload = codec.encode(deltas[0], codec.error_feedback(), decay=0.95, run=RUN, round=0)
    union = codec.reduce([(0, 1.0, payload)], **place)  # type: ignore[arg-type]
    outputs = codec.decode([union])
    try:
        CLEAR_REFS.write_text("5")  # the peak restarts at what is resident now
    except OSError:
        return None
    before = _kibibytes("VmRSS")
    feedback = codec.error_feedback()
    codec.encode(deltas[0], feedback, decay=0.95, run=RUN, round=0)
    codec.decode([union], out=outputs)
    return (_kibibytes("VmHWM") - before) * 1024 / (4 * codec.num_params)


def _kibibytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
