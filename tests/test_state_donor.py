"""Laws of giving: one snapshot for all, bounded in number, and never so fast that rounds suffer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from transfer_tools import AT_NINE, OTHER, PIECES, STATE, Donor, hashes_of, state_bytes

from dtrain.dht import state_donor, upload
from dtrain.dht.state_donor import StateDonor, Written
from dtrain.dht.streams import Refused
from dtrain.dht.upload import Busy, UploadBudget


async def offer(donor: Donor, digest: bytes = b"") -> list[int]:
    """The rounds of the states that a donor offers."""
    reply, _ = await donor.ask(want="offer", digest=digest)
    return [round for round, _, _ in reply["states"]]


def test_newcomers_share_a_snapshot(tmp_path: Path) -> None:
    """Newcomers that come together, or a few rounds after each other, get one snapshot."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        await asyncio.gather(*(offer(donor) for _ in range(5)))
        donor.move_to(OTHER, 9 + state_donor.FRESH_ROUNDS, 2e6)
        reply, _ = await donor.ask(want="offer", digest=b"")
        assert reply["states"] == [[9, 1e6, AT_NINE.digest]]
        assert donor.num_made == 1

    asyncio.run(scenario())


def test_snapshots_are_bounded_and_those_in_use_stay(tmp_path: Path) -> None:
    """At most two are kept; a third is made only when one of them has not been read for a while."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        assert await offer(donor) == [9]
        donor.move_to(OTHER, 30, 2e6)
        assert await offer(donor) == [9, 30]
        donor.move_to(state_bytes(3), 60, 3e6)
        assert await offer(donor) == [9, 30]  # both are in use
        donor.donor._snapshots[0].used -= state_donor.IN_USE_S + 1
        assert await offer(donor) == [30, 60]
        for snapshot in donor.donor._snapshots:
            snapshot.used -= state_donor.UNUSED_S + 1
        assert await offer(donor) == [60]
        assert donor.num_made == 4

    asyncio.run(scenario())


def test_the_state_that_is_asked_for_is_offered(tmp_path: Path) -> None:
    """A donor that stands at the wanted digest takes a snapshot of it, even with another fresh one at hand."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        await offer(donor)
        donor.move_to(OTHER, 10, 2e6)
        assert await offer(donor, donor.standing.digest) == [9, 10]
        donor.move_to(state_bytes(3), 11, 3e6)
        assert await offer(donor, bytes(32)) == [9, 10]  # a digest that it does not stand at changes nothing
        assert donor.num_made == 2

    asyncio.run(scenario())


def test_pieces_and_hashes_are_those_of_the_snapshot(tmp_path: Path) -> None:
    """Each piece is its part of the file, also after the trainer has moved on."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        await offer(donor)
        donor.move_to(OTHER, 10, 2e6)
        _, hashes = await donor.ask(want="hashes", digest=AT_NINE.digest)
        assert hashes == hashes_of(STATE)
        pieces = [await donor.ask(want="piece", digest=AT_NINE.digest, piece=i) for i in range(len(PIECES))]
        assert b"".join(piece for _, piece in pieces) == STATE

    asyncio.run(scenario())


@pytest.mark.parametrize("piece", [-1, len(PIECES), None, "0", 1.0, 2**70])
def test_only_what_is_there_can_be_asked_for(piece: object, tmp_path: Path) -> None:
    """A piece that does not exist, or something that is none, is refused; so is an unknown state."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        await offer(donor)
        with pytest.raises(Refused, match="no such piece"):
            await donor.ask(want="piece", digest=AT_NINE.digest, piece=piece)
        for digest in (bytes(32), None, [1]):
            with pytest.raises(Refused, match="not here"):
                await donor.ask(want="piece", digest=digest, piece=0)
            with pytest.raises(Refused, match="not here"):
                await donor.ask(want="hashes", digest=digest)

    asyncio.run(scenario())


