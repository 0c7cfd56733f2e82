"""Laws of the view that peers have of each other: what they say directly, and what the DHT says of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import ValueWithExpiration
from hypothesis import given
from hypothesis import strategies as st

from dtrain.dht import greetings, heartbeats, introductions
from dtrain.dht.greetings import Greeting, Greetings, pack_greeting, unpack_greeting
from dtrain.dht.heartbeats import AT_ONCE, CALM_FROM, LONGEST_PAUSE_S, Heartbeats
from dtrain.dht.identity import Identity
from dtrain.dht.introductions import MAX_CALLS
from dtrain.dht.matchmaking import LeaderBoard

TTL_S, POLL_S = 30.0, 10.0
STATUS = {"round": 3, "digest": "ab", "state": "training", "work": 5.0}


class Network:
    """A DHT and the connections between peers, without a network. `cut` holds (caller, callee)."""

    def __init__(self) -> None:
        self.peers: dict[str, Heartbeats] = {}
        self.records: dict[bytes, ValueWithExpiration[bytes]] = {}
        self.cut: set[tuple[str, str]] = set()
        self.sent: list[tuple[str, str, int]] = []

    def peer(self, *, client_mode: bool = False) -> Heartbeats:
        name = PeerID(Identity(Path(), Ed25519PrivateKey.generate()).peer_id_bytes)
        protocol = SimpleNamespace(p2p=SimpleNamespace(network=self, peer_id=name), client_mode=client_mode)
        node: Any = SimpleNamespace(peer_id=name, protocol=protocol, store=self.store, get=self.get)
        made = Heartbeats(node, "run", ttl_s=TTL_S, poll_s=POLL_S)
        self.peers[str(name)] = made
        return made

    async def store(self, key: str, value: bytes, *, expiration_time: float, subkey: bytes, **_: Any) -> bool:
        self.records[subkey] = ValueWithExpiration(value, expiration_time)
        return True

    async def get(self, key: str, latest: bool, **_: Any) -> ValueWithExpiration[Any]:
        return ValueWithExpiration(dict(self.records), 0.0)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    def get_stub(p2p: Any, peer: PeerID, *, namespace: str) -> Any:
        network: Network = p2p.network

        async def rpc_greet(request: BytesValue, timeout: float) -> BytesValue:
            if (str(p2p.peer_id), str(peer)) in network.cut or str(peer) not in network.peers:
                raise ConnectionRefusedError
            network.sent.append((str(p2p.peer_id), str(peer), len(request.value)))
            answering: Any = network.peers[str(peer)]._greetings
            return await answering.rpc_greet(request, SimpleNamespace(remote_id=p2p.peer_id))

        return SimpleNamespace(rpc_greet=rpc_greet)

    monkeypatch.setattr(Greetings, "get_stub", staticmethod(get_stub))
    return Network()


def name(peer: Heartbeats) -> str:
    return PeerID(peer._own_id).to_base58()


def seen(peer: Heartbeats) -> dict[str, dict[str, Any]]:
    return {record.peer_id: dict(record.status) for record in peer.others()}


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_what_one_says_all_know_at_once(network: Network) -> None:
    """After a newcomer's first look everybody knows it and it knows all; from then on each word reaches all."""

    async def scenario() -> None:
        peers = [network.peer() for _ in range(4)]
        for peer in peers:
            await peer.announce(STATUS)
            await peer.refresh()
        await peers[2].announce({**STATUS, "round": 4})
        for peer in peers[:2] + peers[3:]:
            assert len(peer.others()) == 3
            assert seen(peer)[name(peers[2])]["round"] == 4

    play(scenario)


def test_a_status_travels_once(network: Network) -> None:
    """Who has heard a status is not told it again: a heartbeat that changes nothing is a few bytes."""

    async def scenario() -> None:
        a, b = network.peer(), network.peer()
        await a.announce({**STATUS, "name": "x" * 150})
        await b.announce(STATUS)
        await b.refresh()
        await a.announce({**STATUS, "name": "x" * 150})
        network.sent.clear()
        await a.announce({**STATUS, "name": "x" * 150})
        [(_, _, size)] = network.sent
        assert size < 50
        assert seen(b)[name(a)]["name"] == "x" * 150

    play(scenario)


