"""Laws of signatures and audits: what an honest reducer does is never held against it, what a cheat does is proven to
everybody, and nobody can be framed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import pytest
import torch
from round_tools import (
    BASE,
    CODEC,
    IDENTITIES,
    NUM_ELEMENTS,
    PEERS,
    ROUND,
    RUN,
    Group,
    make_payload,
    play,
    quicken,
)

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.plausible import implausible
from dtrain.compression.spec import CodecSpec
from dtrain.dht import evidence
from dtrain.dht.evidence import AnsweredAudit, ReducedSpan, TwoSums
from dtrain.dht.faults import Fault, FaultPlan
from dtrain.dht.kept_residual import KeptResidual
from dtrain.dht.seals import (
    Seal,
    Setting,
    check_stamp,
    is_section_of,
    sign_aggregate,
    sign_section,
)
from dtrain.experiments.bench_exchange_audit import measure

MEMBERS = 5


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(audit, "OPENED_BYTES", 4 * 64 * 32)  # one group at a time


def common(seed: int) -> bytes:
    """Updates that point roughly one way."""
    one_way = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(1000))
    noise = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(seed))
    return CODEC.encode([one_way + noise], CODEC.error_feedback(), decay=1.0, run=RUN, round=ROUND)


def play_rounds(
    num: int, *, screens: bool = False, faults: dict[int, FaultPlan] | None = None
) -> list[Group]:
    """Rounds of the same members, one after another, each going on with the residuals of the last."""
    groups: list[Group] = []

    async def scenario() -> None:
        for number in range(num):
            last = number == num - 1
            group = Group(
                MEMBERS,
                recompress=True,
                screens=screens,
                payloads=[common(10 * number + i) for i in range(MEMBERS)],
                after=groups[-1] if groups else None,
                faults=(faults or {}) if last else {},
            )
            await group.run()
            groups.append(group)

    play(scenario)
    return groups


def kept(group: Group, reducer: int) -> ReducedSpan:
    found = group.runners[reducer].kept
    assert found is not None
    return found


def audited(group: Group, reducer: int, number: int = 0, reduced: ReducedSpan | None = None) -> AnsweredAudit:
    """As a member would have it after asking."""
    reduced = reduced or kept(group, reducer)
    header, blob = evidence.answer(CODEC, reduced, number, IDENTITIES[reducer])
    assert len(blob) <= evidence.max_answer_bytes(CODEC, reduced.span, MEMBERS)
    previous = reduced.previous.seal if reduced.previous is not None else None
    return AnsweredAudit(
        reduced.setting,
        reduced.aggregate,
        reduced.commitment.seal,
        previous,
        number,
        blob,
        header["signature"],
    )


def fault(found: evidence.Evidence, screens: bool = False) -> str:
    """What whoever gets it over the network finds."""
    return evidence.unpack(found.pack()).fault(CODEC, RUN, screens=screens)


# ---------------------------------------------------------------------- honest reducers


@pytest.mark.parametrize("screens", [False, True])
def test_an_honest_reducer_has_nothing_to_fear(screens: bool) -> None:
    """Whichever part of whosever sum is opened, in a first round and in later ones."""
    for group in play_rounds(3, screens=screens):
        for reducer in range(MEMBERS):
            for number in range(3):
                assert fault(audited(group, reducer, number), screens) == ""


def test_a_killed_reducer_still_goes_on_from_its_last_seal(tmp_path: Path) -> None:
    """What is taken up from the disk is what was sealed; what no seal vouches for is handed over."""

    async def scenario() -> None:
        first = Group(MEMBERS, recompress=True)
        for i, runner in enumerate(first.runners):
            first.residuals[i] = runner._reducer._residual = KeptResidual(CODEC, RUN, tmp_path / str(i))
        await first.run()
        for i in range(MEMBERS):
            first.residuals[i] = residual = KeptResidual(CODEC, RUN, tmp_path / str(i))
            assert residual.commitment is not None and residual.part() == []
        second = Group(MEMBERS, recompress=True, after=first)
        await second.run()
        assert [fault(audited(second, i)) for i in range(MEMBERS)] == [""] * MEMBERS
        assert kept(second, 0).commitment.seal.previous == kept(first, 0).commitment.seal.digest
        moved = first.residuals[0]
        assert moved is not None
        handed = moved.release(*first.spans[1])  # its span is another one now
        moved.take_back(moved.num_handed - 1)  # but its worker has died
        parted = moved.part()
        assert [piece[:2] for piece in parted] == [piece[:2] for piece in handed] and moved.commitment is None

    play(scenario)


# ---------------------------------------------------------------------- cheats


def resealed(group: Group, reducer: int, aggregate: bytes) -> ReducedSpan:
    """The same sum with another aggregate, sealed."""
    reduced = kept(group, reducer)
    old = reduced.commitment.seal
    seal = sign_aggregate(
        IDENTITIES[reducer], reduced.setting, old.span, aggregate, root=old.root, previous=old.previous
    )
    commitment = dataclasses.replace(reduced.commitment, seal=seal)
    return dataclasses.replace(reduced, aggregate=aggregate, commitment=commitment)


def summed(group: Group, reducer: int, factor: float = 1.0, shift: float = 0.0) -> bytes:
    """A well-formed aggregate of a reducer's sections with a weight or a residual of its own making."""
    reduced, (first, count) = kept(group, reducer), group.spans[reducer]
    sections = [(i, group.members[i].weight, section) for i, section, _ in reduced.sections]
    sections[0] = (0, sections[0][1] * factor, sections[0][2])
    residual = reduced.before / sum(weight for _, weight, _ in sections) + shift
    return CODEC.reduce(
        sections, residual=residual, run=RUN, round=ROUND, first_chunk=first, num_chunks=count
    )


