"""Benches that run a real worker: what they measure is there, and mistakes have a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.trainer.cli import main


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_the_wait_for_streamed_data_is_measured(tmp_path: Path) -> None:
    """`dtrain bench data` trains from a server on loopback, and says what share of the time went into waiting."""
    pytest.importorskip("tokenizers")
    figures = tmp_path / "figures.json"
    flags = ["--preset", "tiny", "--rounds", "2", "--inner-steps", "3", "--json", str(figures)]
    assert main(["bench", "data", *flags]) == 0
    found = json.loads(figures.read_text())
    assert found["tokens"] == 2 * 3 * 4 * 64 and found["requests"] > 0
    assert 0.0 <= found["data_wait_share"] <= 1.0


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_the_memory_of_a_worker_is_measured(tmp_path: Path) -> None:
    """`dtrain bench memory` has a row for each preset and option, with more bytes than the parameters alone take."""
    figures = tmp_path / "figures.json"
    assert (
        main(["bench", "memory", "--presets", "tiny", "--options", "as it is,eager", "--json", str(figures)])
        == 0
    )
    rows = json.loads(figures.read_text())
    assert [row["option"] for row in rows] == ["as it is", "eager"]
    for row in rows:
        assert row["all_bytes"] > row["trainer_bytes"] > 100e6 and not row["problem"]


def test_what_an_optimizer_adds_to_a_step_is_measured(tmp_path: Path) -> None:
    """`dtrain bench optimizers` has the passes and a row for each optimizer, in seconds above none."""
    figures = tmp_path / "figures.json"
    assert main(["bench", "optimizers", "--repetitions", "1", "--json", str(figures)]) == 0
    medians = json.loads(figures.read_text())["median_s"]
    assert {"forward and backward pass", "adamw", "muon"} <= set(medians)
    assert all(seconds > 0 for seconds in medians.values())


def test_what_being_there_costs_is_measured(tmp_path: Path) -> None:
    """`dtrain bench heartbeats`: peers that know each other, and bytes from all of them."""
    figures = tmp_path / "figures.json"
    assert main(["bench", "heartbeats", "--peers", "3", "--seconds", "8", "--json", str(figures)]) == 0
    (row,) = json.loads(figures.read_text())
    assert row["peers"] == 3 and row["known"] == 2 and 100 < row["bytes_per_s"] < 10_000


def test_what_cannot_be_measured_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown presets and options list the known."""
    assert main(["bench", "memory", "--presets", "huge"]) == 2
    assert "there is no 'huge' to measure: choose of tiny, small" in capsys.readouterr().err
    assert main(["bench", "memory", "--options", "none"]) == 2
    assert "adamw8bit" in capsys.readouterr().err
    assert main(["bench", "heartbeats", "--peers", "one"]) == 2
    assert "--peers must be numbers of 2 at least" in capsys.readouterr().err
    assert main(["bench", "optimizers", "--repetitions", "0"]) == 2
    assert "--repetitions must be at least 1" in capsys.readouterr().err
