"""What can be held against a reducer: its own signed words, which anybody can check alone.

A wrong sum: the reducer has sealed an aggregate, and has signed its answer to an audit, which holds everybody's signed
sections and part of its residual; they do not give this aggregate (`compression/audit.py`). Two sums: it has sealed two
different aggregates of one span in one round. Nothing that others sign or leave out can make an honest reducer guilty.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np
import torch

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError, PayloadError
from dtrain.dht.identity import Identity, bytes_of, verify
from dtrain.dht.kept_residual import Commitment
from dtrain.dht.seals import NOTHING, Seal, Setting, Span, is_section_of

WRONG_SUM, TWO_SUMS = "wrong-sum", "two-sums"
_ANSWER = b"dtrain audit 1\n"


@dataclass(frozen=True)
class ReducedSpan:
    """What a reducer keeps of one sum for a while, to answer for it."""

    setting: Setting
    span: Span
    sections: Sequence[
        tuple[int, bytes, bytes]
    ]  # (index of the sender, section, signature), all that were judged
    aggregate: bytes
    commitment: Commitment  # to the residual after the sum
    before: torch.Tensor  # the residual before it, in units of weight times value
    previous: Commitment | None  # to that one; None = it was all zeros

    @property
    def num_bytes(self) -> int:
        return sum(len(section) for _, section, _ in self.sections) + 4 * len(self.before)


def answer(
    codec: Codec, reduced: ReducedSpan, number: int, identity: Identity
) -> tuple[dict[str, bytes], bytes]:
    """What the audit with this number is answered: header and blob."""
    first, count = audit.opened(codec, reduced.span, number)
    offset = codec.layout.offset
    begin, end = (int(offset[chunk] - offset[reduced.span[0]]) for chunk in (first, first + count))
    leaves_before = reduced.previous.leaves if reduced.previous is not None else ()
    blob = msgpack.packb(
        [
            [[index, signature, section] for index, section, signature in reduced.sections],
            b"".join(reduced.commitment.leaves),
            b"".join(leaves_before),
            reduced.before[begin:end].numpy().tobytes(),
        ]
    )
    signed = identity.key.sign(_answer_message(reduced.commitment.seal, number, blob))
    return {"signature": signed}, blob


def max_answer_bytes(codec: Codec, span: Span, num_members: int) -> int:
    """No answer about that span is longer."""
    leaves = 2 * 32 * (codec.layout.num_groups + codec.num_chunks - codec.layout.num_sparse)
    residual = audit.OPENED_BYTES + 4 * codec.layout.group * codec.layout.chunk
    return num_members * (codec.max_payload_bytes(*span) + 100) + leaves + residual + 1000


def _answer_message(seal: Seal, number: int, blob: bytes) -> bytes:
    return _ANSWER + seal.digest + struct.pack("<Q", number) + hashlib.sha256(blob).digest()


# ---------------------------------------------------------------------- a wrong sum


@dataclass(frozen=True)
class AnsweredAudit:
    """A reducer's seal on an aggregate and its signed answer about it."""

    setting: Setting
    aggregate: bytes
    seal: Seal
    previous: Seal | None  # the one that `seal` goes on from
    number: int  # of the audit
    answer: bytes
    signature: bytes

    @property
    def accused(self) -> str:
        return self.seal.reducer

    def pack(self) -> bytes:
        previous = self.previous.pack() if self.previous is not None else b""
        head = [WRONG_SUM, self.setting.pack(), self.aggregate, self.seal.pack(), previous]
        packed = msgpack.packb([*head, self.number, self.answer, self.signature])
        assert isinstance(packed, bytes)
        return packed

    def fault(self, codec: Codec, run: bytes, *, screens: bool) -> str:
        """What is wrong with the reducer's sum, in words, or "". Raises ValueError when this proves nothing."""
        self._check_is_its_word(codec, run)
        try:
            return self._fault(codec, screens)
        except (PayloadError, CompressionError, ValueError, TypeError) as error:
            return f"its answer does not hold what it must: {error}"

    def _check_is_its_word(self, codec: Codec, run: bytes) -> None:
        setting, seal = self.setting, self.seal
        ids = [peer_id for peer_id, _ in setting.members]
        fits = setting.run == run and seal.setting == setting.digest and seal.reducer in ids
        fits = fits and seal.aggregate == hashlib.sha256(self.aggregate).digest() and seal.is_genuine
        fits = fits and seal.root != NOTHING
        if self.previous is None:
            fits = fits and seal.previous == NOTHING
        else:
            its = self.previous.reducer == seal.reducer and self.previous.is_genuine
            fits = fits and its and self.previous.digest == seal.previous
        message = _answer_message(seal, self.number, self.answer)
        if not (fits and verify(bytes_of(seal.reducer), message, self.signature)):
            raise ValueError("not what that reducer signed")
        first, count = seal.span
        try:
            codec.check_aggregate(
                self.aggregate,
                run=run,
                round=setting.round,
                first_chunk=first,
                num_chunks=count,
                num_members=len(ids),
            )
        except (PayloadError, CompressionError) as error:  # no member takes such a thing for a sum
            raise ValueError(f"not an aggregate: {error}") from None

    def _fault(self, codec: Codec, screens: bool) -> str:
        sent, leaves, leaves_before, before = msgpack.unpackb(self.answer)
        sections = self._signed_sections(codec, sent)
        missing = {index for index, _ in codec.contributors(self.aggregate)} - sections.keys()
        if missing:
            return f"it counts {len(missing)} members whose sections it does not have"
        weights = [weight for _, weight in self.setting.members]
        claimed = [(index, weights[index], section) for index, section in sections.items()]
        wrong = audit.miscounted(codec, self.aggregate, claimed, self.seal.span, screens=screens)
        if wrong:
            return f"it counts {len(wrong)} members for more or less than it must"
        return self._wrong_sum(codec, sections, _split(leaves), _split(leaves_before), before)

    def _signed_sections(self, codec: Codec, sent: Sequence[tuple[int, bytes, bytes]]) -> dict[int, bytes]:
        """By index, as the codec and their senders' signatures allow. Raises PayloadError, ValueError, TypeError."""
        (first, count), setting = self.seal.span, self.setting
        sections: dict[int, bytes] = {}
        for index, signature, section in sent:
            if type(index) is not int or not 0 <= index < len(setting.members) or index in sections:
                raise ValueError("a section of nobody, or two of one")
            sender, _ = setting.members[index]
            if not is_section_of(sender, setting, self.seal.span, section, signature):
                raise ValueError(f"a section that {sender} has not signed")
            codec.check(section, run=setting.run, round=setting.round, first_chunk=first, num_chunks=count)
            sections[index] = section
        return dict(sorted(sections.items()))

    def _wrong_sum(
        self,
        codec: Codec,
        sections: dict[int, bytes],
        leaves: Sequence[bytes],
        leaves_before: Sequence[bytes],
        before: bytes,
    ) -> str:
        first, count = audit.opened(codec, self.seal.span, self.number)
        residual = torch.from_numpy(np.frombuffer(before, "<f4").copy())
        if residual.shape != codec.residual(first, count).shape or not torch.isfinite(residual).all():
            return "its residual has not the form of one"
        of_span = audit.units(codec, *self.seal.span)
        if len(leaves) != len(of_span) or audit.root(leaves) != self.seal.root:
            return "its residual is not the one that it has committed itself to"
        if not self._goes_on(codec, audit.leaves(codec, first, count, residual), leaves_before):
            return "its residual is not the one that its last sum left over"
        same, after = audit.recompute(codec, self.aggregate, sections, residual, first, count)
        if not same:
            return f"chunks {first} to {first + count - 1} are not the sum of its members' sections"
        begin = of_span.index(audit.units(codec, first, count)[0])
        found = audit.leaves(codec, first, count, after)
        if list(leaves[begin : begin + len(found)]) != found:
            return "it has committed itself to another residual than the one that is left over"
        return ""

    def _goes_on(self, codec: Codec, found: Sequence[bytes], leaves_before: Sequence[bytes]) -> bool:
        """Whether these leaves are those of the last seal; what lay in no span of it begins with zeros."""
        committed: dict[tuple[int, int], bytes] = {}
        if self.previous is not None:
            of_span = audit.units(codec, *self.previous.span)
            if len(leaves_before) != len(of_span) or audit.root(leaves_before) != self.previous.root:
                return False
            committed = dict(zip(of_span, leaves_before, strict=True))
        for unit, leaf in zip(audit.units(codec, *self._opened(codec)), found, strict=True):
            [zeros] = audit.leaves(codec, *unit, codec.residual(*unit))
            if leaf != committed.get(unit, zeros):
                return False
        return True

    def _opened(self, codec: Codec) -> tuple[int, int]:
        return audit.opened(codec, self.seal.span, self.number)


