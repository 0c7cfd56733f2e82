"""`dtrain bench dht`: real nodes, a part of them killed, and nobody left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from swarm_tools import eventually, started_with

from dtrain.trainer import cli

pytestmark = pytest.mark.xdist_group("processes")

MARK = "DTRAIN_TEST_BENCH"  # what a test starts has this in its environment: other benches may run on the machine


def test_records_are_found_after_a_part_of_the_peers_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve peers, four of them killed, the one through which all had joined among them."""
    monkeypatch.setenv(MARK, str(tmp_path))
    figures = tmp_path / "figures.json"
    code = cli.main(["bench", "dht", "--peers", "12", "--looks", "3", "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert code == 0 and (found["peers"], found["killed"]) == (12, 4)
    assert (found["before"]["looks"], found["after"]["looks"]) == (36, 24)
    assert found["before"]["share_found"] == 1.0 and found["after"]["share_in_time"] >= 0.95
    eventually(lambda: not started_with(MARK, str(tmp_path)), "peers of the bench are left", 10.0)


def test_silent_peers_hide_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines whose power is cut refuse no connection: look-ups wait for them, and find what there is."""
    monkeypatch.setenv(MARK, str(tmp_path))
    figures = tmp_path / "figures.json"
    flags = ["--peers", "12", "--looks", "1", "--silent", "--at-once", "8"]
    cli.main(["bench", "dht", *flags, "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert (found["killed"], found["after"]["looks"], found["after"]["share_found"]) == (4, 8, 1.0)
    eventually(lambda: not started_with(MARK, str(tmp_path)), "peers of the bench are left", 10.0)


@pytest.mark.parametrize("flags", [["--peers", "4"], ["--killed", "1"], ["--looks", "0"], ["--at-once", "0"]])
def test_what_cannot_be_measured_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "dht", *flags]) == 2
    assert "--peers must be 8 at least" in capsys.readouterr().err