def at(peer: Heartbeats) -> dict[str, Any]:
    return {**STATUS, "address": f"/ip4/10.0.0.1/tcp/31000/p2p/{name(peer)}"}


def test_peers_that_missed_each_other_are_introduced(network: Network) -> None:
    """Two that know a third, and of whose records in the DHT each sees only its own, soon know each other."""

    async def scenario() -> None:
        a, *late = peers = [network.peer() for _ in range(8)]
        await a.announce(at(a))
        for peer in late:
            await peer.announce(at(peer))
            network.records = {a._own_id: network.records[a._own_id]}  # the others' records are lost
            await peer.refresh()
        for _ in range(20):  # heartbeats
            for peer in peers:
                await peer.announce(at(peer))
            await asyncio.sleep(0)
        for peer in peers:
            assert set(seen(peer)) == {name(other) for other in peers} - {name(peer)}
        network.sent.clear()
        await a.announce(at(a))
        assert max(size for _, _, size in network.sent) < 60  # all know the same: nothing more to say

    play(scenario)


def test_who_only_calls_us_does_not_let_us_in(network: Network) -> None:
    """Whether others let us in is said by their answers; an observer's calls are no answers."""

    async def scenario() -> None:
        a, member, observer = network.peer(), network.peer(), network.peer()
        answers: dict[str, str] = {}
        a.admissions = SimpleNamespace(  # type: ignore[assignment]
            heard=answers.__setitem__, door=SimpleNamespace(opinion=lambda peer: "")
        )
        for peer in (a, member):
            await peer.announce(STATUS)
            await peer.refresh()
        await observer.refresh()  # which asks, and has nothing to say
        assert set(answers) <= {name(member)}
        await a.announce(STATUS)
        assert answers == {name(member): ""}

    play(scenario)