def swapped(group: Group, reducer: int) -> ReducedSpan:
    """A section that its sender never sent, under the signature of what it did send."""
    reduced = kept(group, reducer)
    other = CODEC.cut(make_payload(99), *group.spans[reducer])
    sections = [(i, other if i == 1 else section, signature) for i, section, signature in reduced.sections]
    return dataclasses.replace(reduced, sections=sections)


def other_before(group: Group, reducer: int) -> ReducedSpan:
    reduced = kept(group, reducer)
    return dataclasses.replace(reduced, before=reduced.before + 1.0)


def other_leaves(group: Group, reducer: int) -> ReducedSpan:
    reduced = kept(group, reducer)
    leaves = [bytes(32), *reduced.commitment.leaves[1:]]
    return dataclasses.replace(reduced, commitment=dataclasses.replace(reduced.commitment, leaves=leaves))


CHEATS: dict[str, tuple[Callable[[Group, int], ReducedSpan], str]] = {
    "a residual out of thin air": (
        lambda group, j: resealed(group, j, summed(group, j, shift=0.5)),
        "are not the sum",
    ),
    "a lighter member": (lambda group, j: resealed(group, j, summed(group, j, factor=0.9)), "more or less"),
    "a section nobody sent": (swapped, "has not signed"),
    "nobody's section": (
        lambda group, j: dataclasses.replace(kept(group, j), sections=kept(group, j).sections[1:]),
        "does not have",
    ),
    "another residual": (other_before, "last sum left over"),
    "other leaves": (other_leaves, "committed itself to"),
}


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("kind", CHEATS)
def test_a_cheat_is_proven(kind: str, round: int) -> None:
    """In its first round and in a later one; the words say what is wrong."""
    make, words = CHEATS[kind]
    group = play_rounds(round)[-1]
    assert words in fault(audited(group, 2, reduced=make(group, 2)))


@pytest.mark.parametrize("screens", [False, True])
def test_a_wrong_sum_is_proven_whichever_part_is_opened(screens: bool) -> None:
    """A reducer that sums something else, with everything else in order, as the planned fault does it."""
    plan = FaultPlan([Fault("sum", ROUND, "wrong-sum")])
    group = play_rounds(2, screens=screens, faults={3: plan})[-1]
    for number in range(4):
        assert "are not the sum" in fault(audited(group, 3, number), screens)
    assert fault(audited(group, 2), screens) == ""