def test_a_trainer_that_has_nothing_yet_is_a_refusal(tmp_path: Path) -> None:
    """A donor without a state, or with one that does not fit the run, refuses, and is asked anew next time."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        short = tmp_path / "short"
        short.write_bytes(b"state")
        answers = [None, Written(1, 2.0, bytes(32), bytes(32), short)]

        async def make() -> Written | None:
            return answers.pop(0) if answers else await donor._make()

        donor.donor = StateDonor(PIECES, make, donor._standing, donor.upload)
        for _ in range(2):
            with pytest.raises(Refused, match="no state to give"):
                await offer(donor)
        assert await offer(donor) == [9]

    asyncio.run(scenario())


# ---------------------------------------------------------------------- the line


class Time:
    """Seconds that pass only by sleeping; stands in for the modules time and asyncio in the upload budget."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(upload, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(upload, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": self._sleep}))

    async def _sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)


def test_pieces_leave_at_the_users_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 1000 bytes a second, ten pieces of 500 take 5 s less the first one's head start."""
    time = Time(monkeypatch)

    async def scenario() -> None:
        budget = UploadBudget(1000.0)
        for _ in range(10):
            (await budget.admit(500)).close(delivered=True)

    asyncio.run(scenario())
    assert time.now == pytest.approx(104.5)


def test_without_a_limit_half_of_the_measured_line_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of the last pieces measures the line; slow ones and broken ones beside it change nothing."""
    time = Time(monkeypatch)

    async def scenario() -> None:
        budget = UploadBudget()
        assert budget.bytes_per_s == 0.0  # nothing is known before the first piece
        for seconds in (0.5, 10.0):
            lease = await budget.admit(1000)
            time.now += seconds
            lease.close(delivered=True)
        assert budget.bytes_per_s == pytest.approx(1000.0)
        (await budget.admit(1000)).close()
        assert budget.bytes_per_s == pytest.approx(1000.0)

    asyncio.run(scenario())


def test_rounds_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an exchange is under way no piece leaves; when it is over, or takes very long, they go on."""

    async def scenario() -> None:
        budget = UploadBudget()
        monkeypatch.setattr(upload, "HOLD_S", 600.0)
        with budget.round_under_way():
            waiting = asyncio.ensure_future(budget.admit(1000))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
        (await asyncio.wait_for(waiting, 10.0)).close()
        monkeypatch.setattr(upload, "HOLD_S", 0.01)
        with budget.round_under_way():
            (await asyncio.wait_for(budget.admit(1000), 10.0)).close()

    asyncio.run(scenario())


def test_a_long_queue_sends_newcomers_elsewhere() -> None:
    """Whoever would wait longer than QUEUE_S is told so at once; who gives up waiting leaves the queue."""

    async def scenario() -> None:
        budget = UploadBudget(100.0)
        (await budget.admit(10_000)).close()  # the line is taken for 100 s
        waiting = [asyncio.ensure_future(budget.admit(1000)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await budget.admit(1000)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert budget._queued_bytes == 0
        assert budget._places._value == upload.SERVED_AT_ONCE

    asyncio.run(scenario())


def test_a_newcomer_that_does_not_read_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is free again after LEASE_S, and its slowness does not count as the line's."""
    monkeypatch.setattr(upload, "LEASE_S", 0.01)

    async def scenario() -> None:
        budget = UploadBudget()
        leases = [await budget.admit(1000) for _ in range(upload.SERVED_AT_ONCE)]
        (await asyncio.wait_for(budget.admit(1000), 10.0)).close()
        for lease in leases:
            lease.close(delivered=True)
        assert budget.bytes_per_s == 0.0
        assert budget._places._value == upload.SERVED_AT_ONCE

    asyncio.run(scenario())


def test_a_served_piece_measures_the_line(tmp_path: Path) -> None:
    """A piece that is acknowledged counts, and its place is free."""

    async def scenario() -> None:
        donor = Donor(tmp_path)
        await offer(donor)
        await donor.ask(want="piece", digest=AT_NINE.digest, piece=0)
        assert donor.upload.bytes_per_s > 0
        assert donor.upload._places._value == upload.SERVED_AT_ONCE

    asyncio.run(scenario())
