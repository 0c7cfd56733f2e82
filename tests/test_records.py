"""Laws of the DHT's records: everybody writes under its own name only, for an hour at most, and nobody's record hides
another's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P
from hivemind.utils import MSGPackSerializer, get_dht_time
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.dht.identity import Identity, load_or_create
from dtrain.dht.records import (
    CLOCK_SLACK_S,
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    MAX_STATUS_FIELDS,
    MAX_STATUS_TEXT,
    SignedRecords,
    pack_status,
    unpack_status,
)
from dtrain.dht.transport import start_daemon

KEY = DHTID.generate("run.workers").to_bytes()
YEAR_2100 = 4102444800.0
STATUS = {"round": 3, "digest": "ab" * 32, "state": "training", "work": 1e6, "name": "ada", "gpu": True}


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    folder = tmp_path_factory.mktemp("identities")
    return load_or_create(folder / "a.key"), load_or_create(folder / "b.key")


def signed(identity: Identity, **changes: Any) -> DHTRecord:
    """A good record of that peer, with `changes` made before it is signed."""
    fields = {
        "key": KEY,
        "subkey": MSGPackSerializer.dumps(identity.peer_id_bytes),
        "value": MSGPackSerializer.dumps(b"value"),
        "expiration_time": get_dht_time() + 10,
        **changes,
    }
    record = DHTRecord(**fields)
    return dataclasses.replace(record, value=SignedRecords(identity).sign_value(record))


def sealed(identity: Identity, record: DHTRecord) -> DHTRecord:
    """The record with that peer's true signature, whatever it says."""
    message = [b"dtrain-dht-record-1", record.key, record.subkey, record.value, record.expiration_time]
    return dataclasses.replace(record, value=record.value + identity.key.sign(msgpack.packb(message)))


def test_a_signed_record_passes_and_comes_back(owners: tuple[Identity, Identity]) -> None:
    """What its owner signed is accepted by everybody, and stripping the signature gives the value back."""
    record = signed(owners[0])
    for identity in owners:
        assert SignedRecords(identity).validate(record)
        assert SignedRecords(identity).strip_value(record) == MSGPackSerializer.dumps(b"value")


def test_nobody_writes_for_another(owners: tuple[Identity, Identity]) -> None:
    """Under another's subkey nothing is signed, and neither an unsigned value nor one's own signature passes."""
    a, b = owners
    theirs = MSGPackSerializer.dumps(b.peer_id_bytes)
    unsigned = signed(a, subkey=theirs)
    assert unsigned.value == MSGPackSerializer.dumps(b"value")
    assert not SignedRecords(b).validate(unsigned)
    assert not SignedRecords(b).validate(dataclasses.replace(signed(a), subkey=theirs))
    forged = DHTRecord(KEY, theirs, MSGPackSerializer.dumps(b"value"), get_dht_time() + 10)
    assert not SignedRecords(b).validate(sealed(a, forged))


def test_a_signature_holds_for_one_place_and_time(owners: tuple[Identity, Identity]) -> None:
    """A record replayed under another key, with another expiry or another value is refused."""
    record, validator = signed(owners[0]), SignedRecords(owners[1])
    for changes in (
        {"key": DHTID.generate("other").to_bytes()},
        {"expiration_time": record.expiration_time + 1},
        {"value": MSGPackSerializer.dumps(b"VALUE") + record.value[-64:]},
    ):
        assert not validator.validate(dataclasses.replace(record, **changes))


@pytest.mark.parametrize("subkey", [b"", b"dictionary", MSGPackSerializer.dumps(None), b"\xc1"])
def test_plain_records_are_refused(subkey: bytes, owners: tuple[Identity, Identity]) -> None:
    """A record without an owner, as hivemind writes plain values, is refused even if somebody signed it."""
    record = DHTRecord(KEY, subkey, MSGPackSerializer.dumps(b"v"), get_dht_time() + 10)
    assert not SignedRecords(owners[0]).validate(sealed(owners[0], record))


