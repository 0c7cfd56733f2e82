"""`dtrain doctor` finds what is planted, says how to mend it, and its exit code tells."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path

import msgpack
import psutil
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from dtrain.dht.distance import MAX_BYTES, Probe, measure
from dtrain.dht.identity import load_or_create
from dtrain.dht.invite import Invite
from dtrain.dht.reachability import by_peer, connect
from dtrain.dht.transport import start_daemon
from dtrain.trainer import doctor
from dtrain.trainer.cli import main
from dtrain.trainer.doctor import FAIL, OK, WARN, Check

Usage = namedtuple("Usage", "total used free")
PEER = "12D3KooWAFrq41GtRiDSGeKvjd3UycrWzVWjDf5p6PBXbiPpzMeK"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Check]]:
    """The exit code, and the checks by name."""
    code = main(["doctor", "--json", "--quick", "--host", "127.0.0.1", *argv])
    return code, {entry["check"]: Check(**entry) for entry in json.loads(capsys.readouterr().out)}


def test_a_sound_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planted, nothing is found: exit code 0, and no fix beside what is well."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 50e9))
    code, found = report(capsys)
    assert code == 0
    assert list(found) == ["python", "packages", "accelerator", "training", "memory", "disk", "port"]
    assert "fp32" in found["training"].detail or "bf16" in found["training"].detail
    assert all(
        check.status in (OK, WARN) and (check.fix == "") == (check.status == OK) for check in found.values()
    )


def test_no_disk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk fails, and the fix names the flag."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0.2e9))
    code, found = report(capsys)
    assert code == 1 and found["disk"].status == FAIL and "--folder" in found["disk"].fix


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for the libraries fails."""
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(0.5e9))
    assert doctor.memory().status == FAIL


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """The fix names the flag."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, found = report(capsys, "--port", str(taken.getsockname()[1]))
    assert code == 1 and found["port"].status == FAIL and "--port" in found["port"].fix


def test_wrong_packages() -> None:
    """A version that will not do and a missing package are named, with the line that mends both."""
    check = doctor.packages(["numpy>=999", "no-such-package-of-ours>=1", "torch"])
    assert check.status == FAIL
    assert "numpy" in check.detail and "no-such-package-of-ours is missing" in check.detail
    assert "pip install 'numpy>=999' 'no-such-package-of-ours>=1'" in check.fix and "torch" not in check.fix


def test_a_wrong_package_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with 1, and everything else is still looked at."""
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=999"])
    code, found = report(capsys)
    assert code == 1 and found["packages"].status == FAIL and "numpy>=999" in found["packages"].fix
    assert "port" in found


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9), FAIL), ((3, 10), OK), ((3, 14), OK), ((3, 15), FAIL)]
)
def test_python_versions(version: tuple[int, int], status: str) -> None:
    """Those that the libraries exist for."""
    assert doctor.python_version(version).status == status


@pytest.mark.parametrize(
    ("skew_s", "status"),
    [(0.2, OK), (-0.2, OK), (90.0, WARN), (-90.0, WARN), (1e5, FAIL), (-1e5, FAIL), (None, WARN)],
)
def test_a_clock_that_is_off(skew_s: float | None, status: str) -> None:
    """A worker goes by the others' clocks, but not by such as are more than a day from its own."""
    assert doctor.clock(skew_s).status == status


def test_a_dead_bootstrap_peer(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody listens at the invite's address: refused at once, and the fix is a fresh invite."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        invite = Invite("r", bytes(32), bytes(32), (f"/ip4/127.0.0.1/tcp/{port}/p2p/{PEER}",))
        code, found = report(capsys, invite.encode())
    assert code == 1 and found["bootstrap"].status == FAIL and "fresh invite" in found["bootstrap"].fix


def test_blocked_outbound_and_inbound() -> None:
    """Silence instead of refusal means a firewall on the way out; who cannot be dialled is told what to forward."""
    assert "firewall" in doctor.bootstrap({"/ip4/20.0.0.1/tcp/1": "no answer within 5 s"}).fix
    assert doctor.bootstrap({"a": "connection refused", "b": ""}).status == OK
    for verdict in ("client", "relayed"):
        check = doctor.reach(verdict, 31337)
        assert check.status == WARN and "31337" in check.fix and verdict in check.detail


def test_a_foreign_run() -> None:
    """The peers know another run of that name, or none."""
    assert doctor.run_settings(["aa"], "bb").status == doctor.run_settings([], "bb").status == FAIL
    assert doctor.run_settings(["aa", "bb"], "bb").status == OK


def test_a_wrong_invite(capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2, before anything is measured."""
    assert main(["doctor", "dtrain://nonsense"]) == 2
    assert "invite" in capsys.readouterr().err


def test_a_peer_tells_the_time_and_the_bandwidth(tmp_path: Path) -> None:
    """A clock that is 90 s ahead is seen as such to a fraction of a second; nobody has us send more than is due."""

    async def probe() -> None:
        a, b = (load_or_create(tmp_path / name) for name in ("a", "b"))
        ours = await start_daemon(a, host="127.0.0.1", port=0)
        theirs = await start_daemon(b, host="127.0.0.1", port=0)
        try:
            await Probe(theirs, clock=lambda: time.time() - 90.0).open()
            addresses = by_peer([str(address) for address in await theirs.get_visible_maddrs()])
            assert await connect(ours, theirs.peer_id, addresses[b.peer_id])
            found = await measure(ours, b.peer_id)
            assert abs(found.skew_s - 90.0) < 1.0
            assert found.up_mbps > 0 and found.down_mbps > 0
            greedy = Probe.get_stub(ours, theirs.peer_id)
            with pytest.raises(Exception, match="at most"):
                await greedy.rpc_probe(BytesValue(value=msgpack.packb({"want": MAX_BYTES + 1, "pad": b""})))
        finally:
            await ours.shutdown()
            await theirs.shutdown()

    asyncio.run(probe())
