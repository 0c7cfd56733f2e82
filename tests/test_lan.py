"""Runs that are found on the network by their name, without an address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_tools import swarm
from zeroconf import ServiceInfo

from dtrain.dht import lan
from dtrain.dht.lan import SERVICE, LanError
from dtrain.experiments.netns import Internet, internet, missing
from dtrain.trainer.cli import main
from dtrain.trainer.manifest import validate_run_id

PEER = "12D3KooWAFrq41GtRiDSGeKvjd3UycrWzVWjDf5p6PBXbiPpzMeK"
FIELDS = {"run": "our-run", "peer": PEER, "manifest": "ab" * 32}
SMALL = (
    "--preset",
    "tiny",
    "--inner-steps",
    "2",
    "--batch-size",
    "2",
    "--eval-every",
    "0",
    "--host",
    "0.0.0.0",
)


def announced(fields: dict[str, str | bytes], port: int = 31337) -> ServiceInfo:
    return ServiceInfo(
        SERVICE, f"x.{SERVICE}", port=port, properties=fields, parsed_addresses=["192.168.1.7"]
    )


def test_a_worker_as_it_says() -> None:
    """A well-formed announcement becomes an address to join through."""
    worker = lan._parse(announced(FIELDS))
    assert worker is not None and worker.run_id == "our-run"
    assert worker.addresses == (f"/ip4/192.168.1.7/tcp/31337/p2p/{PEER}",)


@given(st.dictionaries(st.sampled_from(["run", "peer", "manifest"]), st.binary(max_size=80)))
def test_nonsense_on_the_network_is_passed_over(fields: dict[str, bytes]) -> None:
    """Anybody may announce anything: control characters, paths, nothing. None of it is shown or dialled."""
    worker = lan._parse(announced({**FIELDS, **fields}))
    if worker is not None:
        assert validate_run_id(worker.run_id) and worker.peer_id.isalnum() and worker.manifest_hash.isalnum()


def test_no_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where discovery cannot work, a line says so and how to join all the same."""
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(lan, "own_addresses", lambda: {"127.0.0.1"})
    with pytest.raises(LanError):
        lan.find()
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert "this machine is on no network" in shown and "dtrain join INVITE" in shown


@pytest.fixture
def net() -> Iterator[Internet]:
    with internet() as made:
        yield made


@pytest.mark.netns
@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_run_is_found_by_its_name(tmp_path: Path, net: Internet) -> None:
    """Two machines on one wire: the second types the run's name and nothing else, and contributes."""
    with swarm("lan", tmp_path) as run:
        first = run.start("a", *SMALL, "--max-tokens-per-s", "500", namespace=net.host("a", "20.0.0.1"))
        first.wait_for_round(1)
        elsewhere = {"DTRAIN_RUNTIME_DIR": str(tmp_path / "elsewhere")}
        second = run.start("b", *SMALL[-4:], namespace=net.host("b", "20.0.0.2"), env=elsewhere)
        second.wait_for("first_contribution")
        assert "Found lan on this network" in second.log.read_text()
        apart = {"DTRAIN_RUNTIME_DIR": str(tmp_path / "apart")}
        alone = run.start("c", *SMALL, "--no-lan", namespace=net.host("c", "20.0.0.3"), env=apart)
        alone.wait_for_round(1)
        assert "beginning it" in alone.log.read_text()
        for worker in (first, second, alone):
            worker.interrupt()
            assert worker.wait() == 0
