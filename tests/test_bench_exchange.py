"""`dtrain bench exchange`: its figures on made-up rounds, and the real thing with two peers."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from swarm_tools import eventually

from dtrain.experiments.bench_exchange_light import light_row
from dtrain.experiments.bench_exchange_report import (
    IMPLEMENTATIONS,
    LIGHT,
    PeerRound,
    comparison,
    growth,
    make_row,
    make_table,
)
from dtrain.trainer.cli import main

KEYS = {
    "implementation",
    "peers",
    "params",
    "payload_bytes",
    "round_s_median",
    "up_bytes_per_peer",
    "down_bytes_per_peer",
    "digests_equal",
}


def peer_round(seconds: float = 1.0, up_bytes: int = 1000) -> PeerRound:
    return PeerRound(
        seconds, 500, 2, wait_s=0.5, exchange_s=0.25, problem="", up_bytes=up_bytes, digest="same"
    )


def test_a_round_lasts_as_long_as_its_slowest_peer() -> None:
    """Times are medians over rounds of the slowest peer, bytes are medians over all peers of all rounds."""
    rounds = [
        [peer_round(1.0, 100), peer_round(3.0, 300)],
        [peer_round(9.0, 200), peer_round(2.0, 200)],
        [peer_round(1.0, 100), peer_round(1.5, 900)],
    ]
    row = make_row("dtrain", 1000, rounds, 12.0)
    assert row["round_s_median"] == 3.0
    assert row["up_bytes_per_peer"] == 200
    assert row["peers"] == 2 and row["rounds"] == 3 and row["complete_rounds"] == 3


def test_one_peer_with_another_average_is_told() -> None:
    """Digests are equal only if they are in every round; a round is complete only with all contributions in it."""
    good, alone = peer_round(), replace(peer_round(), contributors=1, digest="other")
    row = make_row("dtrain", 1000, [[good, good], [good, alone]], 0.0)
    assert row["digests_equal"] is False
    assert row["complete_rounds"] == 1
    assert make_row("dtrain", 1000, [[good, good]], 0.0)["digests_equal"] is True


def test_unknown_times_stay_unknown() -> None:
    """What an implementation does not tell is null, not zero."""
    rounds = [[replace(peer_round(), wait_s=None, exchange_s=None)] * 2]
    row = make_row("all-gather", 1000, rounds, 0.0)
    assert row["wait_s_median"] is None and row["exchange_s_median"] is None


def test_the_table_fits_a_terminal_and_the_comparison_is_at_the_most_peers() -> None:
    """The ratios are of the same run: our row at its largest number of peers against stock's there."""
    rows = []
    for peers in (2, 8):
        for name, up, seconds in zip(IMPLEMENTATIONS, (1000, 100_000 * peers, 3500), (0.5, 1.0, 0.1)):
            rows.append(make_row(name, 1000, [[peer_round(seconds, up)] * peers], 250.0))
    screen = io.StringIO()
    Console(file=screen, width=80).print(make_table(rows))
    assert all(name in screen.getvalue() for name in IMPLEMENTATIONS)
    assert "…" not in screen.getvalue()
    told = "\n".join(comparison(rows))
    assert "8 peers: 2.00 payloads" in told and "800x fewer" in told and "0.50x stock's" in told


def test_traffic_does_not_grow_with_the_group() -> None:
    """A peer sends its sections and its span's aggregate, 2 (N - 1) / N payloads: never two, whatever the group."""
    rows = [light_row(peers, 4_000_000, 64) for peers in (4, 8, 16)]
    for row in rows:
        peers = int(str(row["peers"]))
        for key in ("up_bytes_per_peer", "down_bytes_per_peer"):
            payloads = int(str(row[key])) / int(str(row["payload_bytes"]))
            assert payloads == pytest.approx(2 * (peers - 1) / peers, rel=0.05), row
    assert "1.5" in growth(rows)[0] and "16 peers" in growth(rows)[0]
    screen = io.StringIO()
    Console(file=screen, width=80).print(make_table(rows))
    assert LIGHT in screen.getvalue()


@pytest.mark.parametrize(
    "flags",
    [
        ["--peers", "1"],
        ["--peers", "two"],
        ["--light-peers", "4,one"],
        ["--params", "7"],
        ["--rounds", "0"],
        ["--k", "5000"],
        ["--implementations", "carrier-pigeon"],
        ["--json", "/nowhere/at/all.json"],
    ],
)
def test_a_mistake_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be measured is refused before anything starts, naming the flag."""
    assert main(["bench", "exchange", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dtrain: ") and flags[0] in said and said.count("\n") == 1


def test_the_real_thing(tmp_path: Path) -> None:
    """Two peers of each implementation: all figures are there, ours agree on every bit, and nothing is left behind."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    scratch = set(Path(tempfile.gettempdir()).glob("dtrain-*-bench-*"))
    file = tmp_path / "figures.json"
    flags = ["--peers", "2", "--params", "2e5", "--rounds", "2", "--at-rest-s", "2", "--json", str(file)]
    flags += ["--light-peers", "none"]
    assert main(["bench", "exchange", *flags]) == 0
    figures = json.loads(file.read_text())
    assert figures["machine"]["cores"] >= 1
    rows = {row["implementation"]: row for row in figures["rows"]}
    assert tuple(rows) == IMPLEMENTATIONS
    for row in rows.values():
        assert row.keys() >= KEYS
        assert row["peers"] == 2 and row["params"] == 200_000 and row["rounds"] == 2
        assert row["round_s_median"] > 0 and row["up_bytes_per_peer"] > 0 and row["down_bytes_per_peer"] > 0
    ours, stock, gathered = rows.values()
    assert ours["digests_equal"] and gathered["digests_equal"]
    assert ours["complete_rounds"] == gathered["complete_rounds"] == 2
    assert 0 < ours["exchange_up_bytes_per_peer"] < ours["up_bytes_per_peer"]
    assert ours["payload_bytes"] == gathered["payload_bytes"] < stock["payload_bytes"] == 400_000
    # One payload to the one other peer, and a little for headers.
    assert gathered["payload_bytes"] < gathered["up_bytes_per_peer"] < 1.1 * gathered["payload_bytes"] + 500

    def all_gone() -> bool:
        return {process.pid for process in psutil.Process().children(recursive=True)} <= before

    eventually(all_gone, "processes of the benchmark are left", 10.0)
    assert set(Path(tempfile.gettempdir()).glob("dtrain-*-bench-*")) == scratch
