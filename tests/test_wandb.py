"""Laws of --wandb: it logs figures and public settings, asks for nothing, and is not there unless it is asked for."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dashboard_tools import Stage
from sim_tools import write_file

from dtrain.experiments.dashboard_wandb import SwarmLog
from dtrain.trainer.cli import main
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.metrics import read_metrics
from dtrain.trainer.wandb_log import NEEDS, open_metrics, resolve_mode


class FakeWandb(SimpleNamespace):
    """Stands in for the library; remembers what it is given."""

    def __init__(self, logged_in: bool):
        super().__init__(logged_in=logged_in, rows=[], started=[], settings=[], finished=0)

    def Settings(self, **fields: Any) -> dict[str, Any]:
        self.settings.append(fields)
        return fields

    def login(self, **fields: Any) -> bool:
        assert fields["prompt"] is False
        return bool(self.logged_in)

    def init(self, **fields: Any) -> Any:
        self.started.append(fields)
        return SimpleNamespace(log=self.rows.append, finish=self.finish)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb(logged_in=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_worker_logs_its_rounds(library: FakeWandb, tmp_path: Path) -> None:
    """Rounds and evaluations become rows of numbers; the metrics file is as ever, and the config is the manifest."""
    manifest = preset_manifest("r").to_dict()
    with open_metrics(tmp_path, "offline", "ada", manifest) as metrics:
        metrics.write("state", state="training")
        metrics.write("round", round=1, loss=2.5, tokens=10, contributors=["a"], digest="ab", wait_s=math.nan)
        metrics.write("eval", round=1, eval_loss=2.25)
    assert library.rows == [{"round": 1, "loss": 2.5, "tokens": 10}, {"round": 1, "eval_loss": 2.25}]
    assert library.finished == 1
    assert library.started[0]["config"] == manifest and library.started[0]["mode"] == "offline"
    assert [event["event"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [
        "state",
        "round",
        "eval",
    ]


def test_the_swarm_is_one_run(library: FakeWandb, tmp_path: Path) -> None:
    """What the dashboard sees is logged once a round; no name, invite or address goes out."""
    stage, log = Stage(tmp_path / "dashboard"), SwarmLog("offline")
    stage.enter("ada", "bert")
    for _ in range(3):
        stage.play_round()
        log.take(stage.state.snapshot(stage.now))
        log.take(stage.state.snapshot(stage.now + 1))
    log.close()
    assert [row["round"] for row in library.rows] == [1, 2, 3]
    assert library.rows[-1]["workers"] == 2 and library.rows[-1]["ratio_vs_fp32_allreduce"] > 1
    told = repr((library.rows, library.started[0]["config"]))
    assert "ada" not in told and stage.invite not in told and "/ip4/" not in told
    stage.history.close()


def test_each_simulated_run_is_one_run(library: FakeWandb, tmp_path: Path) -> None:
    """A sweep gives a wandb run for each of its runs, with its rounds and its settings; one that is there already is
    not logged again."""
    path = write_file(tmp_path, "[grid]\n'codec.k' = [64, 128]\n")
    command = ["simulate", str(path), "--out", str(tmp_path / "out"), "--jobs", "1", "--wandb", "offline"]
    assert main(command) == 0
    assert [start["config"]["codec"]["k"] for start in library.started] == [64, 128]
    assert {start["group"] for start in library.started} == {"tiny"} and library.finished == 2
    assert [row["round"] for row in library.rows] == 2 * [0, 1, 2, 3, 4]
    assert all("eval_loss" in library.rows[at] for at in (0, 4, 5, 9))
    assert str(tmp_path) not in repr((library.rows, library.started))
    assert main(command) == 0
    assert len(library.started) == 2


def test_wandb_learns_nothing_of_the_machine(library: FakeWandb, tmp_path: Path) -> None:
    """Neither host, command line, code, git, printed lines nor hardware: they may hold an invite."""
    with open_metrics(tmp_path, "offline", "ada", preset_manifest("r").to_dict()):
        pass
    (given,) = library.settings
    assert given["console"] == "off" and given["host"] == ""
    for name in (
        "disable_code",
        "disable_git",
        "x_disable_meta",
        "x_disable_machine_info",
        "x_disable_stats",
    ):
        assert given[name] is True


def test_without_a_login_it_stays_offline(library: FakeWandb) -> None:
    """Asked for without a mode: online for those who are logged in, else offline. Online without a login is refused."""
    assert resolve_mode("auto") == "offline"
    with pytest.raises(UsageError, match="wandb login"):
        resolve_mode("online")
    library.logged_in = True
    assert resolve_mode("auto") == resolve_mode("online") == "online"


def test_it_is_not_loaded_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker's install lacks it: nothing changes for who does not ask, and who does is told what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_metrics(tmp_path, "disabled", "ada", preset_manifest("r").to_dict()) as metrics:
        metrics.write("eval", round=1, eval_loss=2.0)
    assert resolve_mode("disabled") == "disabled"
    with pytest.raises(UsageError, match="pip install"):
        resolve_mode("online")
    assert "dtrain[wandb]" in NEEDS


def test_the_demo_logs_what_its_dashboard_sees(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a dashboard there is nothing to log: one line says so."""
    assert main(["demo", "--no-dashboard", "--wandb", "offline"]) == 2
    assert "--no-dashboard" in capsys.readouterr().err
