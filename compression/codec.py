"""The codec: tensors to payloads, payloads to aggregates, aggregates to tensors.

A payload is what one worker sends: of every chunk its k largest values after error feedback. A span is a
range of chunks; an aggregate is what a reducer makes of everyone's payload for one span. WIRE.md describes
the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dtrain.compression import aggregate as agg
from dtrain.compression import wire
from dtrain.compression.dense_part import DensePart
from dtrain.compression.errors import CompressionError, PayloadError
from dtrain.compression.kernels import pick
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.layout import Layout, Shapes
from dtrain.compression.section import Section, SectionFormat
from dtrain.compression.spec import CodecSpec
from dtrain.compression.tensors import check_flat, check_sources, clear_rest, outputs

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
        self.payload_format = SectionFormat(self.layout, spec.k, spec.value_bits, spec.dense_bits)
        self.aggregate_format = SectionFormat(self.layout, *spec.of_aggregates, spec.dense_bits)
        self._dense = DensePart(self.layout, spec.dense_bits)
        self._id = wire.codec_id(spec, self.shapes)
        self._num_sparse_elements = int(self.layout.offset[self.layout.num_sparse])

    def error_feedback(self, device: str = "cpu") -> torch.Tensor:
        """A fresh error feedback: zeros, fp32, [feedback_numel], every element once, in chunk order.

        device: "cuda" keeps it on the GPU where the deltas are, if this machine has a kernel for that.
        """
        on_gpu = device == "cuda" and pick.kernel(device).name == "triton"
        return torch.zeros(self.feedback_numel, device=device if on_gpu else "cpu")

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
        check_flat("error feedback", feedback, self.feedback_numel)
        _check_place(run, round)
        kernel = self._kernel_for(feedback)
        check_sources(self.layout, tensors, kernel)
        sparse, dense = feedback[: self._num_sparse_elements], feedback[self._num_sparse_elements :]
        lengths, groups = kernel.encode(self.payload_format, tensors, sparse, decay, self.spec.transform)
        self._dense.fold(tensors, dense, decay)
        sent = self._dense.send(dense, self.layout.num_sparse, self.num_chunks)
        body = self.payload_format.join(lengths, groups, sent)
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
        self._check_body(self.payload_format, body, *place)

    def _match(self, head: wire.Header, run: bytes, round: int, place: tuple[int, int]) -> None:
        wire.match_header(
            head, codec=self._id, run=run, round=round, first_chunk=place[0], num_chunks=place[1]
        )

    def cut(self, payload: bytes, first_chunk: int, num_chunks: int) -> bytes:
        """The part of a valid payload that covers a range, itself a valid payload; no value is decoded. Raises
        PayloadError "wrong-range" when the payload does not cover it.
        """
        self.layout.split(first_chunk, num_chunks)
        head, section = self._open(payload)
        if first_chunk < head.first_chunk or first_chunk + num_chunks > head.first_chunk + head.num_chunks:
            there, asked = f"{head.first_chunk} + {head.num_chunks}", f"{first_chunk} + {num_chunks}"
            raise PayloadError("wrong-range", f"covers chunks {there}, not all of {asked}")
        body = self.payload_format.cut(section, first_chunk, num_chunks)
        return wire.seal(wire.PAYLOAD, self._id, head.run, head.round, (first_chunk, num_chunks), body)

    def give_back(self, feedback: torch.Tensor, payload: bytes, first_chunk: int, num_chunks: int) -> None:
        """Add what that range of a payload sent back into the feedback that it was taken from."""
        check_flat("error feedback", feedback, self.feedback_numel)
        _, section = self._open(self.cut(payload, first_chunk, num_chunks))
        self._add(self.payload_format, section, 1.0, feedback[self.layout.elements(first_chunk, num_chunks)])

    def spans(self, shares: Sequence[float]) -> list[tuple[int, int]]:
        """Divide all chunks among reducers in proportion to their shares, in nominal bytes.

        Returns (first chunk, number of chunks) per reducer, one after another; they begin and end on
        boundaries of groups. Deterministic. A share of 0 gives an empty span; so may one that is smaller than
        a group.
        """
        return agg.spans(self.layout, self.payload_format.nominal_bits(), shares)

    def max_payload_bytes(self, first_chunk: int, num_chunks: int) -> int:
        """No payload of this range that `encode` writes is longer; what a receiver should at most take in."""
        return wire.HEADER_BYTES + self.payload_format.max_bytes(first_chunk, num_chunks)

    def max_aggregate_bytes(self, first_chunk: int, num_chunks: int, num_members: int) -> int:
        """The same for an aggregate of up to `num_members` contributors, of either kind."""
        union = num_members * self.max_payload_bytes(first_chunk, num_chunks)
        recompressed = self.aggregate_format.max_bytes(first_chunk, num_chunks)
        return wire.HEADER_BYTES + num_members * wire.CONTRIBUTOR_BYTES + max(union, recompressed)

    def reduce(
        self,
        sections: Sequence[tuple[int, float, bytes]],
        *,
        residual: torch.Tensor | None = None,
        refused: Mapping[int, str] | None = None,
        run: bytes,
        round: int,
        first_chunk: int,
        num_chunks: int,
    ) -> bytes:
        """Make a span's aggregate of (contributor index, weight, payload cut to this range and checked).

        Without `residual`: the exact union, every contributor's payload as it came. With it (from
        `residual()`, updated in place): the weighted mean plus the residual, compressed again with
        aggregate_k and aggregate_bits; it then also names whom the reducer has `refused`
        {contributor index: one of wire.REFUSALS}.
        """
        self.layout.split(first_chunk, num_chunks)
        _check_place(run, round)
        ordered = sorted(sections, key=lambda section: section[0])
        contributors = agg.check_contributors([(index, weight) for index, weight, _ in ordered])
        place = (first_chunk, num_chunks)
        if residual is None:
            head = wire.pack_contributors(contributors)
            parts = [head, *(payload for _, _, payload in ordered)]
            return wire.seal(wire.UNION, self._id, run, round, place, parts, len(ordered))
        agg.check_refused(refused or {}, contributors)
        head = wire.pack_contributors(contributors, refused)
        check_flat(f"residual of chunks {place}", residual, self._numel(*place))
        opened = [self._open(payload, place)[1] for _, _, payload in ordered]
        for weight, section in zip(agg.normalized(contributors), opened, strict=True):
            self._add(self.payload_format, section, weight, residual)
        first_group, end_group, first_dense, end_dense = self.layout.split(*place)
        fmt, cut = (
            self.aggregate_format,
            self._numel(first_chunk, first_dense - first_chunk if first_group < end_group else 0),
        )
        lengths, groups = self.kernel.compress(fmt, residual[:cut], first_group, end_group)
        body = fmt.join(lengths, groups, self._dense.send(residual[cut:], first_dense, end_dense))
        num_named = len(ordered) + len(refused or {})
        return wire.seal(wire.RECOMPRESSED, self._id, run, round, place, [head, *body], num_named)

    def check_aggregate(
        self, aggregate: bytes, *, run: bytes, round: int, first_chunk: int, num_chunks: int, num_members: int
    ) -> None:
        """Raise PayloadError unless `aggregate` is valid, covers just this range and names only members."""
        self.layout.split(first_chunk, num_chunks)
        head, body = wire.open_header(aggregate, _AGGREGATES)
        self._match(head, run, round, (first_chunk, num_chunks))
        contributors, rest = wire.unpack_contributors(head, body)
        named = [index for index, _ in contributors] + list(wire.unpack_refused(head, body))
        agg.check_members(named, num_members)
        if head.kind == wire.RECOMPRESSED:
            self._check_body(self.aggregate_format, rest, first_chunk, num_chunks)
            return
        for section in agg.split_union(rest, len(contributors)):
            self._check(section, run, round, (first_chunk, num_chunks), checksum=False)  # the whole has one

    def contributors(self, aggregate: bytes) -> tuple[tuple[int, float], ...]:
        """(index in the group's canonical order, weight) of everyone whose payload is in the aggregate."""
        head, body = wire.open_header(aggregate, _AGGREGATES, checksum=False)
        return tuple(wire.unpack_contributors(head, body)[0])

    def refused(self, aggregate: bytes) -> dict[int, str]:
        """By index in the group's canonical order: whom the aggregate's reducer has left out, and which of
        wire.REFUSALS is the reason. A member that is neither here nor a contributor has not been heard.
        """
        head, body = wire.open_header(aggregate, _AGGREGATES, checksum=False)
        return wire.unpack_refused(head, body)

    def union(self, aggregate: bytes) -> list[tuple[int, bytes]]:
        """(contributor index, its payload) of a checked exact union; [] of a recompressed aggregate."""
        head, body = wire.open_header(aggregate, _AGGREGATES, checksum=False)
        contributors, rest = wire.unpack_contributors(head, body)
        if head.kind == wire.RECOMPRESSED:
            return []
        sections = agg.split_union(rest, len(contributors))
        return [(index, bytes(section)) for (index, _), section in zip(contributors, sections, strict=True)]

    def span_of(self, aggregate: bytes) -> tuple[int, int]:
        """(first chunk, number of chunks) that a checked aggregate covers."""
        head, _ = wire.open_header(aggregate, _AGGREGATES, checksum=False)
        return head.first_chunk, head.num_chunks

    def decode(
        self, aggregates: Sequence[bytes], *, out: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Decode checked aggregates of disjoint spans into fp32 tensors of the codec's shapes.

        An element is the weighted mean over its span's contributors (an absent coefficient counts as 0);
        chunks in no aggregate are 0. Sums run in contributor order: without a transform the result is
        bit-identical on every machine, for any number of threads, and for unions also for any division into
        spans. out: contiguous fp32 tensors to write into, such as an earlier result; saves the time of
        new memory.
        """
        tensors = outputs(self.layout, out)
        covered: list[tuple[int, int]] = []
        for data in aggregates:
            head, body = wire.open_header(data, _AGGREGATES, checksum=False)
            self._match(head, head.run, head.round, (head.first_chunk, head.num_chunks))
            agg.check_range(self.layout, head.first_chunk, head.num_chunks)
            agg.check_disjoint(covered, head.first_chunk, head.num_chunks)
            contributors, rest = wire.unpack_contributors(head, body)
            if head.kind == wire.RECOMPRESSED:
                fmt = self.aggregate_format
                weighted = [(1.0, fmt.parse(rest, head.first_chunk, head.num_chunks))]
            else:
                fmt = self.payload_format
                sections = agg.split_union(rest, len(contributors))
                place = head.first_chunk, head.num_chunks
                opened = [self._open(section, place)[1] for section in sections]
                weighted = list(zip(agg.normalized(contributors), opened, strict=True))
            if weighted[0][1].first_group < weighted[0][1].end_group:
                self._kernel_for(tensors[0]).decode(fmt, weighted, tensors, self.spec.transform)
            self._dense.decode(weighted, tensors)
        if sum(count for _, count in covered) < self.num_chunks:
            clear_rest(self.layout, covered, tensors)
        return tensors

    def _kernel_for(self, tensor: torch.Tensor) -> Kernel:
        """The kernel for the place where a feedback or an output is."""
        return self.kernel if tensor.device.type == "cpu" else pick.kernel(tensor.device.type)

    def _numel(self, first_chunk: int, num_chunks: int) -> int:
        offset = self.layout.offset
        return int(offset[first_chunk + num_chunks] - offset[first_chunk])

    def values(self, payload: bytes) -> torch.Tensor:
        """What a checked payload or recompressed aggregate says of its range: fp32, its elements in chunk order."""
        head, body = wire.open_header(payload, (wire.PAYLOAD, wire.RECOMPRESSED), checksum=False)
        fmt = self.payload_format if head.kind == wire.PAYLOAD else self.aggregate_format
        entries = head.num_contributors * wire.CONTRIBUTOR_BYTES
        out = torch.zeros(self._numel(head.first_chunk, head.num_chunks))
        self._add(fmt, fmt.parse(body[entries:], head.first_chunk, head.num_chunks), 1.0, out)
        return out

    def open_section(self, payload: bytes) -> Section:
        """Where the groups of a checked payload are, for those who want to look inside."""
        return self._open(payload)[1]

    def _open(
        self, payload: bytes | memoryview, place: tuple[int, int] | None = None
    ) -> tuple[wire.Header, Section]:
        head, body = wire.open_header(payload, (wire.PAYLOAD,), checksum=False)
        self._match(head, head.run, head.round, place or (head.first_chunk, head.num_chunks))
        agg.check_range(self.layout, head.first_chunk, head.num_chunks)
        return head, self.payload_format.parse(body, head.first_chunk, head.num_chunks)

    def _check_body(self, fmt: SectionFormat, body: memoryview, first_chunk: int, num_chunks: int) -> None:
        section = fmt.parse(body, first_chunk, num_chunks)
        self.kernel.check(fmt, section)
        self._dense.check(section)

    def _add(self, fmt: SectionFormat, section: Section, weight: float, out: torch.Tensor) -> None:
        offset = self.layout.offset
        cut = len(out) - int(offset[section.end_dense] - offset[section.first_dense])
        if cut:
            self._kernel_for(out).add(fmt, section, weight, out[:cut])
        self._dense.add(section, weight, out[cut:])


def _check_place(run: bytes, round: int) -> None:
    if len(run) != wire.RUN_TAG_BYTES:
        raise CompressionError(f"run must be {wire.RUN_TAG_BYTES} bytes, not {len(run)}")
    if not 0 <= round <= wire.MAX_ROUND:
        raise CompressionError(f"round must be 0 to {wire.MAX_ROUND}, not {round}")
