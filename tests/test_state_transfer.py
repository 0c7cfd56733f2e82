"""Laws of how a newcomer gets the state: whole and checked, however often a donor or a link fails."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from pathlib import Path

import pytest
from transfer_tools import (
    AT_NINE,
    OTHER,
    PIECES,
    STATE,
    Donor,
    Fault,
    Newcomer,
    corrupt,
    cut_after,
    honest,
    once,
    saying,
    silent_after,
    standing_of,
    state_bytes,
)

from dtrain.dht import partial_state, state_fetch, streams
from dtrain.dht.history import KEPT_ROUNDS, RoundRecord
from dtrain.dht.partial_state import NoSpace, PartialState
from dtrain.dht.passed_rounds import PassedRounds

TOTAL = sum(PIECES)
THREE = sum(PIECES[:3])  # bytes of any three of the first six


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; what is waited for are events."""
    monkeypatch.setattr(streams, "HANG_UP_S", 0.05)
    monkeypatch.setattr(state_fetch, "RETRY_S", 0.05)
    monkeypatch.setattr(state_fetch, "TAKE_OVER_S", 0.1)


def test_the_state_arrives_whole_and_from_everybody(tmp_path: Path) -> None:
    """Three donors each give a part, no piece is sent twice, progress runs up to the total."""
    donors = [Donor(tmp_path) for _ in "abc"]
    for donor in donors:  # so that the fastest does not give it all
        donor.fault = once(lambda: all(each.asked for each in donors))
    newcomer = Newcomer(tmp_path / "in", dict(zip("abc", donors)))
    assert newcomer.run() == AT_NINE
    assert newcomer.received == STATE
    assert newcomer.asked() == dict.fromkeys(range(len(PIECES)), 1)
    assert newcomer.progress[0] == 0 and newcomer.progress[-1] == TOTAL
    assert newcomer.progress == sorted(newcomer.progress)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # the donors' files are already unlinked


def test_a_donor_of_corrupt_pieces_is_caught_and_left(tmp_path: Path) -> None:
    """The first bad piece ends it, with a named reason; not a byte of it is kept, others give that piece."""
    liar, good = Donor(tmp_path, fault=corrupt()), Donor(tmp_path)
    newcomer = Newcomer(tmp_path / "in", {"liar": liar, "good": good})
    assert newcomer.run() == AT_NINE
    assert newcomer.received == STATE
    assert newcomer.left.keys() == {"liar"} and "is corrupt" in newcomer.left["liar"]
    assert len(liar.asked) <= state_fetch.LANES


@pytest.mark.parametrize("size", [32 * len(PIECES), 32, 0])
def test_a_false_list_of_hashes_is_caught(size: int, tmp_path: Path) -> None:
    """A list of hashes that does not have the agreed digest is never used."""
    liar, good = Donor(tmp_path, fault=saying("hashes", bytes(size))), Donor(tmp_path)
    newcomer = Newcomer(tmp_path / "in", {"liar": liar, "good": good})
    assert newcomer.run() == AT_NINE
    assert newcomer.received == STATE
    assert not newcomer.left or "list of hashes" in newcomer.left["liar"]  # it may never have been needed


def test_a_piece_of_another_length_is_refused(tmp_path: Path) -> None:
    """What is longer than the run's model has it is not even read."""
    liar, good = Donor(tmp_path, fault=saying("piece", bytes(400_000))), Donor(tmp_path)
    newcomer = Newcomer(tmp_path / "in", {"liar": liar, "good": good})
    assert newcomer.run() == AT_NINE and newcomer.received == STATE


@pytest.mark.parametrize("fault", [cut_after(1), silent_after(1)])
def test_the_pieces_of_a_vanished_donor_go_to_others(fault: Fault, tmp_path: Path) -> None:
    """Whether its connection breaks or it falls silent: nobody waits for it, and it is not called a liar."""
    gone, good = Donor(tmp_path, fault=fault), Donor(tmp_path)
    newcomer = Newcomer(tmp_path / "in", {"gone": gone, "good": good})
    assert newcomer.run() == AT_NINE
    assert newcomer.received == STATE and not newcomer.left


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """After two breaks, of the link and of the newcomer itself, no piece that had arrived is fetched again."""

    async def scenario() -> None:
        donor = Donor(tmp_path, fault=cut_after(3))
        await Newcomer(tmp_path / "in", {"a": donor}).fetch_part(THREE)
        donor.fault = cut_after(2)
        await Newcomer(tmp_path / "in", {"a": donor}).fetch_part(sum(PIECES[:5]))
        donor.fault = honest
        donor.asked.clear()
        last = Newcomer(tmp_path / "in", {"a": donor})
        assert await last.fetch() == AT_NINE
        assert last.received == STATE
        arrived = last.progress[0]  # by then a sixth piece may have been under way
        assert sum(PIECES[:5]) <= arrived
        assert sum(PIECES[number] for number in donor.asked) == sum(PIECES) - arrived

    asyncio.run(scenario())


