"""Laws of how a newcomer gets the state: whole and checked, or not at all, however often a donor or a link fails."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from stream_tools import Call, Handler, Line, Messages, settled

from dtrain.dht import state, streams
from dtrain.dht.state import Offer, StateDonor, fetch_state
from dtrain.dht.streams import PIECE_BYTES, StreamError, answer, next_message, parse_header

STATE = random.Random(1).randbytes(10 * PIECE_BYTES + 1234)
OTHER = random.Random(2).randbytes(3 * PIECE_BYTES)
DIGEST = hashlib.sha256(b"theta").digest()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HANG_UP_S", 0.05)


class Donor:
    """A peer with a StateDonor behind a `Line`; counts its snapshots and hears what is asked of it."""

    def __init__(self, folder: Path, blob: bytes = STATE, *, round: int = 9, work: float = 1e6):
        self.folder, self.blob, self.round, self.work = folder, blob, round, work
        self.num_made = 0
        self.offsets: list[int] = []
        self.donor = StateDonor(self._make)
        self.fault: Callable[[Handler], Handler] = lambda honest: honest

    async def _make(self) -> tuple[int, float, bytes, Path] | None:
        self.num_made += 1
        path = self.folder / f"outgoing-{self.num_made}-{id(self)}"
        path.write_bytes(self.blob)
        return self.round, self.work, DIGEST, path

    def handler(self, requests: Messages) -> Messages:
        """As `SwarmAverager.rpc_fetch_state` serves it."""

        async def handle() -> tuple[dict[str, Any], bytes | memoryview]:
            header = parse_header((await next_message(requests, 30.0)).value, 0)
            if header.get("want") == "data":
                self.offsets.append(header["offset"])
            return await self.offer(header)

        return answer(requests, handle)

    async def offer(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes | memoryview]:
        return await self.donor.offer(header)


def swarm_of(donors: dict[str, Donor | None], line: Line) -> Callable[[str, str], Call]:
    """`SwarmAverager.method` for these donors; None = cannot be reached."""

    async def unreachable(_: Messages) -> Messages:
        raise ConnectionRefusedError

    def method(name: str, rpc: str) -> Call:
        assert rpc == "rpc_fetch_state"
        donor = donors[name]
        return unreachable if donor is None else line.call(donor.fault(donor.handler))

    return method


def fetch(donors: dict[str, Donor | None], path: Path) -> tuple[Offer | None, list[tuple[int, int]]]:
    """(what was fetched, the progress that was told), after all ends have hung up."""
    progress: list[tuple[int, int]] = []

    async def scenario() -> Offer | None:
        line = Line(loses=False)  # what a donor sent before it broke off has arrived
        offer = await fetch_state(
            list(donors), swarm_of(donors, line), path, lambda have, total: progress.append((have, total))
        )
        await settled(line)
        return offer

    return asyncio.run(scenario()), progress


# ---------------------------------------------------------------------- faults of a donor


def cut_after(num_pieces: int, times: int = 10**9) -> Callable[[Handler], Handler]:
    """The first `times` downloads break off after that many pieces."""
    left = [times]

    def fault(honest: Handler) -> Handler:
        async def handler(requests: Messages) -> Messages:
            num_messages = 0
            async for message in honest(requests):
                num_messages += 1
                if num_messages > 1 + num_pieces and left[0] > 0:
                    left[0] -= 1
                    return
                yield message

        return handler

    return fault


def corrupt(honest: Handler) -> Handler:
    """One bit of the third message is wrong: the second piece of a download."""

    async def handler(requests: Messages) -> Messages:
        number = 0
        async for message in honest(requests):
            number += 1
            value = message.value
            yield BytesValue(value=value[:-1] + bytes([value[-1] ^ 1])) if number == 3 else message

    return handler


def saying(**fields: object) -> Callable[[Handler], Handler]:
    """Answers everything with this header, whatever is asked."""

    async def handler(requests: Messages) -> Messages:
        yield BytesValue(value=msgpack.packb({"size": 0, **fields}))
        async for _ in requests:
            pass

    return lambda _: handler


# ---------------------------------------------------------------------- fetching


def test_the_state_arrives_whole(tmp_path: Path) -> None:
    """The file holds the donor's bytes, the offer says what they are, progress runs up to the total."""
    offer, progress = fetch({"a": Donor(tmp_path)}, tmp_path / "in")
    assert offer == Offer(9, 1e6, DIGEST, len(STATE), hashlib.sha256(STATE).digest())
    assert (tmp_path / "in").read_bytes() == STATE
    assert [have for have, _ in progress] == [*range(PIECE_BYTES, len(STATE), PIECE_BYTES), len(STATE)]
    assert {total for _, total in progress} == {len(STATE)}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # the donor's file is already unlinked


