"""Whether others can dial a machine is found out by dialling it, and nothing else counts."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hivemind.p2p import P2P, PeerID
from hypothesis import given
from hypothesis import strategies as st

from dtrain.dht import reachability
from dtrain.dht.address_book import FILE, MAX_REMEMBERED, AddressBook
from dtrain.dht.addresses import best_first, by_peer, ip_of
from dtrain.dht.connection import Connection, attach
from dtrain.dht.identity import Identity, load_or_create
from dtrain.dht.reachability import (
    CLIENT,
    DIRECT,
    Finding,
    Witness,
    ask_witnesses,
    connect,
    judge,
    pack_request,
    seen_at,
)
from dtrain.dht.statements import networks
from dtrain.dht.transport import TransportError, start_daemon

PUBLIC, HOME, SELF = "20.0.0.1", "192.168.1.5", "127.0.0.1"
PATIENCE_S = 60.0
PEER = "12D3KooWGvY61cSKFvNbCMTwGAqrBqBTGPnai6EQNqaQjr9JPTvV"


def said(reached: bool, seen: str) -> Finding:
    return Finding(reached, seen, ())


@pytest.mark.parametrize(
    ("found", "reach"),
    [
        ([], CLIENT),
        ([said(True, PUBLIC)], DIRECT),
        ([said(False, PUBLIC)], CLIENT),
        ([said(False, PUBLIC), said(True, PUBLIC)], DIRECT),
        ([said(True, HOME)], DIRECT),
        ([said(True, HOME), said(True, SELF), said(False, PUBLIC)], CLIENT),
        ([said(True, SELF)], DIRECT),
        ([said(True, SELF), said(False, HOME)], CLIENT),
    ],
)
def test_who_sees_us_from_farther_away_knows_better(found: list[Finding], reach: str) -> None:
    """That a neighbour reaches us says nothing of the internet; without any witness we count on nobody reaching us."""
    assert judge(found) == reach
    assert judge(found[::-1]) == reach


def test_addresses_are_sorted_out() -> None:
    """Addresses are grouped by peer, nonsense is left out, and the ones that most can use come first."""
    at = [f"/ip4/{ip}/tcp/7" for ip in (SELF, HOME, PUBLIC)]
    given = [f"{place}/p2p/{PEER}" for place in at] + ["", "/p2p/", f"/p2p/{PEER}", "nonsense", at[0]]
    assert by_peer(given) == {PEER: at}
    assert best_first(at) == at[::-1]
    assert [ip_of(address) for address in (*at, "/ip4/300.1.1.1/tcp/7", "/ip6/::1", "")] == [
        SELF,
        HOME,
        PUBLIC,
    ] + [""] * 3


def test_addresses_of_peers_that_are_gone_are_remembered() -> None:
    """Who comes back after a while has others to ask than those it first joined through; the book does not grow."""
    book = AddressBook()
    for number in range(2 * MAX_REMEMBERED):
        book.hear(f"peer {number}", f"address {number}")
        book.hear("mover", f"place {number}")
        book.hear("client", "")
        book.hear("liar", number)
    said = book.addresses()
    assert len(said) == MAX_REMEMBERED and said[-1] == f"place {2 * MAX_REMEMBERED - 1}"
    assert sum(address.startswith("place") for address in said) == 1


def test_addresses_are_remembered_over_a_restart(tmp_path: Path) -> None:
    """A machine whose power was cut finds back through whom it knew, though the maker of its invite is gone; a file
    that is none, or one that cannot be written, does no harm."""
    path = tmp_path / FILE
    book = AddressBook(path)
    book.hear("a", "address 1")
    book.hear("a", "address 2")
    book.hear("b", "address 3")
    assert AddressBook(path).addresses() == ["address 2", "address 3"]
    for spoiled in ("", "[1]", '{"a": 3}', "null", "\xff"):
        path.write_text(spoiled)
        assert AddressBook(path).addresses() == []
    AddressBook(tmp_path / "nowhere" / FILE).hear("a", "address 1")


@given(st.binary(max_size=200))
def test_garbage_is_no_request(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a request"):
        reachability._parse_request(raw, b"witness", b"scout")


def test_a_request_is_good_for_one_witness_and_one_scout(tmp_path: Path) -> None:
    """Nobody can have us drop or dial a peer in whose name they cannot sign."""
    identity = load_or_create(tmp_path / "key")
    request = pack_request(identity, 7, b"witness", b"scout")
    assert reachability._parse_request(request, b"witness", b"scout") == (identity.peer_id_bytes, 7)
    for witness, scout in ((b"another", b"scout"), (b"witness", b"another")):
        with pytest.raises(ValueError, match="not a request"):
            reachability._parse_request(request, witness, scout)
    for port in (0, -1, 65536):
        with pytest.raises(ValueError, match="not a request"):
            reachability._parse_request(pack_request(identity, port, b"w", b"s"), b"w", b"s")


# ---------------------------------------------------------------------- with real daemons


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For keys and sockets; short, because the path of a socket must be."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{path}/")
        yield Path(path)


class Daemons:
    """Real libp2p daemons on loopback."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.all: list[P2P] = []

    async def start(self, name: str, *, dialable: bool = True) -> tuple[P2P, Identity]:
        identity = load_or_create(self.folder / f"{name}.key")
        self.all.append(await start_daemon(identity, host=SELF, port=0, dialable=dialable))
        return self.all[-1], identity