def test_a_false_commitment_is_proven_in_the_round_of_it() -> None:
    """A reducer that seals a residual which its sum has not left over, to pay it out in later rounds."""
    group = play_rounds(1)[0]
    reduced = kept(group, 1)
    old = reduced.commitment.seal
    leaves = audit.leaves(CODEC, *reduced.span, torch.ones(len(reduced.before)))
    seal = sign_aggregate(
        IDENTITIES[1],
        reduced.setting,
        old.span,
        reduced.aggregate,
        root=audit.root(leaves),
        previous=old.previous,
    )
    commitment = dataclasses.replace(reduced.commitment, seal=seal, leaves=leaves)
    cheat = dataclasses.replace(reduced, commitment=commitment)
    assert "another residual than the one that is left over" in fault(audited(group, 1, reduced=cheat))


def test_an_answer_that_holds_nothing_is_proof_too() -> None:
    """It is signed: who answers nonsense to an audit has said so."""
    group = play_rounds(1)[0]
    for blob in (b"", b"\xc1", msgpack.packb([1, 2, 3]), msgpack.packb([[[0, b"", b""]], b"", b"", b""])):
        found = audited(group, 0)
        message = evidence._answer_message(found.seal, found.number, blob)
        signature = IDENTITIES[0].key.sign(message)
        assert fault(dataclasses.replace(found, answer=blob, signature=signature))


def test_members_that_are_left_out_notice_it() -> None:
    """A reducer that does not count whom it has read is named, by that member and by nobody else."""
    plan = FaultPlan([Fault("sum", ROUND, "leave-out")])
    group = play_rounds(1, faults={3: plan})[-1]
    assert [runner.left_out_by for runner in group.runners] == [[PEERS[3]], [], [], [], []]


def test_two_sums_of_one_span_are_proof() -> None:
    """Whoever holds two seals of one reducer in one round has it; one seal twice is nothing."""
    group = play_rounds(1)[0]
    seal, other = (
        kept(group, 2).commitment.seal,
        resealed(group, 2, summed(group, 2, shift=0.1)).commitment.seal,
    )
    assert "two different sums" in fault(TwoSums(group.runners[0].setting, seal, other))
    with pytest.raises(ValueError, match="not two sums"):
        fault(TwoSums(group.runners[0].setting, seal, seal))
    with pytest.raises(ValueError, match="not two sums"):
        fault(TwoSums(group.runners[0].setting, seal, kept(group, 3).commitment.seal))


# ---------------------------------------------------------------------- nobody is framed


def test_evidence_that_anybody_has_touched_is_none() -> None:
    """Whatever an accuser changes in a reducer's words, they are not the reducer's any more."""
    first, second = play_rounds(2)
    found = audited(second, 2)
    later = dataclasses.replace(found.setting, round=ROUND + 1)
    others = kept(second, 3)
    touched = [
        dataclasses.replace(found, setting=later),
        dataclasses.replace(found, aggregate=others.aggregate),
        dataclasses.replace(found, seal=others.commitment.seal),
        dataclasses.replace(found, seal=dataclasses.replace(found.seal, root=bytes([7] * 32))),
        dataclasses.replace(found, previous=None),
        dataclasses.replace(found, previous=kept(first, 3).commitment.seal),
        dataclasses.replace(found, number=1),
        dataclasses.replace(found, answer=found.answer[:-1] + b"!"),
        dataclasses.replace(found, signature=bytes(64)),
    ]
    for false in touched:
        with pytest.raises(ValueError):
            fault(false)
    with pytest.raises(ValueError):
        evidence.unpack(found.pack()).fault(CODEC, b"other---", screens=False)
    for blob in (
        b"",
        b"\xc1",
        msgpack.packb([]),
        found.pack()[:-1],
        msgpack.packb(["wrong-sum"] + [b""] * 7),
    ):
        with pytest.raises(ValueError):
            evidence.unpack(blob)