def test_a_broken_download_goes_on_with_another_donor(tmp_path: Path) -> None:
    """After a break the next donor with the same state goes on at the offset: no byte is sent twice."""
    first, second, third = Donor(tmp_path), Donor(tmp_path), Donor(tmp_path)
    first.fault, second.fault = cut_after(3), cut_after(4)
    offer, progress = fetch({"a": first, "b": second, "c": third}, tmp_path / "in")
    assert offer is not None and (tmp_path / "in").read_bytes() == STATE
    assert (first.offsets, second.offsets, third.offsets) == ([0], [3 * PIECE_BYTES], [7 * PIECE_BYTES])
    assert len(progress) == 11


def test_a_single_donor_may_break_and_come_back(tmp_path: Path) -> None:
    """One donor whose link breaks again and again is asked again, each time from where it stopped."""
    donor = Donor(tmp_path)
    donor.fault = cut_after(3, times=3)
    offer, _ = fetch({"a": donor}, tmp_path / "in")
    assert offer is not None and (tmp_path / "in").read_bytes() == STATE
    assert donor.offsets == [0, 3 * PIECE_BYTES, 6 * PIECE_BYTES, 9 * PIECE_BYTES]
    assert donor.num_made == 1


def test_a_corrupt_piece_is_noticed_and_fetched_again(tmp_path: Path) -> None:
    """A donor that serves a wrong bit is found out by the hash of the whole; another donor's bytes are taken."""
    liar, honest = Donor(tmp_path), Donor(tmp_path)
    liar.fault = corrupt
    offer, _ = fetch({"a": liar, "b": honest}, tmp_path / "in")
    assert offer is not None and (tmp_path / "in").read_bytes() == STATE
    assert (liar.offsets, honest.offsets) == ([0], [0])


@pytest.mark.parametrize("fault", [corrupt, cut_after(0)])
def test_a_state_that_never_arrives_is_given_up(fault: Callable[[Handler], Handler], tmp_path: Path) -> None:
    """When every donor fails every time there is no state, and no half of one is left on disk."""
    donor = Donor(tmp_path)
    donor.fault = fault
    assert fetch({"a": donor}, tmp_path / "in")[0] is None
    assert len(donor.offsets) == state.ROUNDS_OF_DONORS
    assert list(tmp_path.iterdir()) == []


def test_nobody_to_give_is_no_state(tmp_path: Path) -> None:
    """Without donors, or with unreachable and refusing ones only, the answer is None."""

    class Newcomer(Donor):
        async def _make(self) -> None:
            return None

    swarms: list[dict[str, Donor | None]] = [{}, {"gone": None}, {"gone": None, "new": Newcomer(tmp_path)}]
    for donors in swarms:
        assert fetch(donors, tmp_path / "in") == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_the_state_with_the_most_work_is_taken(tmp_path: Path) -> None:
    """Of different states the one with more work behind it is fetched, and only from those who have it."""
    poor, rich, gone = Donor(tmp_path, OTHER, work=9e5), Donor(tmp_path, STATE, work=1e6), None
    offer, _ = fetch({"a": poor, "b": gone, "c": rich}, tmp_path / "in")
    assert offer is not None and offer.work == 1e6
    assert (tmp_path / "in").read_bytes() == STATE and poor.offsets == []


GOOD = {"round": 9, "work": 2e6, "digest": DIGEST, "total": 5, "sha256": bytes(32)}


@pytest.mark.parametrize(
    "changes",
    [
        {"total": 0},
        {"total": -5},
        {"total": 2**60},
        {"total": 5.0},
        {"digest": 2**62},  # bytes(2**62) would ask for that much memory
        {"digest": b"short"},
        {"sha256": "x" * 32},
        {"sha256": None},
        {"work": math.nan},
        {"work": math.inf},
        {"work": -1.0},
        {"work": "2e6"},
        {"round": -1},
        {"round": "9"},
        {"round": None},
    ],
)
def test_a_malformed_offer_is_none(changes: dict[str, object], tmp_path: Path) -> None:
    """An offer that cannot be is passed over, and the honest donor beside it gives the state."""
    liar, honest = Donor(tmp_path), Donor(tmp_path)
    liar.fault = saying(**{**GOOD, **changes})
    offer, _ = fetch({"a": liar, "b": honest}, tmp_path / "in")
    assert offer is not None and offer.work == 1e6
    assert (tmp_path / "in").read_bytes() == STATE