def with_daemons(folder: Path, scenario: Callable[[Daemons], Awaitable[None]]) -> None:
    async def run() -> None:
        daemons = Daemons(folder)
        try:
            await scenario(daemons)
        finally:
            for daemon in daemons.all:
                await daemon.shutdown()

    asyncio.run(run())


async def places(p2p: P2P) -> dict[str, list[str]]:
    return by_peer([str(address) for address in await p2p.get_visible_maddrs()])


def port_of(peers: Mapping[str, list[str]]) -> int:
    return int(next(iter(peers.values()))[0].rpartition("/")[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((SELF, 0))
        return int(probe.getsockname()[1])


def test_a_connection_of_our_own_making_proves_nothing(folder: Path) -> None:
    """A witness that we are connected with reaches us over that connection, but does not take it for dialling."""

    async def scenario(daemons: Daemons) -> None:
        witness, _ = await daemons.start("witness")
        await Witness(witness, list).open()
        scout, _ = await daemons.start("scout", dialable=False)
        hidden, identity = await daemons.start("hidden", dialable=False)
        assert await connect(hidden, witness.peer_id, (await places(witness))[str(witness.peer_id)])
        assert await seen_at(witness, hidden.peer_id) == [SELF]
        found = await ask_witnesses(scout, identity, free_port(), await places(witness))
        assert found == [said(False, SELF)]
        assert (
            await seen_at(witness, hidden.peer_id) == []
        )  # it was dropped, as one that leads nowhere would be

        open_one, identity = await daemons.start("open")
        found = await ask_witnesses(scout, identity, port_of(await places(open_one)), await places(witness))
        assert found == [said(True, SELF)]

    with_daemons(folder, scenario)


def test_the_network_of_each_connection_is_known(folder: Path) -> None:
    """At both ends, also of one that nobody could dial; of whoever is not connected nothing is."""

    async def scenario(daemons: Daemons) -> None:
        a, _ = await daemons.start("a")
        b, _ = await daemons.start("b", dialable=False)
        await daemons.start("c")
        assert await connect(b, a.peer_id, (await places(a))[str(a.peer_id)])
        network = bytes([127, 0, 0])
        assert await networks(a) == {str(b.peer_id): network}
        assert await networks(b) == {str(a.peer_id): network}


def test_who_was_dialled_in_vain_can_be_dialled_again(folder: Path) -> None:
    """libp2p waits ever longer between two dials of a peer that does not answer: one that is started again would be
    told that nobody can dial it."""

    async def scenario(daemons: Daemons) -> None:
        witness, _ = await daemons.start("witness")
        await Witness(witness, list).open()
        scout, _ = await daemons.start("scout", dialable=False)
        identity, port = load_or_create(daemons.folder / "late.key"), free_port()
        late = PeerID.from_base58(identity.peer_id)
        for _ in range(3):
            assert not await connect(witness, late, [f"/ip4/{SELF}/tcp/{port}"])
        own = await start_daemon(identity, host=SELF, port=port)
        daemons.all.append(own)
        assert await ask_witnesses(scout, identity, port, await places(witness)) == [said(False, SELF)]
        assert await ask_witnesses(scout, identity, port, await places(witness), own) == [said(True, SELF)]

    with_daemons(folder, scenario)


def test_a_neighbour_names_others_to_ask(folder: Path) -> None:
    """Of witnesses that see us from nearby, those are asked too that they suggest; a silent one is none."""

    async def scenario(daemons: Daemons) -> None:
        near, _ = await daemons.start("near")
        far, _ = await daemons.start("far")
        silent, _ = await daemons.start("silent")
        scout, _ = await daemons.start("scout", dialable=False)
        subject, identity = await daemons.start("subject")
        suggested = [str(address) for p2p in (far, silent) for address in await p2p.get_visible_maddrs()]
        await Witness(near, lambda: [*suggested, "nonsense"]).open()
        await Witness(far, list).open()
        found = await ask_witnesses(scout, identity, port_of(await places(subject)), await places(near))
        assert [(finding.reached, finding.seen) for finding in found] == [(True, SELF)] * 2
        assert len(await seen_at(far, subject.peer_id)) == 1

    with_daemons(folder, scenario)


def test_attaching_finds_the_reach_out(folder: Path) -> None:
    """With nobody to ask we take it that we can be dialled; else a witness decides, and where none speaks we do not
    count on it. A newcomer whose peers are silent is told; one that comes back waits for them with the reach it had.
    """

    async def scenario(daemons: Daemons) -> None:
        async def place(name: str, peers: list[str], before: str = "") -> Connection:
            identity = load_or_create(folder / f"{name}.key")
            made = await attach(identity, folder, host="0.0.0.0", port=0, peers=peers, before=before)
            daemons.all.append(made.p2p)
            return made

        first = await place("first", [])
        assert first.reach == DIRECT and first.addresses == best_first(first.addresses)
        hidden = await place("hidden", first.addresses)
        assert hidden.reach == CLIENT and hidden.addresses
        assert set(hidden.addresses) <= set(first.addresses)  # others can join where it did
        await Witness(first.p2p, list).open()
        second = await place("second", first.addresses)
        assert second.reach == DIRECT and not set(second.addresses) & set(first.addresses)

        nobody = [f"/ip4/{SELF}/tcp/{free_port()}/p2p/{PEER}"]
        with pytest.raises(TransportError, match="none of the given peers can be reached"):
            await place("newcomer", nobody)
        for before in (DIRECT, CLIENT):
            assert (await place(f"back-{before}", nobody, before)).reach == before

    with_daemons(folder, scenario)


def test_who_has_lost_everybody_finds_back(folder: Path) -> None:
    """hivemind's node forgets a peer for one late answer; who cannot be dialled would never hear of anybody again."""

    async def scenario(daemons: Daemons) -> None:
        made = []
        for name in ("public", "hidden"):
            identity = load_or_create(folder / f"{name}.key")
            peers = made[0].addresses if made else []
            made.append(await attach(identity, folder, host="0.0.0.0", port=0, peers=peers))
            daemons.all.append(made[-1].p2p)
        hidden = made[1]
        assert hidden.reach == CLIENT
        table = hidden.node.protocol.routing_table
        assert len(table.uid_to_peer_id) == 1
        for node in list(table.uid_to_peer_id):
            del table[node]
        keeping = asyncio.create_task(hidden.keep(list))
        until = time.monotonic() + PATIENCE_S
        while not table.uid_to_peer_id and time.monotonic() < until:
            await asyncio.sleep(0.05)
        keeping.cancel()
        assert len(table.uid_to_peer_id) == 1
        assert hidden.may_be_cut_off() and not made[0].may_be_cut_off()

    with_daemons(folder, scenario)