def test_a_damaged_file_is_mended(tmp_path: Path) -> None:
    """What a crash tore on the newcomer's disk does not count as there: its pieces are fetched anew."""

    async def scenario() -> None:
        donor = Donor(tmp_path, fault=cut_after(3))
        first = Newcomer(tmp_path / "in", {"a": donor})
        await first.fetch_part(THREE)
        with first.partial.path.open("r+b") as file:
            file.write(bytes(1000))  # piece 0, which was among the first to be asked for
        donor.fault = honest
        donor.asked.clear()
        last = Newcomer(tmp_path / "in", {"a": donor})
        assert await last.fetch() == AT_NINE
        assert last.received == STATE
        assert 0 in donor.asked and len(donor.asked) == len(PIECES) - 2

    asyncio.run(scenario())


def test_a_download_survives_the_runs_moving_on(tmp_path: Path) -> None:
    """Donors that have taken outer steps meanwhile still give the state that the download began with."""

    async def scenario() -> None:
        donor = Donor(tmp_path, fault=cut_after(3))
        await Newcomer(tmp_path / "in", {"a": donor}).fetch_part(THREE)
        donor.fault = honest
        donor.move_to(OTHER, 12, 2e6)
        assert await Newcomer(tmp_path / "in", {"a": donor}).fetch() == AT_NINE
        assert donor.num_made == 1

    asyncio.run(scenario())


def test_a_download_may_take_longer_than_peers_keep_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes meanwhile is kept beside it, over a crash too: it is finished, and all rounds since lead on."""
    monkeypatch.setattr("dtrain.dht.passed_rounds.LOOK_S", 0.01)
    end = AT_NINE.round + 3 * KEPT_ROUNDS

    async def scenario() -> None:
        donor = Donor(tmp_path, fault=cut_after(3))
        newcomer = Newcomer(tmp_path / "in", {"a": donor})
        fetching = asyncio.create_task(newcomer.fetch())
        passed = PassedRounds(tmp_path / "in" / "passed", newcomer.newest, newcomer.past_round)
        while not newcomer.progress:  # it has chosen its state
            await asyncio.sleep(0.005)
        for round in range(AT_NINE.round, end + 1, KEPT_ROUNDS // 2):
            donor.move_to(OTHER, round, 2e6)
            while passed.reached(AT_NINE.round) < round:
                await asyncio.sleep(0.005)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
        donor.fault = honest
        again = Newcomer(tmp_path / "in", {"a": donor})
        assert await again.fetch() == AT_NINE
        assert again.received == STATE and donor.num_made == 1
        for round in range(AT_NINE.round, end):
            record = passed.get(round)
            assert record is not None and record.aggregates == [bytes([round % 256]) * 9]
        passed.clear()
        assert list((tmp_path / "in" / "passed").iterdir()) == []

    asyncio.run(scenario())


def test_a_download_ends_though_a_cancellation_is_lost(tmp_path: Path) -> None:
    """As `asyncio.wait_for` loses it up to Python 3.11: all was there, and who kept passed rounds went on for ever."""

    class Deaf(Newcomer):
        def newest(self) -> int:
            return AT_NINE.round + 1

        async def past_round(self, round: int) -> RoundRecord | None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60.0)
            return None

    async def scenario() -> None:
        newcomer = Deaf(tmp_path / "in", {"a": Donor(tmp_path)})
        fetching = asyncio.create_task(newcomer.fetch())
        await asyncio.wait({fetching}, timeout=20.0)
        assert fetching.done() and fetching.result() == AT_NINE
        assert newcomer.received == STATE

    asyncio.run(scenario())


def test_half_a_passed_round_is_none(tmp_path: Path) -> None:
    """A file that a crash cut short is not taken for a round, nor is what comes after it."""

    async def scenario() -> None:
        newcomer = Newcomer(tmp_path, {"a": Donor(tmp_path, round=30)})
        passed = PassedRounds(tmp_path / "passed", newcomer.newest, newcomer.past_round)
        keeping = asyncio.create_task(passed.keep_up(20))
        while passed.reached(20) < 30:
            await asyncio.sleep(0.005)
        keeping.cancel()
        path = tmp_path / "passed" / "25.round"
        path.write_bytes(path.read_bytes()[:-3])
        assert passed.get(24) is not None
        assert passed.get(25) is None and passed.reached(25) == 25

    asyncio.run(scenario())


def test_a_state_that_everybody_has_dropped_is_begun_anew(tmp_path: Path) -> None:
    """When no donor has the begun state any more the newest is taken, and nothing of the old is left in it."""
    newcomer = Newcomer(tmp_path / "in", {"a": Donor(tmp_path, fault=cut_after(3))})
    asyncio.run(newcomer.fetch_part(THREE))
    again = Newcomer(tmp_path / "in", {"a": Donor(tmp_path, OTHER, 99, 9e6)})
    assert again.run() == standing_of(OTHER, 99, 9e6)
    assert again.received == OTHER


def test_all_donors_give_the_state_that_was_chosen(tmp_path: Path) -> None:
    """A donor that holds an older snapshot for somebody else takes one of the chosen state too: all give at once."""

    async def scenario() -> None:
        behind, ahead = Donor(tmp_path, OTHER, 7, 5e5), Donor(tmp_path)
        await behind.ask(want="offer", digest=b"")  # somebody's snapshot of round 7
        behind.move_to(STATE, 9, 1e6)
        behind.fault = ahead.fault = once(lambda: bool(behind.asked and ahead.asked))
        assert await Newcomer(tmp_path / "in", {"a": behind, "b": ahead}).fetch() == AT_NINE

    asyncio.run(scenario())


def test_what_several_donors_have_counts_more_than_what_one_says(tmp_path: Path) -> None:
    """A lone donor's claim of much work does not win over a state that two agree on; else the most work wins."""
    lone = Donor(tmp_path, OTHER, 9, 1e12)
    agreeing = {"a": Donor(tmp_path), "b": Donor(tmp_path), "lone": lone}
    assert Newcomer(tmp_path / "in", dict(agreeing)).run() == AT_NINE
    assert lone.asked == []
    boasting = {"lone": Donor(tmp_path, OTHER, 9, 1e12), "too": Donor(tmp_path, OTHER, 9, 1e12)}
    honest = {name: Donor(tmp_path) for name in "abcd"}
    assert Newcomer(tmp_path / "six", {**boasting, **honest}).run() == AT_NINE  # two of six are too few
    pair = {"poor": Donor(tmp_path, OTHER, 9, 9e5), "gone": None, "rich": Donor(tmp_path)}
    assert Newcomer(tmp_path / "pair", dict(pair)).run() == AT_NINE