@pytest.mark.parametrize(
    ("expires_in_s", "passes"),
    [
        (MAX_LIFETIME_S, True),
        (MAX_LIFETIME_S + CLOCK_SLACK_S + 5, False),
        (YEAR_2100, False),
        (math.inf, False),
        (math.nan, False),
    ],
)
def test_nothing_lives_longer_than_an_hour(
    expires_in_s: float, passes: bool, owners: tuple[Identity, Identity]
) -> None:
    """A far expiry would block a key for years and NaN forever: both are refused, however well signed."""
    record = signed(owners[0], expiration_time=get_dht_time() + expires_in_s)
    assert SignedRecords(owners[1]).validate(record) == passes


def test_records_have_a_largest_size(owners: tuple[Identity, Identity]) -> None:
    """A value up to the limit passes, one byte more does not."""
    overhead = len(signed(owners[0], value=MSGPackSerializer.dumps(bytes(60000))).value) - 60000
    for size, passes in ((MAX_RECORD_BYTES - overhead, True), (MAX_RECORD_BYTES - overhead + 1, False)):
        record = signed(owners[0], value=MSGPackSerializer.dumps(bytes(size)))
        assert SignedRecords(owners[1]).validate(record) == passes


@pytest.mark.parametrize(
    "value", [b"\xc1", b"\xdc\xff", b"", msgpack.packb([1]), msgpack.packb("text"), b"\x01\x01"]
)
def test_a_value_that_readers_stumble_over_is_refused(
    value: bytes, owners: tuple[Identity, Identity]
) -> None:
    """hivemind unpacks all values of a key at once: one that is no msgpack would hide everybody else's."""
    record = DHTRecord(KEY, MSGPackSerializer.dumps(owners[0].peer_id_bytes), value, get_dht_time() + 10)
    assert not SignedRecords(owners[1]).validate(sealed(owners[0], record))


def test_a_subkey_has_one_spelling(owners: tuple[Identity, Identity]) -> None:
    """hivemind packs subkeys anew before it checks a dictionary: another spelling would spoil the whole of it."""
    owner = owners[0].peer_id_bytes
    longer = b"\xc5" + len(owner).to_bytes(2, "big") + owner
    assert msgpack.unpackb(longer) == owner
    record = DHTRecord(KEY, longer, MSGPackSerializer.dumps(b"v"), get_dht_time() + 10)
    assert not SignedRecords(owners[1]).validate(sealed(owners[0], record))


@given(
    key=st.binary(max_size=40),
    subkey=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(MSGPackSerializer.dumps)),
    value=st.binary(max_size=300),
    expires=st.floats(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_garbage_records_are_refused(key: bytes, subkey: bytes, value: bytes, expires: float) -> None:
    """Whatever arrives, the validator says no; it never raises."""
    assert not SignedRecords(ANYBODY).validate(DHTRecord(key, subkey, value, expires))


class _Anybody(Identity):
    """Validation needs no key of its own."""

    def __init__(self) -> None:
        pass


ANYBODY = _Anybody()


def test_a_status_comes_back_as_it_was() -> None:
    """unpack(pack) is the same status."""
    assert unpack_status(pack_status(STATUS)) == STATUS


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": [1.0]},
        {"loss": None},
        {"name": "x" * (MAX_STATUS_TEXT + 1)},
        {"x" * (MAX_STATUS_TEXT + 1): 1},
        {f"field{i}": i for i in range(MAX_STATUS_FIELDS)},
    ],
)
def test_a_status_that_does_not_fit_is_neither_sent_nor_read(bad: dict[str, object]) -> None:
    """Long texts, nested values and too many fields are an error for the sender and nothing for the receiver."""
    with pytest.raises(ValueError, match="status"):
        pack_status({**STATUS, **bad})
    assert unpack_status(msgpack.packb({**STATUS, **bad})) is None