@pytest.mark.parametrize(
    ("others", "pause_s"), [(1, POLL_S), (2 * CALM_FROM, 4 * POLL_S), (5 * CALM_FROM, LONGEST_PAUSE_S)]
)
def test_the_more_are_known_the_rarer_the_dht_is_read(
    others: int, pause_s: float, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only a few nodes are asked: each answers with everybody's record, so looks would cost N times N."""
    asked, pauses = [], []

    async def scenario() -> None:
        peer = network.peer()
        for other in [network.peer() for _ in range(others)]:
            await other.announce(STATUS)
        await peer.announce(STATUS)

        async def get(key: str, latest: bool, num_workers: int) -> ValueWithExpiration[Any]:
            asked.append((latest, num_workers))
            return await network.get(key, latest)

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            raise asyncio.CancelledError

        peer._node.get = get
        monkeypatch.setattr(asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await peer.poll()
        assert len(peer.others()) == others

    play(scenario)
    assert asked == [(False, AT_ONCE)] and pauses == [pause_s]


def test_who_is_introduced_under_anothers_name_is_not_believed(network: Network) -> None:
    """A wrong address costs a call in vain, and not more than a few at a time."""

    async def scenario() -> None:
        a, calls = network.peer(), []

        async def greet(peers: list[str]) -> None:
            calls.append(peers)

        a._greetings.greet = greet  # type: ignore[method-assign, assignment]
        nobody = [PeerID(Identity(Path(), Ed25519PrivateKey.generate()).peer_id_bytes) for _ in range(50)]
        for peer in nobody:
            a._introductions.meet(f"/ip4/10.0.0.1/tcp/1/p2p/{peer}")
            a._introductions.meet(f"/ip4/10.0.0.1/tcp/2/p2p/{peer}")
        a._introductions.meet("no address")
        await asyncio.sleep(0.05)
        assert len(calls) == MAX_CALLS
        assert a.others() == []

    play(scenario)


def test_halves_of_equal_work_settle_on_one_theta(network: Network) -> None:
    """Though they are at different rounds, so that neither would ever meet the other: one of them is behind."""

    async def scenario() -> None:
        peers = [network.peer() for _ in range(4)]
        for number, peer in enumerate(peers):
            await peer.announce({**STATUS, "digest": "ab" if number < 2 else "cd", "round": 3 + number // 2})
            await peer.refresh()
        await peers[0].announce(peers[0].status)
        behind = {name(peer): {record.peer_id for record in peer.ahead()} for peer in peers}
        those = {name(peer) for peer in peers[:2]}
        assert behind == {name(peer): set() if name(peer) in those else those for peer in peers}

    play(scenario)


async def nothing(*_: Any, **__: Any) -> None:
    """What a DHT finds that has forgotten."""


def test_halves_of_a_split_network_find_each_other(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each has long forgotten the other, and so has the DHT; who had said goodbye is not called."""

    async def scenario() -> None:
        gone, *peers = [network.peer() for _ in range(6)]
        now = get_dht_time()
        for module in (heartbeats, introductions):
            monkeypatch.setattr(module, "get_dht_time", lambda: now)

        async def live(seconds: float) -> None:
            nonlocal now
            for _ in range(int(seconds / POLL_S)):
                now += POLL_S
                for peer in peers:
                    await peer.announce(at(peer))
                    peer._introductions.look_for_the_lost(peer.others())
                for _ in range(20):
                    await asyncio.sleep(0)

        for peer in (gone, *peers):
            await peer.announce(at(peer))
            await peer.refresh()
        await live(POLL_S)
        assert [len(peer.others()) for peer in peers] == [5] * 5
        await gone.announce({**at(gone), "state": "leaving"})
        del network.peers[name(gone)]
        await live(POLL_S)
        sides = peers[:2], peers[2:]
        network.cut = {(name(a), name(b)) for a in peers for b in peers if (a in sides[0]) != (b in sides[0])}
        network.get = nothing  # type: ignore[method-assign]
        await live(20 * TTL_S)
        assert [len(peer._known) for peer in peers] == [1, 1, 2, 2, 2]
        network.cut = set()
        await live(2 * TTL_S)
        assert [len(peer.others()) for peer in peers] == [4] * 5
        assert all(name(gone) not in peer._introductions._met for peer in peers)

    play(scenario)


def test_who_has_forgotten_is_told_again(network: Network) -> None:
    """A peer whose network process is new hears of a status that was told to the old one."""

    async def scenario() -> None:
        a, b = network.peer(), network.peer()
        await a.announce(STATUS)
        await b.announce(STATUS)
        await b.refresh()
        await a.announce(STATUS)
        b._known.clear()
        await a.announce(dict(STATUS))
        assert seen(b)[name(a)] == STATUS

    play(scenario)


def test_an_observer_sees_all_and_is_seen_by_nobody(network: Network) -> None:
    """Who only looks gets everybody's newest word, also between two records in the DHT."""

    async def scenario() -> None:
        a, observer = network.peer(), network.peer()
        await a.announce(STATUS)
        polling = asyncio.create_task(observer.poll())
        await observer.refresh()
        polling.cancel()
        await a.announce({**STATUS, "round": 9})
        again = asyncio.create_task(observer.poll())
        for _ in range(20):
            await asyncio.sleep(0)
        again.cancel()
        assert seen(observer)[name(a)]["round"] == 9
        assert not a.others() and not observer.announced

    play(scenario)


def test_who_cannot_be_called_asks(network: Network) -> None:
    """A peer that nobody can call hears others' news, leaders too, in the answers to what it says."""

    async def scenario() -> None:
        a, client = network.peer(), network.peer(client_mode=True)
        network.cut.add((name(a), name(client)))
        await a.announce(STATUS)
        await client.announce({**STATUS, "reach": "client"})
        await client.refresh()
        await LeaderBoard(PeerID(a._own_id), a).store("run-3.0b", a._own_id, True, get_dht_time() + 9.0)
        await asyncio.sleep(0)
        found = await LeaderBoard(PeerID(client._own_id), client).get("run-3.0b")
        assert list(found.value) == [a._own_id]

    play(scenario)


def test_who_is_reached_through_a_relay_is_told(network: Network) -> None:
    """It need not ask each peer through the relay before it looks for a group's leader: news comes to it by itself."""

    async def scenario() -> None:
        a, relayed = network.peer(), network.peer(client_mode=True)
        await a.announce(STATUS)
        await relayed.announce({**STATUS, "reach": "relayed"})
        await relayed.refresh()
        await LeaderBoard(PeerID(a._own_id), a).store("run-3.0b", a._own_id, True, get_dht_time() + 9.0)
        await asyncio.sleep(0)
        network.sent.clear()
        found = await LeaderBoard(PeerID(relayed._own_id), relayed).get("run-3.0b")
        assert list(found.value) == [a._own_id]
        assert {caller for caller, *_ in network.sent} == {name(a)}

    play(scenario)


def test_the_dead_do_not_come_back_from_the_dht(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that can be dialled and has not spoken for its heartbeat's lifetime is gone, though the DHT's record of
    it lasts longer; also for a newcomer. One that cannot be dialled is there as long as its record."""

    async def scenario() -> None:
        a, b, client = network.peer(), network.peer(), network.peer(client_mode=True)
        await b.announce(STATUS)
        await client.announce({**STATUS, "reach": "client"})
        await a.refresh()
        assert seen(a).keys() == {name(b), name(client)}
        del network.peers[name(b)], network.peers[name(client)]
        later = get_dht_time() + TTL_S + 1.0
        monkeypatch.setattr(heartbeats, "get_dht_time", lambda: later)
        newcomer = network.peer()
        for peer in (a, newcomer):
            await peer.refresh()
        assert name(b) not in seen(a)
        assert seen(newcomer).keys() == {name(client)}

    play(scenario)


def test_a_leader_is_known_until_it_leads_no_more(network: Network) -> None:
    """Leaders are found under their group's key only, and only while they say that they would lead it."""

    async def scenario() -> None:
        a, b = network.peer(), network.peer()
        boards = [LeaderBoard(PeerID(peer._own_id), peer) for peer in (a, b)]
        for peer in (a, b):
            await peer.announce(STATUS)
            await peer.refresh()
        until = get_dht_time() + 9.0
        await a.lead("run-3.0b", until)
        found = await boards[1].get("run-3.0b")
        assert {k: v.expiration_time for k, v in found.value.items()} == {a._own_id: until}
        b._changed.set()
        assert not (await boards[1].get("run-4.0b")).value
        await a.announce({**STATUS, "round": 4})
        assert (await boards[1].get("run-3.0b")).value
        await a.lead("", until)
        assert not (await boards[1].get("run-3.0b")).value

    play(scenario)


def test_a_search_can_be_ended_at_any_moment(network: Network) -> None:
    """Also when news comes at that very moment: a leader whose search goes on keeps its group waiting."""

    async def scenario() -> None:
        peer = network.peer()
        for turns in range(6):
            looking = asyncio.create_task(LeaderBoard(PeerID(peer._own_id), peer).get("run-3.0b"))
            for _ in range(5):
                await asyncio.sleep(0)
            peer._changed.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            if looking.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await looking

    play(scenario)


@given(blob=st.binary(max_size=200))
def test_no_bytes_harm(blob: bytes) -> None:
    """Whatever arrives is a greeting or refused by ValueError."""
    try:
        unpack_greeting(blob)
    except ValueError:
        pass


@pytest.mark.parametrize(
    "greeting",
    [
        Greeting(float("nan")),
        Greeting(-1.0),
        Greeting(0.0, float("inf"), STATUS),
        Greeting(0.0, 1.0, None, ("k" * 300, 1.0)),
        Greeting(0.0, 1.0, None, ("k", float("nan"))),
        Greeting(0.0, 1.0, {**STATUS, "round": -1}),
    ],
)
def test_unfit_fields_are_refused(greeting: Greeting) -> None:
    """Times must be finite and not negative, keys short, and a status fit the schema of heartbeats."""
    with pytest.raises(ValueError):
        unpack_greeting(pack_greeting(greeting))


def test_a_greeting_survives_the_wire() -> None:
    """What is packed comes out; more bytes than a greeting may have are refused unread."""
    for greeting in (Greeting(0.0), Greeting(1.5, 2.5, STATUS, ("k", 3.5))):
        assert unpack_greeting(pack_greeting(greeting)) == greeting
    with pytest.raises(ValueError):
        unpack_greeting(bytes(greetings.MAX_GREETING_BYTES + 1))