def test_a_donor_cannot_send_more_than_it_offered(tmp_path: Path) -> None:
    """A donor that goes on past the offered size is cut off there, and what came of it is fetched again."""

    class Deaf(Donor):
        """Sends everything from the beginning, whatever offset was asked for."""

        async def offer(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes | memoryview]:
            return await self.donor.offer({**header, "offset": 0})

    first, deaf, third = Donor(tmp_path), Deaf(tmp_path), Donor(tmp_path)
    first.fault = cut_after(3, times=1)
    offer, progress = fetch({"a": first, "b": deaf, "c": third}, tmp_path / "in")
    assert offer is not None and (tmp_path / "in").read_bytes() == STATE
    assert max(have for have, _ in progress) == len(STATE)
    assert (first.offsets, deaf.offsets, third.offsets) == ([0, 0], [3 * PIECE_BYTES], [10 * PIECE_BYTES])


# ---------------------------------------------------------------------- giving


def test_newcomers_share_a_snapshot(tmp_path: Path) -> None:
    """Newcomers that come together, or soon after each other, get one snapshot: the trainer is asked once."""
    donor = Donor(tmp_path)

    async def scenario() -> None:
        offers = await asyncio.gather(*(donor.donor.offer({"want": "offer"}) for _ in range(5)))
        assert all(offer == offers[0] for offer in offers)
        assert await donor.donor.offer({"want": "offer"}) == offers[0]
        assert donor.num_made == 1

    asyncio.run(scenario())


def test_an_old_snapshot_is_replaced_but_serves_on(tmp_path: Path) -> None:
    """After FRESH_S a new one is made; a download of the old one goes on until nobody has asked for UNUSED_S."""
    donor = Donor(tmp_path)

    def pass_time(seconds: float) -> None:
        for snapshot in donor.donor._snapshots:
            snapshot.made -= seconds
            snapshot.used -= seconds

    async def scenario() -> None:
        old, _ = await donor.donor.offer({"want": "offer"})
        want = {"want": "data", "sha256": old["sha256"], "offset": 7}
        donor.blob, donor.round = OTHER, 10
        pass_time(state.FRESH_S + 1)
        new, _ = await donor.donor.offer({"want": "offer"})
        assert (new["round"], new["total"], donor.num_made) == (10, len(OTHER), 2)
        pass_time(state.UNUSED_S - 10)
        assert bytes((await donor.donor.offer(want))[1]) == STATE[7:]
        pass_time(state.UNUSED_S - 10)
        await donor.donor.offer({"want": "offer"})
        assert bytes((await donor.donor.offer(want))[1]) == STATE[7:]
        pass_time(state.UNUSED_S + 1)
        await donor.donor.offer({"want": "offer"})
        with pytest.raises(StreamError, match="no longer here"):
            await donor.donor.offer(want)

    asyncio.run(scenario())


@pytest.mark.parametrize("offset", [-1, len(STATE) + 1, None, "0", 1.0, 2**70])
def test_only_what_is_there_can_be_asked_for(offset: object, tmp_path: Path) -> None:
    """An offset outside the state, or something that is none, is refused; so is an unknown state."""
    donor = Donor(tmp_path)

    async def scenario() -> None:
        offer, _ = await donor.donor.offer({"want": "offer"})
        want = {"want": "data", "sha256": offer["sha256"]}
        with pytest.raises(StreamError, match="no such offset"):
            await donor.donor.offer({**want, "offset": offset})
        for sha256 in (bytes(32), None, [1]):
            with pytest.raises(StreamError, match="no longer here"):
                await donor.donor.offer({"want": "data", "sha256": sha256, "offset": 0})
        assert bytes((await donor.donor.offer({**want, "offset": len(STATE)}))[1]) == b""

    asyncio.run(scenario())


def test_a_trainer_that_has_nothing_yet_is_a_refusal(tmp_path: Path) -> None:
    """A donor without a state refuses, and is asked anew next time."""
    answers: list[tuple[int, float, bytes, Path] | None] = [None, (1, 2.0, DIGEST, tmp_path / "out")]
    (tmp_path / "out").write_bytes(b"state")

    async def make() -> tuple[int, float, bytes, Path] | None:
        return answers.pop(0)

    async def scenario() -> None:
        donor = StateDonor(make)
        with pytest.raises(StreamError, match="no state to give yet"):
            await donor.offer({"want": "offer"})
        assert (await donor.offer({"want": "offer"}))[0]["total"] == 5

    asyncio.run(scenario())
