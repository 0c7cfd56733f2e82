"""Laws of what is refused: each forged attempt is counted by its reason, and the counts reach the worker's metrics, its
bulletin and the dashboard's `/metrics` as they are.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from dashboard_tools import Client, Stage
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import ValueWithExpiration
from test_door import ORGANIZER, RUN, door, passes, peer, records, revoked_token, shown, token

from dtrain.dht import exchange as dht_exchange
from dtrain.dht.door import Entry
from dtrain.dht.exchange import DhtExchange
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.identity import Identity
from dtrain.dht.peer_settings import PeerSettings
from dtrain.dht.records import SignedRecords
from dtrain.dht.tokens import Revocations
from dtrain.experiments.dashboard_app import create_app
from dtrain.experiments.dashboard_guard import Access
from dtrain.trainer.bulletin import unpack_bulletin
from dtrain.trainer.metrics import MetricsLog, read_metrics
from dtrain.trainer.reporting import Reporter

OWN_REASONS = {
    *("no-token", "expired", "revoked", "wrong-run", "wrong-peer", "bad-signature", "used-up"),
    *("record-signature", "record-expiry", "record-size", "record-schema", "greeting-schema"),
}


class Member:
    """One member's side of the network, with the records of a DHT that took everything."""

    def __init__(self, who: Identity | None = None, own_pass: bytes = b"") -> None:
        who = who or peer()
        self.validator, self.door = SignedRecords(who), door()
        self.records: dict[bytes, ValueWithExpiration[bytes]] = {}
        protocol = SimpleNamespace(p2p=None, client_mode=False, record_validator=self.validator)
        node: Any = SimpleNamespace(peer_id=PeerID(who.peer_id_bytes), protocol=protocol, get=self.get)
        self.heartbeats = Heartbeats(node, "run", ttl_s=30.0, poll_s=10.0, entry=Entry(self.door, own_pass))

    async def get(self, key: str, latest: bool, **_: Any) -> ValueWithExpiration[Any]:
        return ValueWithExpiration(dict(self.records), 0.0)

    def refusals(self) -> dict[str, int]:
        return dict(self.heartbeats.refusals()["refusals"])


def attempts(member: Member) -> Counter[str]:
    """1,202 forged attempts on a member, of which none may succeed; what each is to be counted as."""
    revocations = Revocations.make(ORGANIZER.sign, RUN, 1, [revoked_token.grant.key], [])
    assert member.door.hear_revocations(revocations.blob)
    expected = Counter[str]()
    for reason, who, blob in passes():
        assert member.door.admit(who, blob) == reason
        expected[reason] += bool(reason)
    for reason, record in records(peer(), peer()):
        assert not member.validator.validate(record)
        expected[reason] += 1
    return +expected


async def misfits(member: Member) -> Counter[str]:
    """A well-signed record that is no heartbeat, read three times, and a greeting that is none."""
    member.records[peer().peer_id_bytes] = ValueWithExpiration(msgpack.packb({"round": -1}), 1e9)
    for _ in range(3):
        await member.heartbeats.refresh()
    greetings: Any = member.heartbeats._greetings
    with pytest.raises(ValueError, match="greeting"):
        await greetings.rpc_greet(BytesValue(value=b"\xc1"), SimpleNamespace(remote_id=peer().peer_id))
    assert not member.heartbeats.others()
    return Counter({"record-schema": 1, "greeting-schema": 1})


def counted_by_prometheus(text: str) -> dict[str, int]:
    found = re.findall(
        r'^dtrain_refused_total\{.*worker="ada".*reason="([a-z-]+)"\} (\d+)$', text, re.MULTILINE
    )
    return {reason: int(count) for reason, count in found}


def test_each_forged_attempt_is_counted_up_to_the_dashboard(tmp_path: Path) -> None:
    """1,202 attempts of every kind that there is: 0 accepted, and metrics.jsonl, bulletin and `/metrics` have the exact
    count of each reason.
    """
    member = Member()
    expected = attempts(member) + asyncio.run(misfits(member))
    assert set(expected) == OWN_REASONS and expected.total() == 1202
    assert member.refusals() == expected

    exchange: Any = SimpleNamespace(refusals=member.refusals, announce=lambda status: None)
    outer: Any = SimpleNamespace(round=1, digest=b"", tokens=0)
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        report = Reporter("ada", "cpu", metrics, exchange, outer, print)
        report.announce()
        report.announce()
    (event,) = [e for e in read_metrics(tmp_path / "metrics.jsonl") if e["event"] == "refused"]
    assert event["counts"] == expected

    stage = Stage(tmp_path / "dashboard")
    stage.enter("ada", "bert")
    stage.actors["ada"].bulletin = report.bulletin
    view = unpack_bulletin(report.bulletin.pack(stage.now, (0, 0)))
    assert view is not None and view.refused == expected
    stage.play_round()
    app = create_app(hub=stage.hub, access=Access(), run=None, results=None, machine=None)
    assert counted_by_prometheus(Client(app).get("/metrics").text) == expected
    stage.history.close()


def test_a_member_counts_its_own_use_of_a_token() -> None:
    """Of two that come by a token for one machine, the first refuses the second, though it has seen nobody use it."""
    good, first, second = token(uses=1), peer(), peer()
    member = Member(first, shown(good, first))
    assert member.door.admit(second.peer_id, shown(good, second)) == "used-up"
    assert Member(second).door.admit(second.peer_id, shown(good, second)) == ""


def test_counts_outlive_a_network_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the place of another begins at 0; the worker's counts go on from where they were."""

    class Process(SimpleNamespace):
        def command(self, name: str, **_: object) -> dict[str, object]:
            return {"peer_id": "p", "addresses": [], "reach": "direct"}

        def tell(self, name: str, **_: object) -> None:
            pass

    monkeypatch.setattr(dht_exchange, "NetworkProcess", lambda *_: Process(private_folder=tmp_path))
    worker = DhtExchange(PeerSettings(tmp_path / "identity.key"))
    swarm: dict[str, Any] = {"event": "swarm", "peers": [], "traffic": {"up": 40, "down": 30, "wire": 100}}
    worker._hear({**swarm, "refusals": {"no-token": 2, "expired": 1}})
    worker._come_back()
    worker._hear({**swarm, "refusals": {"no-token": 3}})
    assert worker.refusals() == {"no-token": 5, "expired": 1}
    assert (worker.traffic(), worker.wire_bytes()) == ((80, 60), 200)
