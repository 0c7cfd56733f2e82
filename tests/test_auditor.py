"""Laws of auditing among members: what is found is proven to all, who answers nothing is noted, liars are not heard."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
from round_tools import CODEC, IDENTITIES, PATIENCE_S, PEERS, ROUND, RUN, Group, make_payload, play, quicken
from stream_tools import Call, Line, Messages

from dtrain.compression import audit
from dtrain.dht import auditor as auditor_module
from dtrain.dht import evidence
from dtrain.dht.auditor import Auditor, Reports, Sums
from dtrain.dht.audits import Answers, Tribunal
from dtrain.dht.evidence import AnsweredAudit, Evidence, TwoSums
from dtrain.dht.faults import Fault, FaultPlan
from dtrain.dht.history import RoundRecord
from dtrain.dht.seals import sign_aggregate
from dtrain.dht.streams import Header, StreamError, answer, ask, next_message, parse_header

MEMBERS = 5
EVERYBODY = Fault("audit", ROUND, "all")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


class Court:
    """Members of one group that answer each other as the network process of each would."""

    def __init__(self, group: Group, *, auditing: tuple[int, ...] = ()):
        self.group, self.line, self.silent = group, Line(), set[str]()
        self.guilty: list[list[str]] = [[] for _ in PEERS[:MEMBERS]]  # by member: whom it has proof against
        self.counts: list[list[str]] = [[] for _ in PEERS[:MEMBERS]]
        self.noted: list[list[str]] = [[] for _ in PEERS[:MEMBERS]]  # who answers no audit
        self.num_told = 0
        self.answers = [Answers(CODEC, IDENTITIES[i]) for i in range(MEMBERS)]
        self.auditors = [
            Auditor(
                IDENTITIES[i],
                CODEC,
                run=RUN,
                screens=False,
                timeout_s=PATIENCE_S,
                call=functools.partial(self.call, i),
                others=lambda own=i: [peer for peer in PEERS[:MEMBERS] if peer != PEERS[own]],  # type: ignore[misc]
                reports=Reports(
                    functools.partial(self._found, i), self.noted[i].append, self.counts[i].append
                ),
                faults=FaultPlan([EVERYBODY] if i in auditing else []),
            )
            for i in range(MEMBERS)
        ]
        self.tribunals = [Tribunal(a, PATIENCE_S, self.counts[i].append) for i, a in enumerate(self.auditors)]

    def _found(self, member: int, found: Evidence, fault: str) -> None:
        self.guilty[member].append(found.accused)

    def call(self, caller: int, callee: str, method: str) -> Call:
        def serve(requests: Messages) -> Messages:
            async def handle() -> tuple[dict[str, Any], bytes]:
                if callee in self.silent:
                    raise StreamError("not today")
                header = parse_header((await next_message(requests, PATIENCE_S)).value, 2**40)
                member = PEERS.index(callee)
                if method == "rpc_audit":
                    return await self.answers[member].give(PEERS[caller], header)
                if method == "rpc_seals":
                    return {}, self.auditors[member].seals_of(header.get("round"))
                self.num_told += 1
                await self.tribunals[member].hear(PEERS[caller], header, requests)
                return {}, b""

            return answer(requests, handle)

        return self.line.call(serve)

    def note(self, records: list[RoundRecord]) -> None:
        """The round counts for everybody."""
        for i, (runner, record) in enumerate(zip(self.group.runners, records, strict=True)):
            assert runner.kept is not None
            self.answers[i].keep(runner.kept)
            self.auditors[i].look(Sums.of(runner, record))

    async def tell(self, teller: int, found: Evidence, to: int) -> None:
        header: Header = {"accused": found.accused, "setting": found.setting.digest}
        call = self.call(teller, PEERS[to], "rpc_evidence")
        await ask(call, header, found.pack(), max_bytes=0, timeout_s=PATIENCE_S)

    async def until(self, look: Callable[[], bool]) -> None:
        async def loop() -> None:
            while not look():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(loop(), PATIENCE_S)


def test_one_audit_proves_it_to_all() -> None:
    """One member audits everybody: the cheat is proven to every honest member once, and nobody else is."""

    async def scenario() -> None:
        cheat = FaultPlan([Fault("sum", ROUND, "wrong-sum")])
        group = Group(MEMBERS, recompress=True, faults={3: cheat})
        court = Court(group, auditing=(0,))
        court.note(await group.run())
        honest = [court.guilty[i] for i in (0, 1, 2, 4)]
        await court.until(lambda: all(honest) and court.auditors[0].num_audits == MEMBERS - 1)
        assert honest == [[PEERS[3]]] * 4 and court.guilty[3] == []
        assert court.auditors[0].audit_bytes > 0
        await court.until(lambda: court.num_told == 3)
        assert [court.counts[i] for i in (0, 1, 2, 4)] == [["wrong-sum"]] * 4

    play(scenario)


def test_honest_members_audit_each_other_round_after_round() -> None:
    """Everybody audits everybody over rounds that go on from each other: all answer, nobody is found guilty."""

    async def scenario() -> None:
        first = Group(MEMBERS, recompress=True)
        court = Court(first, auditing=tuple(range(MEMBERS)))
        court.note(await first.run())
        await court.until(lambda: all(a.num_audits == MEMBERS - 1 for a in court.auditors))
        second = court.group = Group(MEMBERS, recompress=True, after=first)
        for auditor in court.auditors:
            auditor._faults = FaultPlan([EVERYBODY])
        court.note(await second.run())
        await court.until(lambda: all(a.num_audits == 2 * (MEMBERS - 1) for a in court.auditors))
        assert court.guilty == court.counts == court.noted == [[]] * MEMBERS

    play(scenario)


def test_who_leaves_audits_unanswered_is_noted_after_a_few() -> None:
    """One refusal may be bad luck, and is followed by a question in every round; the third in a row is told."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        court, records = Court(group, auditing=(0,)), await group.run()
        for number in range(1, auditor_module.UNANSWERED + 1):
            court.silent = {PEERS[2]}
            court.note(records)
            await court.until(lambda n=number: court.counts[0].count("audit-unanswered") >= n)
            court.answers = [Answers(CODEC, IDENTITIES[i]) for i in range(MEMBERS)]
            assert (PEERS[2] in court.noted[0]) == (number == auditor_module.UNANSWERED)

    play(scenario)


