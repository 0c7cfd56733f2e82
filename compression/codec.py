"""The codec: tensors to payloads, payloads to aggregates, aggregates to tensors.

A payload is what one worker sends: of every chunk its k largest values after error feedback. A span is a
range of chunks; an aggregate is what a reducer makes of everyone's payload for one span. WIRE.md describes
the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dtrain.compression import aggregate as agg
from dtrain.compression import wire
from dtrain.compression.dense import decode_dense, encode_dense
from dtrain.compression.errors import CompressionError
from dtrain.compression.kernels import pick
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.layout import Layout, Shapes
from dtrain.compression.section import Section, SectionFormat
from dtrain.compression.spec import CodecSpec


class Codec:
    """Top-k codec with error feedback for a fixed list of tensors.

    One instance holds no state between calls but the layout: error feedback and residuals belong to the
    caller.
    """

    def __init__(self, spec: CodecSpec, shapes: Shapes, *, kernel: Kernel | None = None) -> None:
        """`shapes`: (name, shape) of every tensor in a fixed order. `kernel` is for tests and benchmarks."""
        self.spec = spec
        self.layout = Layout(spec, shapes)
        self.shapes = self.layout.shapes
        self.num_params = self.layout.num_params
        self.num_chunks = self.layout.num_chunks
        self.feedback_numel = self.layout.num_params
        self.kernel = kernel or pick.kernel()
        self._format = SectionFormat(self.layout, spec.k, spec.value_bits, spec.dense_bits)
        k, bits = spec.aggregate_k or spec.k, spec.aggregate_bits or spec.value_bits
        self._aggregate_format = SectionFormat(self.layout, k, bits, spec.dense_bits)
        self._id = wire.codec_id(spec, self.shapes)
        self._num_sparse_elements = int(self.layout.offset[self.layout.num_sparse])

    def error_feedback(self) -> torch.Tensor:
        """A fresh error feedback: zeros, fp32, [feedback_numel], every element once, in chunk order."""
        return torch.zeros(self.feedback_numel)

    def residual(self, first_chunk: int, num_chunks: int) -> torch.Tensor:
        """A fresh reducer residual for a span: zeros, fp32, its elements in chunk order."""
        return torch.zeros(self._numel(first_chunk, num_chunks))

    def encode(
        self, tensors: Sequence[torch.Tensor], feedback: torch.Tensor, *, decay: float, run: bytes, round: int
    ) -> bytes:
        """Write a payload: a = decay * feedback + tensors, payload = quantized top-k of a, feedback <- a -
        payload.

        tensors: of the codec's shapes, any float dtype, contiguous or not. run: 8 bytes that name the run.
        Raises CompressionError that names the tensor when its shape is wrong or it holds NaN or infinity; the
        feedback is then untouched.
        """
        self._check_feedback(feedback)
        _check_place(run, round)
        self._check_sources(tensors)
        sparse, dense = feedback[: self._num_sparse_elements], feedback[self._num_sparse_elements :]
        lengths, groups = self.kernel.encode(self._format, tensors, sparse, decay, self.spec.transform)
        dense.mul_(decay).add_(self._gather_dense(tensors))
        body = self._format.join(
            lengths, groups, self._send_dense(dense, self.layout.num_sparse, self.num_chunks)
        )
        return wire.seal(wire.PAYLOAD, self._id, run, round, (0, self.num_chunks), body)

    def check(self, payload: bytes, *, run: bytes, round: int, first_chunk: int, num_chunks: int) -> None:
        """Raise PayloadError unless `payload` is valid, of this run and round, and covers just this range."""
        self.layout.split(first_chunk, num_chunks)
        head, body = wire.open_header(payload, (wire.PAYLOAD,))
        place = {"run": run, "round": round, "first_chunk": first_chunk, "num_chunks": num_chunks}
        wire.match_header(head, codec=self._id, **place)  # type: ignore[arg-type]
        self._check_body(self._format, body, first_chunk, num_chunks)

    def cut(self, payload: bytes, first_chunk: int, num_chunks: int) -> bytes:
        """The part of a valid payload that covers a range, itself a valid payload; no value is decoded."""
        self.layout.split(first_chunk, num_chunks)
        head, section = self._open(payload)
        if first_chunk < head.first_chunk or first_chunk + num_chunks > head.first_chunk + head.num_chunks:
            raise CompressionError(f"chunks {first_chunk} + {num_chunks} are not all in this payload")
        body = self._format.cut(section, first_chunk, num_chunks)
        return wire.seal(wire.PAYLOAD, self._id, head.run, head.round, (first_chunk, num_chunks), body)

    def give_back(self, feedback: torch.Tensor, payload: bytes, first_chunk: int, num_chunks: int) -> None:
        """Add what that range of a payload sent back into the feedback that it was taken from."""
        self._check_feedback(feedback)
        _, section = self._open(self.cut(payload, first_chunk, num_chunks))
        self._add(self._format, section, 1.0, feedback[self.layout.elements(first_chunk, num_chunks)])

    def spans(self, shares: Sequence[float]) -> list[tuple[int, int]]:
        """Divide all chunks among reducers in proportion to their shares, in nominal bytes.

        Returns (first chunk, number of chunks) per reducer, one after another; they begin and end on
        boundaries of groups. Deterministic. A share of 0 gives an empty span; so may one that is smaller than
        a group.
        """
        return agg.spans(self.layout, self._format.nominal_bits(), shares)

    def max_payload_bytes(self, first_chunk: int, num_chunks: int) -> int:
        """No payload of this range that `encode` writes is longer; what a receiver should at most take in."""
        return wire.HEADER_BYTES + self._format.max_bytes(first_chunk, num_chunks)

    def max_aggregate_bytes(self, first_chunk: int, num_chunks: int, num_members: int) -> int:
        """The same for an aggregate of up to `num_members` contributors, of either kind."""
        union = num_members * self.max_payload_bytes(first_chunk, num_chunks)
        recompressed = self._aggregate_format.max_bytes(first_chunk, num_chunks)
        return wire.HEADER_BYTES + num_members * wire.CONTRIBUTOR_BYTES + max(union, recompressed)

    def reduce(
        self,
        sections: Sequence[tuple[int, float, bytes]],
        *,
        residual: torch.Tensor | None = None,
        run: bytes,
        round: int,
        first_chunk: int,
        num_chunks: int,
    ) -> bytes:
        """Make a span's aggregate of (contributor index, weight, payload cut to this range and checked).

        Without `residual`: the exact union, every contributor's payload as it came. With it (from
        `residual()`, updated in place): the weighted mean plus the residual, compressed again with
        aggregate_k and aggregate_bits.
        """
        self.layout.split(first_chunk, num_chunks)
        _check_place(run, round)
        ordered = sorted(sections, key=lambda section: section[0])
        contributors = agg.check_contributors([(index, weight) for index, weight, _ in ordered])
        place = (first_chunk, num_chunks)
        head = wire.pack_contributors(contributors)
        if residual is None:
            parts = [head, *(payload for _, _, payload in ordered)]
            return wire.seal(wire.UNION, self._id, run, round, place, parts, len(ordered))
        if residual.shape != (self._numel(*place),) or residual.dtype != torch.float32:
            raise CompressionError(f"the residual of chunks {place} must be fp32 [{self._numel(*place)}]")
        opened = [self._open(payload)[1] for _, _, payload in ordered]
        for weight, section in zip(agg.normalized(contributors), opened, strict=True):
            self._add(self._format, section, weight, residual)
        first_group, end_group, first_dense, end_dense = self.layout.split(*place)
        fmt, cut = (
            self._aggregate_format,
            self._numel(first_chunk, first_dense - first_chunk if first_group < end_group else 0),
        )
        lengths, groups = self.kernel.compress(fmt, residual[:cut], first_group, end_group)
        body = fmt.join(lengths, groups, self._send_dense(residual[cut:], first_dense, end_dense))
        return wire.seal(wire.RECOMPRESSED, self._id, run, round, place, [head, *body], len(ordered))

    def check_aggregate(
        self, aggregate: bytes, *, run: bytes, round: int, first_chunk: int, num_chunks: int, num_members: int
    ) -> None:
        """Raise PayloadError unless `aggregate` is valid, covers just this range and names only members."""
        self.layout.split(first_chunk, num_chunks)
        head, body = wire.open_header(aggregate, (wire.UNION, wire.RECOMPRESSED))
        place = {"run": run, "round": round, "first_chunk": first_chunk, "num_chunks": num_chunks}
        wire.match_header(head, codec=self._id, **place)  # type: ignore[arg-type]
        contributors, rest = wire.unpack_contributors(head, body)
        agg.check_members(contributors, num_members)
        if head.kind == wire.RECOMPRESSED:
            self._check_body(self._aggregate_format, rest, first_chunk, num_chunks)
            return
        for section in agg.split_union(rest, len(contributors)):
            self.check(section, run=run, round=round, first_chunk=first_chunk, num_chunks=num_chunks)  # type: ignore[arg-type]

    def contributors(self, aggregate: bytes) -> tuple[tuple[int, float], ...]:
        """(index in the group's canonical order, weight) of everyone whose payload is in the aggregate."""
        head, body = wire.open_header(aggregate, (wire.UNION, wire.RECOMPRESSED))
        return tuple(wire.unpack_contributors(head, body)[0])

    def decode(self, aggregates: Sequence[bytes]) -> list[torch.Tensor]:
        """Decode checked aggregates of disjoint spans into fp32 tensors of the codec's shapes.

        An element is the weighted mean over its span's contributors (an absent coefficient counts as 0);
        chunks in no aggregate are 0. Sums run in contributor order: without a transform the result is
        bit-identical on every machine, for any number of threads, and for unions also for any division into
        spans.
        """
        outputs = [torch.zeros(shape) for _, shape in self.shapes]
        covered: list[tuple[int, int]] = []
        for data in aggregates:
            head, body = wire.open_header(data, (wire.UNION, wire.RECOMPRESSED))
            agg.check_disjoint(covered, head.first_chunk, head.num_chunks)
            contributors, rest = wire.unpack_contributors(head, body)
            if head.kind == wire.RECOMPRESSED:
                place = (head.first_chunk, head.num_chunks)
                self._decode(
                    self._aggregate_format, [(1.0, self._aggregate_format.parse(rest, *place))], outputs
                )
                continue
            bodies = agg.split_union(rest, len(contributors))
            opened = [self._open(section)[1] for section in bodies]
            weighted = list(zip(agg.normalized(contributors), opened, strict=True))
            self._decode(self._format, weighted, outputs)
        return outputs

    def _numel(self, first_chunk: int, num_chunks: int) -> int:
        offset = self.layout.offset
        return int(offset[first_chunk + num_chunks] - offset[first_chunk])

    def _open(self, payload: bytes | memoryview) -> tuple[wire.Header, Section]:
        head, body = wire.open_header(payload, (wire.PAYLOAD,))
        place = {"first_chunk": head.first_chunk, "num_chunks": head.num_chunks}
        wire.match_header(head, codec=self._id, run=head.run, round=head.round, **place)
        agg.check_range(self.layout, head.first_chunk, head.num_chunks)
        return head, self._format.parse(body, head.first_chunk, head.num_chunks)

    def _check_body(self, fmt: SectionFormat, body: memoryview, first_chunk: int, num_chunks: int) -> None:
        section = fmt.parse(body, first_chunk, num_chunks)
        self.kernel.check(fmt, section)
        decode_dense(
            section.dense, fmt.dense_bits, *self._dense_blocks(section.first_dense, section.end_dense)
        )

    def _dense_blocks(self, first: int, end: int) -> tuple[np.ndarray, int]:
        """(start of each dense block from the first, number of elements)."""
        offset = self.layout.offset
        return offset[first:end] - offset[first], int(offset[end] - offset[first])

    def _gather_dense(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        small = [t for t, n in zip(tensors, self.layout.numels, strict=True) if 0 < n < self.spec.chunk]
        flat = [t.detach().to(device="cpu", dtype=torch.float32).reshape(-1) for t in small]
        return torch.cat(flat) if flat else torch.zeros(0)

    def _send_dense(self, values: torch.Tensor, first: int, end: int) -> bytes:
        """Bytes of dense chunks; subtracts what they hold from `values`, in place."""
        starts, count = self._dense_blocks(first, end)
        data = encode_dense(values.numpy(), self.spec.dense_bits, starts)
        values -= torch.from_numpy(
            decode_dense(np.frombuffer(data, np.uint8), self.spec.dense_bits, starts, count)
        )
        return data

    def _add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        starts, count = self._dense_blocks(section.first_dense, section.end_dense)
        sparse = out[: len(out) - count]
        if len(sparse):
            self.kernel.add(fmt, section, weight, sparse)
        dense = torch.from_numpy(decode_dense(section.dense, fmt.dense_bits, starts, count))
        out[len(sparse) :] += dense * np.float32(weight).item()

    def _decode(
        self, fmt: SectionFormat, sections: list[tuple[float, Section]], outputs: list[torch.Tensor]
    ) -> None:
        whole = sections[0][1]
        if whole.first_group < whole.end_group:
            self.kernel.decode(fmt, sections, outputs, self.spec.transform)
        starts, count = self._dense_blocks(whole.first_dense, whole.end_dense)
        if not count:
            return
        sums = torch.zeros(count)
        for weight, section in sections:
            dense = torch.from_numpy(decode_dense(section.dense, fmt.dense_bits, starts, count))
            sums += dense * np.float32(weight).item()
        layout = self.layout
        for chunk in range(whole.first_dense, whole.end_dense):
            size, start, at = (
                int(layout.size[chunk]),
                int(layout.start[chunk]),
                int(starts[chunk - whole.first_dense]),
            )
            outputs[int(layout.tensor[chunk])].view(-1)[start : start + size] = sums[at : at + size]

    def _check_feedback(self, feedback: torch.Tensor) -> None:
        if feedback.shape != (self.feedback_numel,) or feedback.dtype != torch.float32:
            raise CompressionError(
                f"error feedback must be fp32 [{self.feedback_numel}] from error_feedback(), not "
                f"{feedback.dtype} {list(feedback.shape)}"
            )

    def _check_sources(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self.shapes):
            raise CompressionError(f"{len(tensors)} tensors given, the codec was made for {len(self.shapes)}")
        for (name, shape), tensor in zip(self.shapes, tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise CompressionError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
            if not tensor.is_floating_point():
                raise CompressionError(f"tensor {name!r} is {tensor.dtype}, expected a float type")
            # A sum is finite only if every term is; it may overflow without a culprit, so look again before
            # refusing.
            if not math.isfinite(float(tensor.sum(dtype=torch.float32))) and not bool(
                tensor.isfinite().all()
            ):
                raise CompressionError(f"tensor {name!r} holds NaN or infinity; nothing was encoded")


def _check_place(run: bytes, round: int) -> None:
    if len(run) != wire.RUN_TAG_BYTES:
        raise CompressionError(f"run must be {wire.RUN_TAG_BYTES} bytes, not {len(run)}")
    if not 0 <= round <= wire.MAX_ROUND:
        raise CompressionError(f"round must be 0 to {wire.MAX_ROUND}, not {round}")