# ---------------------------------------------------------------------- two sums


@dataclass(frozen=True)
class TwoSums:
    """Two seals of one reducer for one span of one round."""

    setting: Setting
    seal: Seal
    other: Seal

    @property
    def accused(self) -> str:
        return self.seal.reducer

    def pack(self) -> bytes:
        packed = msgpack.packb([TWO_SUMS, self.setting.pack(), self.seal.pack(), self.other.pack()])
        assert isinstance(packed, bytes)
        return packed

    def fault(self, codec: Codec, run: bytes, *, screens: bool) -> str:
        """As of `AnsweredAudit`."""
        setting, seal, other = self.setting, self.seal, self.other
        fits = setting.run == run and seal.setting == other.setting == setting.digest
        fits = fits and seal.reducer == other.reducer and seal.is_genuine and other.is_genuine
        fits = fits and seal.reducer in dict(setting.members)
        if not fits or seal.aggregate == other.aggregate:
            raise ValueError("not two sums of one reducer")
        return "it has signed two different sums in one round"


Evidence = AnsweredAudit | TwoSums


def unpack(blob: bytes) -> Evidence:
    """What came over the network, its signatures not yet checked. Raises ValueError."""
    try:
        kind, setting, *rest = msgpack.unpackb(blob)
        if kind == TWO_SUMS:
            seal, other = rest
            return TwoSums(Setting.unpack(setting), Seal.unpack(seal), Seal.unpack(other))
        aggregate, seal, previous, number, answered, signature = rest
        fits = kind == WRONG_SUM and all(isinstance(b, bytes) for b in (aggregate, answered, signature))
        if not fits or type(number) is not int or not 0 <= number < 2**64:
            raise ValueError
        before = Seal.unpack(previous) if previous else None
        return AnsweredAudit(
            Setting.unpack(setting), aggregate, Seal.unpack(seal), before, number, answered, signature
        )
    except Exception:  # msgpack and what follows raise half a dozen types
        raise ValueError("not evidence") from None


def reason_of(evidence: Evidence) -> str:
    return WRONG_SUM if isinstance(evidence, AnsweredAudit) else TWO_SUMS


def _split(leaves: bytes) -> list[bytes]:
    return [leaves[at : at + 32] for at in range(0, len(leaves), 32)]
