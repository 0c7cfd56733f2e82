"""Credit: what the members of a round countersign, and that nobody can make, mend or borrow a statement."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import base58
import msgpack
import pytest

from dtrain.dht import credit_file
from dtrain.dht.credit import MAX_SIGNERS, WINDOW, Ledger, Purse, Receipt, sign
from dtrain.dht.credit_file import CreditError, Tally, check, load, save, statement
from dtrain.dht.identity import Identity, load_or_create
from dtrain.dht.reachability import by_peer, connect
from dtrain.dht.receipts import Receipts, pack_question, unpack_answer, unpack_question
from dtrain.dht.transport import start_daemon
from dtrain.trainer.cli import main

RUN = bytes(range(32))


@pytest.fixture
def people(tmp_path: Path) -> list[Identity]:
    """The worker whose credit it is, and others."""
    return [load_or_create(tmp_path / f"key-{i}") for i in range(7)]


def purse_of(people: list[Identity]) -> Purse:
    """Two members saw the same ten rounds, a third saw five later ones."""
    owner = people[0].peer_id
    seen = [(people[1], 0, 0x3FF, 1000), (people[2], 0, 0x3FF, 1000), (people[3], 1, 0x1F, 500)]
    return Purse(sign(signer, RUN, owner, *what) for signer, *what in seen)


def statement_of(people: list[Identity], **changes: Any) -> str:
    fields = {"name": "worker-1", "team": "Night Owls", "issued": "2026-11-24T12:00:00+00:00", **changes}
    return statement(
        people[0], "our-model", RUN, Tally(20, 1700, 10**9, 2 * 10**9), purse_of(people), **fields
    )


def test_a_statement_can_be_checked_offline(people: list[Identity]) -> None:
    """It says what its receipts show: rounds that two saw count once, and the signers are counted."""
    found = check(statement_of(people).encode())
    assert (found.rounds, found.tokens, found.signers) == (15, 1500, 3)
    assert (found.peer, found.name, found.team) == (people[0].peer_id, "worker-1", "Night Owls")
    assert (found.bytes_up, found.bytes_down) == (10**9, 2 * 10**9)


def signed_anew(tree: dict[str, Any], identity: Identity) -> bytes:
    """What a cheat can do: sign whatever they like with their own key."""
    tree["peer"] = identity.peer_id
    tree["signature"] = b64encode(identity.key.sign(credit_file._signed_bytes(tree))).decode()
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    "key", ["rounds", "tokens", "bytes_up", "name", "team", "run_id", "run", "issued", "peer"]
)
def test_an_edited_statement_is_refused(key: str, people: list[Identity]) -> None:
    """Whatever is changed after the signature."""
    tree = json.loads(statement_of(people))
    tree[key] = people[1].peer_id if key == "peer" else tree[key] + (1 if isinstance(tree[key], int) else "0")
    with pytest.raises(CreditError, match="changed after"):
        check(json.dumps(tree).encode())


def borrow(tree: dict[str, Any], people: list[Identity]) -> None:
    pass  # signed by another: the receipts were made for people[0]


def invent_totals(tree: dict[str, Any], people: list[Identity]) -> None:
    tree["tokens"] += 1


def edit_receipt(tree: dict[str, Any], people: list[Identity]) -> None:
    tree["receipts"][0][3] += 10**6


def sign_own(tree: dict[str, Any], people: list[Identity]) -> None:
    own = sign(people[0], RUN, people[0].peer_id, 5, 1, 10)
    tree["receipts"].append([5, own.signer, "1", 10, b64encode(own.signature).decode()])


def repeat(tree: dict[str, Any], people: list[Identity]) -> None:
    tree["receipts"].append(tree["receipts"][0])


def other_run(tree: dict[str, Any], people: list[Identity]) -> None:
    tree["run"] = bytes(32).hex()


def mangle(tree: dict[str, Any], people: list[Identity]) -> None:
    tree["receipts"][0] = ["x"]


@pytest.mark.parametrize(
    ("cheat", "signer", "said"),
    [
        (borrow, 4, "was not signed by"),
        (invent_totals, 0, "its receipts show 1,500"),
        (edit_receipt, 0, "was not signed by"),
        (sign_own, 0, "was not signed by"),
        (repeat, 0, "twice"),
        (other_run, 0, "was not signed by"),
        (mangle, 0, "malformed"),
    ],
)
def test_a_forged_statement_is_refused(
    cheat: Callable[[dict[str, Any], list[Identity]], None],
    signer: int,
    said: str,
    people: list[Identity],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says why, exit code 2; also when its bearer has signed it again."""
    tree = json.loads(statement_of(people))
    cheat(tree, people)
    path = tmp_path / "credit.json"
    path.write_bytes(signed_anew(tree, people[signer]))
    assert main(["credit", "verify", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "blob", [b"", b"{}", b"[1]", b"\xff", b"[" * 10**5, b'{"format": "dtrain credit 1"}']
)
def test_what_is_no_statement(blob: bytes) -> None:
    """Anything else is refused as such."""
    with pytest.raises(CreditError, match="no statement"):
        check(blob)


def test_hostile_texts_are_shown_harmlessly(
    people: list[Identity], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's name and team reach the terminal without control characters or a turned writing direction."""
    path = tmp_path / "credit.json"
    path.write_text(statement_of(people, name="\x1b[31mred\x07", team="abc\u202edef\nGenuine: forged"))
    assert main(["credit", "verify", str(path)]) == 0
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(shown) and "\nGenuine: forged" not in shown


def test_receipts_are_bounded(people: list[Identity]) -> None:
    """A newer receipt replaces its signer's older one; of many signers those that saw the most stay."""
    purse, owner = Purse(), people[0].peer_id
    for count in range(1, 11):
        purse.add(sign(people[1], RUN, owner, 0, 2**count - 1, 100 * count))
    purse.add(sign(people[1], RUN, owner, 0, 1, 100))  # an old one that comes late
    assert [r.tokens for r in purse.receipts] == [1000]
    for i, person in enumerate(people[2:7]):
        purse.add(sign(person, RUN, owner, 0, 1, 10 * i))
    assert len(purse.receipts) == MAX_SIGNERS and sorted(r.tokens for r in purse.receipts) == [
        20,
        30,
        40,
        1000,
    ]


def test_a_member_signs_for_what_it_saw() -> None:
    """Each round once, of the last few windows only."""
    ledger = Ledger()
    for round in (0, 1, 1, 63, 64):
        ledger.note(round, {"a": 10.0, "b": 5.0} if round != 1 else {"a": 10.0})
    assert ledger.of("a", 0) == (0b11 | 1 << 63, 30) and ledger.of("b", 0) == (1 | 1 << 63, 10)
    assert ledger.of("a", 1) == (1, 10) and ledger.of("c", 0) is None
    for window in (2, 4):
        ledger.note(window * WINDOW, {"a": 1.0})
    assert ledger.of("a", 0) is None and ledger.of("a", 4) == (1, 1)


def test_the_file_outlives_a_restart_and_belongs_to_one_run(people: list[Identity], tmp_path: Path) -> None:
    """What is damaged, or another run's, is begun anew."""
    path, purse = tmp_path / "credit.json", purse_of(people)
    save(path, RUN, people[0].peer_id, Tally(1, 2, 3, 4), purse)
    tally, again = load(path, RUN, people[0].peer_id)
    assert tally == Tally(1, 2, 3, 4) and again.receipts == purse.receipts
    assert load(path, bytes(32), people[0].peer_id)[1].receipts == []
    path.write_text("{")
    assert load(path, RUN, people[0].peer_id)[0] == Tally()


def test_a_receipt_is_small() -> None:
    """Question and answer together stay under 150 bytes, at the largest numbers that there are."""
    answer = msgpack.packb([2**WINDOW - 1, 2**62 - 1, bytes(64)])
    assert len(pack_question(2**39)) + len(answer) < 150
    assert unpack_answer(answer) == (2**WINDOW - 1, 2**62 - 1, bytes(64))
    for bad in (b"", b"\xc0", pack_question(-1), msgpack.packb(True), msgpack.packb("x" * 20)):
        with pytest.raises(ValueError):
            unpack_question(bad)
    for bad in (b"", msgpack.packb([1, 2]), msgpack.packb([1.0, 2, b""]), bytes(200)):
        with pytest.raises((ValueError, TypeError)):
            unpack_answer(bad)


def test_members_give_each_other_receipts(people: list[Identity], tmp_path: Path) -> None:
    """Over real connections: each gets the other's signature under what the other saw, and nobody a stranger's."""

    async def meet() -> tuple[Tally, Purse]:
        daemons = [await start_daemon(person, host="127.0.0.1", port=0) for person in people[:2]]
        try:
            places = by_peer([str(address) for address in await daemons[1].get_visible_maddrs()])
            assert await connect(daemons[0], daemons[1].peer_id, places[people[1].peer_id])
            desks = []
            for i in (0, 1):
                (tmp_path / str(i)).mkdir()
                path = tmp_path / str(i) / "credit.json"
                desk = Receipts(
                    daemons[i], people[i], run=RUN, prefix="run", path=path, traffic=lambda: (70, 80)
                )
                await desk.open()
                desks.append(desk)
            for round in range(3):
                for desk in desks:
                    desk.note(round, {people[0].peer_id: 100.0, people[1].peer_id: 50.0})
            desks[1].note(3, {people[1].peer_id: 50.0})  # alone: nobody can sign for it
            await asyncio.gather(*(desk.collect() for desk in desks))
            with pytest.raises(Exception, match="nothing was seen"):
                stub = Receipts.get_stub(daemons[0], daemons[1].peer_id, namespace="run")
                await stub.rpc_receipt(credit_question(9))
        finally:
            for daemon in daemons:
                await daemon.shutdown()
        return load(tmp_path / "1" / "credit.json", RUN, people[1].peer_id)

    tally, purse = asyncio.run(meet())
    assert tally == Tally(4, 200, 70, 80) and purse.totals() == (3, 150, 1)
    (receipt,) = purse.receipts
    assert receipt.is_genuine and receipt.signer == people[0].peer_id and receipt.rounds == 0b111
    assert not replace(receipt, peer=people[2].peer_id).is_genuine


def credit_question(window: int) -> Any:
    from google.protobuf.wrappers_pb2 import BytesValue

    return BytesValue(value=pack_question(window))


def test_a_hostile_receipt_is_never_genuine(people: list[Identity]) -> None:
    """Whatever its fields hold, a look at it gives an answer and no error."""
    good = sign(people[1], RUN, people[0].peer_id, 0, 1, 10)
    assert good.is_genuine
    for changes in ({"signer": "0OIl"}, {"signer": ""}, {"window": -1}, {"window": 2**70}, {"tokens": -1}):
        assert not replace(good, **changes).is_genuine
    assert not Receipt(b"", base58.b58encode(b"x").decode(), good.signer, 0, 1, 1, b"").is_genuine