def test_a_state_that_we_have_is_none_to_get(tmp_path: Path) -> None:
    """Half of a split network stands with us, and each of the others holds another state, of when somebody asked: they
    are asked for the one where they stand now. What few claim is not taken for lack of another."""

    async def scenario() -> None:
        ours = {f"ours {i}": Donor(tmp_path) for i in range(3)}
        theirs = {f"theirs {i}": Donor(tmp_path, STATE[i:] + STATE[:i], 9 + i, 2e6 + i) for i in range(1, 5)}
        for donor in theirs.values():
            await donor.ask(want="offer", digest=b"")
            donor.move_to(OTHER, 16, 3e6)
        there = standing_of(OTHER, 16, 3e6)
        newcomer = Newcomer(tmp_path / "in", {**ours, **theirs}, least_work=1e6, own=AT_NINE.digest)
        newcomer.where = there.digest
        assert await newcomer.fetch() == there
        assert newcomer.received == OTHER
        few = dict(list(theirs.items())[:2])
        boasted = Newcomer(tmp_path / "few", {**ours, "too": Donor(tmp_path), **few}, own=AT_NINE.digest)
        assert await boasted.fetch() is None

    asyncio.run(scenario())


def test_donors_that_train_nothing_decide_nothing(tmp_path: Path) -> None:
    """Four that are paused at an old state are more than the two that go on, but they do not know better."""
    paused = {f"paused {i}": Donor(tmp_path, OTHER, 4, 5e5) for i in range(4)}
    assert Newcomer(tmp_path / "in", {**paused, "a": Donor(tmp_path), "b": Donor(tmp_path)}).run() == AT_NINE


def test_where_all_differ_the_middle_is_taken(tmp_path: Path) -> None:
    """As when a round passes between two donors' answers: not the one who claims most."""
    honest = {str(round): Donor(tmp_path, STATE, round, 1e6 * round) for round in (7, 8, 9, 10)}
    found = Newcomer(tmp_path / "in", {**honest, "liar": Donor(tmp_path, STATE, 11, 1e12)}).run()
    assert found is not None and found.round == 9


def test_a_state_with_less_work_than_ours_is_not_fetched(tmp_path: Path) -> None:
    """A newcomer with a checkpoint of its own does not go back behind it."""
    donor = Donor(tmp_path)
    assert Newcomer(tmp_path / "in", {"a": donor}, least_work=2e6).run() is None
    assert donor.asked == []


