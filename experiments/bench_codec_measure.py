"""Timing and sizing of one codec configuration: every contestant in turn, over and over, in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dtrain.compression import group
from dtrain.compression.codec import Codec
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.spec import CodecSpec

NUM_PAYLOADS = 8  # of the timed decoding
TURNS = 5  # of the fast ones per repetition: on a shared machine nine samples do not settle a ratio of 1.7
RUN = bytes(8)
Shapes = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Timing:
    """Medians over the repetitions."""

    encode_ns_per_param: float
    decode8_ns_per_param: float
    encode_gain: float
    """How many times as fast as with the first number of threads, which had its turn just before."""
    decode8_gain: float


def payloads_of(codec: Codec, deltas: Sequence[Sequence[torch.Tensor]]) -> list[bytes]:
    """NUM_PAYLOADS payloads from consecutive deltas under one error feedback, as one worker would send them."""
    feedback, found = codec.error_feedback(), []
    for round in range(NUM_PAYLOADS):
        tensors = deltas[round % len(deltas)]
        found.append(codec.encode(tensors, feedback, decay=0.95, run=RUN, round=0))
    return found


def time_all(
    spec: CodecSpec,
    shapes: Shapes,
    deltas: Sequence[Sequence[torch.Tensor]],
    kernels: Sequence[Kernel],
    threads: Sequence[int],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, dict[str, Timing]]:
    """Time every kernel and the memory floor (m = d * m + g, one pass) side by side, with each number of threads by
    turns; keys: threads, then kernel names and "floor". In a repetition the slow reference has one turn, all others
    have TURNS.

    Encoding includes the check for NaN, selection, packing and the error feedback; decoding sums 8 payloads into
    tensors that exist already.
    """
    codecs = {kernel.name: Codec(spec, shapes, kernel=kernel) for kernel in kernels}
    first = next(iter(codecs.values()))
    sent = payloads_of(first, deltas)
    place = {"run": RUN, "round": 0, "first_chunk": 0, "num_chunks": first.num_chunks}
    union = first.reduce([(i, 1.0, payload) for i, payload in enumerate(sent)], **place)  # type: ignore[arg-type]
    feedbacks = {name: codec.error_feedback() for name, codec in codecs.items()}
    outputs = first.decode([union])
    momentum, gradient = torch.zeros(first.num_params), torch.randn(first.num_params)

    def floor() -> object:
        return torch.add(gradient, momentum, alpha=0.95, out=momentum)

    contestants: dict[str, Callable[[], object]] = {"floor": floor}
    for name, codec in codecs.items():
        contestants[f"encode {name}"] = _encode(codec, deltas[-1], feedbacks[name])
        contestants[f"decode {name}"] = _decode(codec, union, outputs)
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in contestants for n in threads}
    for turn in range(repetitions * TURNS):
        for (name, count), found in seconds.items():
            if turn % TURNS and name.endswith(" reference"):
                continue
            torch.set_num_threads(count)
            # Not timed: it compiles, and wakes the cores that it needs, of which the one before may have had one.
            contestants[name]()
            start = clock()
            contestants[name]()
            found.append(clock() - start)

    def timing(encode: str, decode: str, count: int) -> Timing:
        ns = [statistics.median(seconds[name, count]) * 1e9 / first.num_params for name in (encode, decode)]
        pairs = [zip(seconds[name, threads[0]], seconds[name, count]) for name in (encode, decode)]
        return Timing(*ns, *(statistics.median(one / more for one, more in pair) for pair in pairs))

    return {
        count: {
            "floor": timing("floor", "floor", count),
            **{name: timing(f"encode {name}", f"decode {name}", count) for name in codecs},
        }
        for count in threads
    }


def _encode(codec: Codec, tensors: Sequence[torch.Tensor], feedback: torch.Tensor) -> Callable[[], object]:
    return lambda: codec.encode(tensors, feedback, decay=0.95, run=RUN, round=0)


def _decode(codec: Codec, union: bytes, outputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    return lambda: codec.decode([union], out=outputs)


def bits_per_coefficient(codec: Codec, payload: bytes) -> float:
    """Bits of a whole payload, header and all, per kept coefficient of its sparse tensors (dense ones left out)."""
    dense = codec.num_params - int(codec.layout.offset[codec.layout.num_sparse])
    return (8 * len(payload) - dense * codec.spec.dense_bits) / int(codec.payload_format.kept.sum())


def floor_bits(spec: CodecSpec) -> float:
    """log2 C(chunk, k) / k for positions without pattern, the value bits, and two fp16 scales per chunk."""
    ways = math.lgamma(spec.chunk + 1) - math.lgamma(spec.k + 1) - math.lgamma(spec.chunk - spec.k + 1)
    return ways / math.log(2) / spec.k + spec.value_bits + 32 / spec.k


def entropy_bits(codec: Codec, payload: bytes) -> float:
    """Measured entropy per coefficient of a payload's gaps and magnitude levels, plus a bit of sign, without scales.

    Order 0, pooled over all chunks: what an ideal coder that knows these statistics would need.
    """
    fmt, section = codec.payload_format, codec.open_section(payload)
    gaps, codes = [], []
    for number in range(section.first_group, section.end_group):
        fields = group.unpack_fields(fmt, number, section.group(number))
        gaps.append(fields.gaps)
        codes.append(fields.codes >> 1)
    return _entropy(np.concatenate(gaps)) + _entropy(np.concatenate(codes)) + 1


def _entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    share = counts[counts > 0] / len(symbols)
    return float(-(share * np.log2(share)).sum())