@pytest.mark.parametrize(
    "bad",
    [
        {"round": -1},
        {"round": 2**40},
        {"round": "3"},
        {"round": 3.0},
        {"round": True},
        {"digest": b"ab"},
        {"state": 7},
        {"work": "much"},
        {"work": True},
        {"work": -1.0},
        {"work": math.inf},
        {"work": math.nan},
    ],
)
def test_fields_that_others_act_on_are_checked(bad: dict[str, object]) -> None:
    """A wrong round, digest, state or work makes a status unreadable: the trainer computes with these."""
    assert unpack_status(msgpack.packb({**STATUS, **bad})) is None


@pytest.mark.parametrize("field", ["round", "digest", "state"])
def test_a_status_is_complete(field: str) -> None:
    """Without its round, digest or state a status says nothing."""
    assert unpack_status(msgpack.packb({k: v for k, v in STATUS.items() if k != field})) is None


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(msgpack.packb)
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_garbage_is_no_status(blob: bytes) -> None:
    """Garbage, and well-packed garbage, is None; so is anything but bytes."""
    assert unpack_status(blob) is None
    assert unpack_status([blob]) is None


# ---------------------------------------------------------------------- on two real nodes


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For keys and sockets; short, because the path of a socket must be."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{path}/")
        yield Path(path)


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncIterator[list[DHTNode]]:
    """Two DHT nodes with daemons of their own that know each other; each signs for itself."""
    nodes: list[DHTNode] = []
    daemons: list[P2P] = []
    try:
        for name in ("a", "b"):
            identity = load_or_create(folder / f"{name}.key")
            peers = [str(address) for address in await daemons[0].get_visible_maddrs()] if daemons else []
            daemons.append(await start_daemon(identity, host="127.0.0.1", port=0, initial_peers=peers))
            nodes.append(
                await DHTNode.create(
                    p2p=daemons[-1],
                    initial_peers=peers or None,
                    record_validator=SignedRecords(identity),
                    cache_locally=False,
                    cache_on_store=False,
                )
            )
        yield nodes
    finally:
        for node in nodes:
            await node.shutdown()
        for daemon in daemons:
            await daemon.shutdown()


def test_a_forged_record_is_neither_stored_nor_returned(folder: Path) -> None:
    """Of all that a hostile node sends to or keeps for the others, they see its own honest record only."""

    async def scenario() -> None:
        async with two_nodes(folder) as (honest, hostile):
            ours, theirs = honest.peer_id.to_bytes(), hostile.peer_id.to_bytes()
            expires = get_dht_time() + 60
            assert await honest.store("k", b"true", expires, subkey=ours)
            assert await hostile.store("k", b"mine", expires, subkey=theirs)

            # Without its validator the hostile node signs nothing and checks nothing.
            validator = hostile.protocol.record_validator
            hostile.protocol.record_validator = None
            key = DHTID.generate("k")

            def own(value: bytes) -> bytes:
                """A value with a true signature of the hostile node, under its own subkey."""
                record = DHTRecord(key.to_bytes(), MSGPackSerializer.dumps(theirs), value, expires + 1)
                return bytes(sealed(validator._identity, record).value)

            forgeries = {
                "foreign": (b"\xc4\x05forge" + bytes(64), expires + 1, ours),
                "plain": (b"\xc4\x05forge", YEAR_2100, None),
                "unsigned": (b"\xc4\x05forge", expires + 1, theirs),
                "no msgpack": (own(b"\xc1\xc1"), expires + 1, theirs),
            }
            for name, (value, until, subkey) in forgeries.items():
                stored = await hostile.protocol.call_store(honest.peer_id, [key], [value], until, [subkey])
                assert stored == [False], name
            # What it keeps itself it also hands out, for everybody to read.
            hostile.protocol.storage.store(key, b"\xc4\x05forge" + bytes(64), expires + 2, subkey=ours)

            found = await honest.get("k", latest=True)
            assert {owner: record.value for owner, record in found.value.items()}[ours] == b"true"
            assert all(record.value in (b"true", b"mine") for record in found.value.values())

    asyncio.run(scenario())