def test_a_worker_that_differs_gets_a_state_that_is_not_behind_its_own(tmp_path: Path) -> None:
    """Even when a donor holds an older snapshot that would do for newcomers."""

    async def scenario() -> None:
        donor = Donor(tmp_path, OTHER, 7, 5e5)
        await donor.ask(want="offer", digest=b"")
        donor.move_to(STATE, 9, 1e6)
        assert await Newcomer(tmp_path / "in", {"a": donor}, least_work=1e6).fetch() == AT_NINE

    asyncio.run(scenario())


def test_a_download_that_gets_nowhere_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After GIVE_UP_S without a piece there is no state for now; what is here stays."""
    monkeypatch.setattr(state_fetch, "GIVE_UP_S", 0.3)
    newcomer = Newcomer(tmp_path / "in", {"a": Donor(tmp_path, fault=cut_after(0))})
    assert newcomer.run() is None
    assert newcomer.partial.path.exists()


def test_nobody_to_give_is_no_state(tmp_path: Path) -> None:
    """Without donors, or with unreachable ones only, the answer is None and nothing is put on disk."""
    for number, donors in enumerate(({}, {"gone": None})):
        assert Newcomer(tmp_path / str(number), dict(donors)).run() is None
        assert list((tmp_path / str(number)).iterdir()) == []


def test_nothing_is_begun_that_the_disk_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state larger than the free space is refused with a line that says how much is needed, before any byte."""
    monkeypatch.setattr(partial_state, "SPARE_BYTES", 2**60)
    donor = Donor(tmp_path)
    with pytest.raises(NoSpace, match=r"need 0\.00 GB in .*--folder"):
        Newcomer(tmp_path / "in", {"a": donor}).run()
    assert donor.asked == [] and list((tmp_path / "in").iterdir()) == []


def test_a_failing_disk_is_not_the_donors_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of our own disk ends the download with that error; no donor is left for it."""

    def full(self: PartialState, index: int, piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PartialState, "write", full)
    newcomer = Newcomer(tmp_path / "in", {"a": Donor(tmp_path)})
    with pytest.raises(OSError, match="No space left"):
        newcomer.run()
    assert not newcomer.left


D = bytes(32)


@pytest.mark.parametrize(
    "states",
    [
        None,
        [[9, 1e6, D]] * 5,
        [[9, 1e6]],
        [[9, 1e6, D, 0]],
        [[9, 1e6, b"short"]],
        [[9, 1e6, 2**62]],  # bytes(2**62) would ask for that much memory
        [[9, math.nan, D]],
        [[9, math.inf, D]],
        [[9, -1.0, D]],
        [[9, "2e6", D]],
        [[-1, 1e6, D]],
        [["9", 1e6, D]],
        [[2**63, 1e6, D]],
        [[None, 1e6, D]],
        [7],
    ],
)
def test_a_malformed_offer_is_left(states: object, tmp_path: Path) -> None:
    """A donor whose offer cannot be is left with a reason, and the honest one beside it gives the state."""
    liar, good = Donor(tmp_path, fault=saying("offer", states=states)), Donor(tmp_path)
    newcomer = Newcomer(tmp_path / "in", {"liar": liar, "good": good})
    assert newcomer.run() == AT_NINE and newcomer.received == STATE
    assert newcomer.left.keys() == {"liar"} and liar.asked == []


def test_a_note_that_cannot_be_read_is_no_download(tmp_path: Path) -> None:
    """Rubbish in the folder, or the beginnings of another model's state, is passed over."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "incoming.json").write_text('{"round": 9, "work": "many"}')
    (folder / "incoming.state").write_bytes(b"x" * 7)
    newcomer = Newcomer(folder, {"a": Donor(tmp_path)})
    assert newcomer.partial.standing is None
    assert newcomer.run() == AT_NINE and newcomer.received == STATE


def test_newcomers_at_once_all_get_it(tmp_path: Path) -> None:
    """Six newcomers share the donors and one snapshot of each."""
    donors: dict[str, Donor | None] = {name: Donor(tmp_path, state_bytes(3), 4, 3e5) for name in "abc"}
    newcomers = [Newcomer(tmp_path / str(n), donors) for n in range(6)]

    async def all_at_once() -> None:
        await asyncio.gather(*(newcomer.fetch() for newcomer in newcomers))

    asyncio.run(all_at_once())
    assert all(newcomer.received == state_bytes(3) for newcomer in newcomers)
    assert [donor.num_made for donor in donors.values() if donor is not None] == [1, 1, 1]