def test_two_sums_are_proven_by_comparing() -> None:
    """Members on different thetas find whose two sums it was, and tell everybody."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        court, records = Court(group), await group.run()
        kept = group.runners[3].kept
        assert kept is not None
        first, count = kept.span
        other = CODEC.reduce(
            [(0, 100.0, CODEC.cut(make_payload(77), first, count))],
            residual=CODEC.residual(first, count),
            run=RUN,
            round=ROUND,
            first_chunk=first,
            num_chunks=count,
        )
        old = kept.commitment.seal
        seal = sign_aggregate(IDENTITIES[3], kept.setting, kept.span, other, root=old.root)
        court.note(records)
        group.runners[4].seals[3] = seal  # this is what member 4 was given
        index = records[4].spans.index(list(kept.span))
        aggregates = [*records[4].aggregates[:index], other, *records[4].aggregates[index + 1 :]]
        court.auditors[4].look(
            Sums.of(group.runners[4], dataclasses.replace(records[4], aggregates=aggregates))
        )
        court.auditors[4].compare(ROUND, [PEERS[0]])
        court.auditors[4].compare(ROUND + 1, [PEERS[0]])  # of which nothing is known
        await court.until(lambda: all(court.guilty[i] for i in (0, 1, 2, 4)))
        assert [court.guilty[i] for i in (0, 1, 2, 4)] == [[PEERS[3]]] * 4
        court.auditors[1].compare(ROUND, [PEERS[0], PEERS[2]])  # who stand where it stands
        await asyncio.sleep(0.05)
        assert court.guilty[1] == [PEERS[3]]

    play(scenario)


def test_who_brings_what_proves_nothing_is_not_heard_again() -> None:
    """False evidence against an honest reducer: refused, counted once, and its bearer with it."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        court = Court(group)
        await group.run()
        kept = group.runners[1].kept
        assert kept is not None
        seal = kept.commitment.seal
        header, blob = evidence.answer(CODEC, kept, 0, IDENTITIES[1])
        true = AnsweredAudit(kept.setting, kept.aggregate, seal, None, 0, blob, header["signature"])
        false = dataclasses.replace(true, answer=blob + b"!")
        for found in (
            false,
            true,
            TwoSums(kept.setting, seal, seal),
        ):  # an honest answer is no evidence either
            with pytest.raises(StreamError):
                await court.tell(2, found, 4)
        with pytest.raises(StreamError, match="proves nothing"):
            await court.tell(3, true, 4)
        assert court.counts[4] == ["false-evidence"] * 2 and court.guilty[4] == []

    play(scenario)


def test_a_reducer_answers_members_once_and_nobody_else() -> None:
    """Neither strangers nor who asks twice can have its upload; what is not kept any more is said so."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        await group.run()
        kept, answers = group.runners[0].kept, Answers(CODEC, IDENTITIES[0])
        assert kept is not None
        answers.keep(kept)
        asked: Header = {"seal": kept.commitment.seal.digest, "number": 5}
        await answers.give(PEERS[1], asked)
        for asker, header, words in (
            (PEERS[1], asked, "once"),
            (PEERS[9], asked, "only members"),
            (PEERS[2], {**asked, "seal": bytes(32)}, "not kept"),
            (PEERS[2], {**asked, "seal": "x"}, "not kept"),
            (PEERS[2], {**asked, "number": -1}, "not the number"),
            (PEERS[2], {**asked, "number": 2.0}, "not the number"),
        ):
            with pytest.raises(StreamError, match=words):
                await answers.give(asker, header)
        for number in range(3):
            seal = dataclasses.replace(kept.commitment.seal, root=bytes([number] * 32))
            answers.keep(
                dataclasses.replace(kept, commitment=dataclasses.replace(kept.commitment, seal=seal))
            )
        with pytest.raises(StreamError, match="not kept"):
            await answers.give(PEERS[3], asked)

    play(scenario)


def test_nobody_knows_before_whom_a_member_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draw is the auditor's own and differs by member and round; a sum that looks wrong is drawn far more often."""
    monkeypatch.setattr(audit, "BYTES_SHARE", 3.0)

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        court, records = Court(group), await group.run()
        draws = []
        for i in range(MEMBERS):
            sums = Sums.of(group.runners[i], records[i])
            tickets = [IDENTITIES[i].key.sign(bytes([n])) for n in range(200)]
            draws.append([tuple(court.auditors[i]._draw(sums, ticket)) for ticket in tickets])
        assert len({tuple(d) for d in draws}) == MEMBERS
        sums, likely = Sums.of(group.runners[0], records[0]), draws[0]
        total = sum(len(aggregate) for aggregate in records[0].aggregates)
        opened = 4 * len(CODEC.residual(*audit.opened(CODEC, group.spans[0], 0)))
        rate = audit.rate(MEMBERS, len(sums.payload), total, opened)
        assert sum(map(len, likely)) / (200 * (MEMBERS - 1)) == pytest.approx(rate, rel=0.3)

    play(scenario)