def test_a_signature_means_one_section_of_one_peer_in_one_round() -> None:
    """In another round, group or span, on another theta or by another peer it is worth nothing."""
    pairs = tuple((peer, 100.0) for peer in PEERS[:3])
    setting, span, section = Setting(RUN, ROUND, BASE, b"group", pairs), (0, 32), b"section"
    signature = sign_section(IDENTITIES[1], setting, span, section)
    assert is_section_of(PEERS[1], setting, span, section, signature)
    for change in (
        {"run": b"another!"},
        {"round": ROUND + 1},
        {"base_digest": bytes([1] * 32)},
        {"group": b"other"},
        {"members": (*pairs[:2], (PEERS[2], 101.0))},
    ):
        assert not is_section_of(PEERS[1], dataclasses.replace(setting, **change), span, section, signature)
    assert not is_section_of(PEERS[2], setting, span, section, signature)
    assert not is_section_of(PEERS[1], setting, (32, 32), section, signature)
    assert not is_section_of(PEERS[1], setting, span, b"other", signature)
    for forged in (None, b"", signature[:-1], bytes(64), 7):
        assert not is_section_of(PEERS[1], setting, span, section, forged)


# ---------------------------------------------------------------------- small groups, draws, hints


def test_an_exact_union_shows_whose_sections_it_holds() -> None:
    """One section that its sender has not signed, or a union without signatures, and nobody takes it."""

    async def scenario() -> None:
        group = Group(3)
        await group.run()
        runner, span, setting = group.runners[0], group.spans[1], group.runners[0].setting
        header, union = runner.serve_span(PEERS[2], 1)
        check_stamp(header, setting, PEERS[1], span, union, CODEC.union(union))
        forged = CODEC.reduce(
            [(i, 100.0, CODEC.cut(make_payload(50 + i), *span)) for i in range(3)],
            run=RUN,
            round=ROUND,
            first_chunk=span[0],
            num_chunks=span[1],
        )
        seal = sign_aggregate(IDENTITIES[1], setting, span, forged)
        for said, reason in (
            (header, "bad-seal"),
            ({**header, "seal": seal.signature}, "bad-signature"),
            ({"seal": seal.signature}, "bad-signature"),
            ({}, "bad-seal"),
        ):
            with pytest.raises(PayloadError) as caught:
                check_stamp(said, setting, PEERS[1], span, forged, CODEC.union(forged))
            assert caught.value.reason == reason

    play(scenario)


def test_what_travels_is_small() -> None:
    """A section takes a signature along; an aggregate its seal, a union a signature for each section besides."""

    async def scenario() -> None:
        exact, recompressed = Group(3), Group(MEMBERS, recompress=True)
        for group, size in ((exact, 64 + 3 * 64), (recompressed, 128)):
            await group.run()
            plain = len(msgpack.packb({"group": b"group", "round": ROUND, "size": 1}))
            header = group.header(0, 1, b"section")
            assert len(msgpack.packb({**header, "size": 1})) - plain <= 100
            stamp, _ = group.runners[0].serve_span(PEERS[1], 2)
            assert sum(len(value) for value in stamp.values() if isinstance(value, bytes)) == size

    play(scenario)


