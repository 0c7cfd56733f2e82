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
from dtrain.compression.dense_part import DensePart
from dtrain.compression.errors import CompressionError
from dtrain.compression.kernels import pick
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.layout import Layout, Shapes
from dtrain.compression.section import Section, SectionFormat
from dtrain.compression.spec import CodecSpec

_AGGREGATES = (wire.UNION, wire.RECOMPRESSED)


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
        self._dense = DensePart(self.layout, spec.dense_bits)
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
        self._dense.fold(tensors, dense, decay)
        sent = self._dense.send(dense, self.layout.num_sparse, self.num_chunks)
        body = self._format.join(lengths, groups, sent)
        return wire.seal(wire.PAYLOAD, self._id, run, round, (0, self.num_chunks), body)

    def check(self, payload: bytes, *, run: bytes, round: int, first_chunk: int, num_chunks: int) -> None:
        """Raise PayloadError unless `payload` is valid, of this run and round, and covers just this range."""
        self.layout.split(first_chunk, num_chunks)
        self._check(payload, run, round, (first_chunk, num_chunks), checksum=True)

    def _check(
        self, payload: bytes | memoryview, run: bytes, round: int, place: tuple[int, int], *, checksum: bool
    ) -> None:
        head, body = wire.open_header(payload, (wire.PAYLOAD,), checksum=checksum)
        self._match(head, run, round, place)
        self._check_body(self._format, body, *place)

    def _match(self, head: wire.Header, run: bytes, round: int, place: tuple[int, int]) -> None:
        wire.match_header(
            head, codec=self._id, run=run, round=round, first_chunk=place[0], num_chunks=place[1]
        )

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
        body = fmt.join(lengths, groups, self._dense.send(residual[cut:], first_dense, end_dense))
        return wire.seal(wire.RECOMPRESSED, self._id, run, round, place, [head, *body], len(ordered))

    def check_aggregate(
        self, aggregate: bytes, *, run: bytes, round: int, first_chunk: int, num_chunks: int, num_members: int
    ) -> None:
        """Raise PayloadError unless `aggregate` is valid, covers just this range and names only members."""
        self.layout.split(first_chunk, num_chunks)
        head, body = wire.open_header(aggregate, _AGGREGATES)
        self._match(head, run, round, (first_chunk, num_chunks))
        contributors, rest = wire.unpack_contributors(head, body)
        agg.check_members(contributors, num_members)
        if head.kind == wire.RECOMPRESSED:
            self._check_body(self._aggregate_format, rest, first_chunk, num_chunks)
            return
        for section in agg.split_union(rest, len(contributors)):
            self._check(section, run, round, (first_chunk, num_chunks), checksum=False)  # the whole has one

    def contributors(self, aggregate: bytes) -> tuple[tuple[int, float], ...]:
        """(index in the group's canonical order, weight) of everyone whose payload is in the aggregate."""
        head, body = wire.open_header(aggregate, _AGGREGATES, checksum=False)
        return tuple(wire.unpack_contributors(head, body)[0])

    def decode(
        self, aggregates: Sequence[bytes], *, out: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Decode checked aggregates of disjoint spans into fp32 tensors of the codec's shapes.

        An element is the weighted mean over its span's contributors (an absent coefficient counts as 0);
        chunks in no aggregate are 0. Sums run in contributor order: without a transform the result is
        bit-identical on every machine, for any number of threads, and for unions also for any division into
        spans. out: contiguous fp32 CPU tensors to write into, such as an earlier result; saves the time of
        new memory.
        """
        outputs = self._outputs(out)
        covered: list[tuple[int, int]] = []
        for data in aggregates:
            head, body = wire.open_header(data, _AGGREGATES, checksum=False)
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
        if sum(count for _, count in covered) < self.num_chunks:
            self._clear(covered, outputs)
        return outputs

    def _outputs(self, out: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
        if out is None:
            # One array: numpy asks the system for huge pages then, which are far quicker to come by than
            # small ones.
            flat = torch.from_numpy(np.empty(self.num_params, np.float32))
            return [
                t.view(s) for t, (_, s) in zip(flat.split(list(self.layout.numels)), self.shapes, strict=True)
            ]
        self._check_shapes(out)
        for (name, _), tensor in zip(self.shapes, out, strict=True):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise CompressionError(f"output {name!r} must be contiguous fp32 on the CPU")
        return list(out)

    def _clear(self, covered: list[tuple[int, int]], outputs: list[torch.Tensor]) -> None:
        """Set the chunks that no aggregate covers to 0."""
        rest = np.ones(self.num_chunks, bool)
        for first, count in covered:
            rest[first : first + count] = False
        for chunk in np.flatnonzero(rest).tolist():
            self.layout.view(outputs[int(self.layout.tensor[chunk])], chunk).zero_()

    def _numel(self, first_chunk: int, num_chunks: int) -> int:
        offset = self.layout.offset
        return int(offset[first_chunk + num_chunks] - offset[first_chunk])

    def _open(self, payload: bytes | memoryview) -> tuple[wire.Header, Section]:
        head, body = wire.open_header(payload, (wire.PAYLOAD,), checksum=False)
        self._match(head, head.run, head.round, (head.first_chunk, head.num_chunks))
        agg.check_range(self.layout, head.first_chunk, head.num_chunks)
        return head, self._format.parse(body, head.first_chunk, head.num_chunks)

    def _check_body(self, fmt: SectionFormat, body: memoryview, first_chunk: int, num_chunks: int) -> None:
        section = fmt.parse(body, first_chunk, num_chunks)
        self.kernel.check(fmt, section)
        self._dense.check(section)

    def _add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        offset = self.layout.offset
        cut = len(out) - int(offset[section.end_dense] - offset[section.first_dense])
        if cut:
            self.kernel.add(fmt, section, weight, out[:cut])
        self._dense.add(section, weight, out[cut:])

    def _decode(
        self, fmt: SectionFormat, sections: list[tuple[float, Section]], outputs: list[torch.Tensor]
    ) -> None:
        if sections[0][1].first_group < sections[0][1].end_group:
            self.kernel.decode(fmt, sections, outputs, self.spec.transform)
        self._dense.decode(sections, outputs)

    def _check_feedback(self, feedback: torch.Tensor) -> None:
        if feedback.shape != (self.feedback_numel,) or feedback.dtype != torch.float32:
            raise CompressionError(
                f"error feedback must be fp32 [{self.feedback_numel}] from error_feedback(), not "
                f"{feedback.dtype} {list(feedback.shape)}"
            )

    def _check_shapes(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self.shapes):
            raise CompressionError(f"{len(tensors)} tensors given, the codec was made for {len(self.shapes)}")
        for (name, shape), tensor in zip(self.shapes, tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise CompressionError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")

    def _check_sources(self, tensors: Sequence[torch.Tensor]) -> None:
        self._check_shapes(tensors)
        for (name, _), tensor in zip(self.shapes, tensors, strict=True):
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