@pytest.mark.parametrize("num", [5, 16, 64])
def test_audits_take_their_share_of_the_bytes_and_no_more(num: int) -> None:
    """On average over the draws, whatever a payload and an opened residual take."""
    for payload, opened in ((10_000, 250_000), (2_000_000, 260_000)):
        likely = audit.rate(num, payload, 2 * payload, opened)
        per_round = num * (num - 1) * likely * (payload + opened)
        assert per_round <= 1.001 * audit.BYTES_SHARE * (num - 1) * 3 * payload
        drawn = sum(audit.is_drawn(bytes([i % 256, i // 256]) + bytes(30), likely) for i in range(65536))
        assert drawn / 65536 == pytest.approx(likely, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    "spec", [CodecSpec(chunk=64, k=4, value_bits=2), CodecSpec(kind="dense", dense_bits=8)]
)
def test_any_part_of_a_sum_can_be_made_again(spec: CodecSpec) -> None:
    """Groups and dense chunks, spans that hold both: every opened range gives the aggregate's own bytes and leaves."""
    codec = Codec(spec, [("matrix", (64, 40)), ("bias", (300,)), ("scale", (1,))])
    generator = torch.Generator().manual_seed(0)
    payloads = [
        codec.encode(
            [torch.randn(shape, generator=generator) for _, shape in codec.shapes],
            codec.error_feedback(),
            decay=1.0,
            run=RUN,
            round=ROUND,
        )
        for _ in range(3)
    ]
    for first, count in codec.spans([1.0, 1.0]):
        sections = {i: codec.cut(payload, first, count) for i, payload in enumerate(payloads)}
        before = torch.randn(codec.residual(first, count).shape, generator=generator)
        weighted = [(i, 2.0 + i, section) for i, section in sections.items()]
        left = before / 9.0
        aggregate = codec.reduce(
            weighted, residual=left, run=RUN, round=ROUND, first_chunk=first, num_chunks=count
        )
        all_leaves, of_span = audit.leaves(codec, first, count, left * 9.0), audit.units(codec, first, count)
        base = int(codec.layout.offset[first])
        for number in range(len(of_span)):
            a, n = audit.opened(codec, (first, count), number)
            begin, end = int(codec.layout.offset[a]) - base, int(codec.layout.offset[a + n]) - base
            same, after = audit.recompute(codec, aggregate, sections, before[begin:end], a, n)
            found = audit.leaves(codec, a, n, after)
            assert same and found == all_leaves[number : number + len(found)]
            if n > 0 and end > begin:
                wrong = before[begin:end].clone()
                wrong[0] += 100.0
                assert not audit.recompute(codec, aggregate, sections, wrong, a, n)[0]


def test_a_member_sees_which_sums_look_wrong() -> None:
    """Turned round, a hundred times too long or unrelated: these are worth an audit. Of honest ones none."""
    group = play_rounds(2)[-1]
    aggregates = [kept(group, j).aggregate for j in range(MEMBERS)]

    def seen(payload: bytes, aggregates: Sequence[bytes]) -> list[bool]:
        return implausible(
            (CODEC.values(CODEC.cut(payload, *CODEC.span_of(a))), CODEC.values(a)) for a in aggregates
        )

    for payload in group.payloads:
        assert seen(payload, aggregates) == [False] * MEMBERS
    first, count = group.spans[2]

    def made(values: torch.Tensor) -> bytes:
        whole = torch.zeros(NUM_ELEMENTS)
        whole[CODEC.layout.elements(first, count)] = values
        payload = CODEC.encode([whole], CODEC.error_feedback(), decay=1.0, run=RUN, round=ROUND)
        residual = CODEC.residual(first, count)
        sections = [(0, 1.0, CODEC.cut(payload, first, count))]
        return CODEC.reduce(
            sections, residual=residual, run=RUN, round=ROUND, first_chunk=first, num_chunks=count
        )

    true = CODEC.values(aggregates[2])
    noise = torch.randn(len(true), generator=torch.Generator().manual_seed(5))
    for wrong in (-true, 100 * true, noise * true.norm() / noise.norm(), 1e-4 * true):
        with_one_wrong = [*aggregates[:2], made(wrong), *aggregates[3:]]
        assert seen(group.payloads[0], with_one_wrong) == [False, False, True, False, False]


def test_a_seal_that_cannot_be_read_is_none() -> None:
    """Whatever the bytes are."""
    group = play_rounds(1)[0]
    seal = kept(group, 0).commitment.seal
    assert Seal.unpack(seal.pack()) == seal
    for blob in (b"", b"\xc1", msgpack.packb([]), seal.pack()[:-1], msgpack.packb([b""] * 7)):
        with pytest.raises(ValueError):
            Seal.unpack(blob)


def test_the_bench_of_what_it_costs_runs() -> None:
    """And its bytes are those that audits aim at."""
    costs = measure(20 * 4096, 5, 64)
    assert 0 < costs.audits_share < 1.1 * audit.BYTES_SHARE and costs.section_bytes > 0
