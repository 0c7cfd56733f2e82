"""Laws of the lab's files and schedules: what will happen is decided before anything runs, and mistakes are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dtrain.experiments.lab_clean import simulated
from dtrain.experiments.lab_config import FIGURES
from dtrain.experiments.lab_director import Happened
from dtrain.experiments.lab_evidence import Evidence, Round
from dtrain.experiments.lab_file import CLEAN, Scenario, load_scenario
from dtrain.experiments.lab_schedule import Planned, schedule
from dtrain.experiments.lab_summary import held, with_recovery
from dtrain.trainer.cli import main

CONFIGS = Path(__file__).resolve().parent.parent / "experiments" / "configs" / "lab"
CHURN = """
[lab]
workers = 6
rounds = 0
duration_s = 600
[churn]
mtbf_s = 10
"""
EVERY = """
[lab]
workers = 4
rounds = 20
[[events]]
kind = "kill"
round = 3
every_rounds = 2
seconds = 1
"""


def scenario_of(tmp_path: Path, text: str, seed: int | None = None) -> Scenario:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return load_scenario(path, seed=seed)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_scenarios_are_good(path: Path) -> None:
    """Each can be read, says what it is about, and is held to bars that the summary has."""
    scenario = load_scenario(path)
    assert scenario.description and scenario.bars and scenario.name == path.stem
    assert all(key.rpartition("_at_")[0] in FIGURES for key in scenario.bars)
    schedule(scenario)


@pytest.mark.parametrize("text", [CHURN, EVERY], ids=["churn", "every"])
def test_equal_seeds_give_equal_schedules(text: str, tmp_path: Path) -> None:
    """A failure can be replayed: the same file and seed, the same events; another seed, other ones."""
    first, second = (schedule(scenario_of(tmp_path, text, seed=7)) for _ in range(2))
    assert first == second and len(first) > 5
    assert schedule(scenario_of(tmp_path, text, seed=8)) != first


def test_a_kill_in_every_round_takes_all_in_turn(tmp_path: Path) -> None:
    """Who was killed has time to come back before its next turn."""
    planned = schedule(scenario_of(tmp_path, EVERY))
    assert [one.round for one in planned] == list(range(3, 21, 2))
    for begin in (0, 4):
        assert len({one.worker for one in planned[begin : begin + 4]}) == 4


def test_churn_is_a_poisson_process_that_spares_who_has_just_come_back(tmp_path: Path) -> None:
    """As many failures as asked for, each undone, nobody twice within the time that it is left in peace."""
    scenario = scenario_of(tmp_path, CHURN)
    scenario = replace(scenario, lab=replace(scenario.lab, duration_s=20_000.0, workers=12))
    planned = schedule(scenario)
    assert 1000 < len(planned) < 2100
    back = dict.fromkeys(scenario.names, 0.0)
    for one in planned:
        assert one.seconds > 0 and one.at_s >= back[one.worker]
        back[one.worker] = one.at_s + one.seconds + scenario.churn.back_s - 0.01
    assert {one.kind for one in planned} == {"kill", "leave"}


@pytest.mark.parametrize(
    "text, word",
    [
        ("[lab]\nworkers = 0\n", "lab.workers"),
        ("[lab]\nworkerz = 3\n", "workers"),
        ("[link]\nup = 3\n", "up_mbps"),
        ("[link]\nloss = 2\n", "link.loss"),
        ("[[events]]\nkind = 'explode'\nround = 1\n", "partition"),
        ("[[events]]\nkind = 'kill'\n", "events.round"),
        ("[[events]]\nkind = 'freeze'\nround = 1\n", "events.seconds"),
        ("[[events]]\nkind = 'kill'\nround = 1\nworkers = [9]\n", "1 to 8"),
        ("[[events]]\nkind = 'fill'\nround = 1\nseconds = 1\nworkers = [2]\n", "disk_mb"),
        ("[[events]]\nkind = 'join'\nround = 1\nworkers = [2]\n", "late"),
        ("[[events]]\nkind = 'partition'\nround = 1\nseconds = 5\n", "events.sides"),
        ("[[events]]\nkind = 'bootstrap-dies'\nround = 1\n", "lab.bootstrap"),
        ("[[places]]\nworkers = [1]\nlate = true\n", "places.late"),
        ("[bars]\nfailed_rounds = 3\n", "_at_most"),
        ("[bars]\nfaild_rounds_at_most = 3\n", "failed_rounds"),
        ("[clean]\nkind = 'dirty'\n", "clean.kind"),
        ("[lab]\nrounds = 0\n[clean]\nkind = 'simulated'\n", "clean.kind"),
        ("[train]\nlr = -1\n", "train.lr"),
        ("not toml", "TOML"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    text: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the file and the setting, and says what to write."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert main(["lab", str(path), "--schedule"]) == 2
    told = capsys.readouterr().err
    assert str(path) in told and word in told and told.count("\n") == 1


def test_the_schedule_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--schedule` shows what would happen, and starts nothing."""
    assert main(["lab", str(CONFIGS / "freeze.toml"), "--schedule"]) == 0
    assert capsys.readouterr().out.split() == ["after", "round", "5", "freeze", "worker-5,", "for", "30", "s"]


def test_results_never_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds something is refused."""
    (tmp_path / "file").write_text("x")
    assert main(["lab", str(CONFIGS / "freeze.toml"), "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(("codes", "runs", "code"), [((0, 0, 0), 3, 0), ((0, 1, 0), 2, 1)])
def test_a_scenario_runs_as_often_as_asked_until_it_fails(
    codes: tuple[int, ...],
    runs: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--times 3`: each time has a folder of its own, and a line says how it ended."""
    folders: list[Path] = []

    def inside(unshare: object, module: str, arguments: list[str]) -> int:
        folders.append(Path(arguments[arguments.index("--out") + 1]))
        if len(folders) == 1:
            (folders[0] / CLEAN).write_text('{"eval_loss": 2.5}')
        return codes[len(folders) - 1]

    monkeypatch.setattr("dtrain.experiments.lab_enter.unshare_command", lambda: ["unshare"])
    monkeypatch.setattr("dtrain.experiments.lab_enter.run_inside", inside)
    out = tmp_path / "out"
    assert main(["lab", str(CONFIGS / "freeze.toml"), "--times", "3", "--out", str(out)]) == code
    assert folders == [out / str(number) for number in range(1, runs + 1)]
    # The simulator comes to the same again, so it is not asked again.
    scenario = load_scenario(CONFIGS / "freeze.toml")
    assert [simulated(scenario, folder) for folder in folders] == runs * [{"eval_loss": 2.5}]
    ends = ["FAILED" if one else "passed" for one in codes[:runs]]
    told = [f"freeze, {number} of 3: {end}" for number, end in enumerate(ends, start=1)]
    assert capsys.readouterr().out.splitlines() == told


def test_never_is_not_how_often(capsys: pytest.CaptureFixture[str]) -> None:
    """`--times 0` would pass without having run."""
    assert main(["lab", str(CONFIGS / "freeze.toml"), "--times", "0"]) == 2
    assert "--times must be at least 1" in capsys.readouterr().err


def test_bars() -> None:
    """A bar is kept at its own value; a figure that could not be had keeps none."""
    figures = {"failed_rounds": 0, "compute_share_mean": 0.95, "recovery_s_max": None}
    bars = {
        "failed_rounds_at_most": 0,
        "compute_share_mean_at_least": 0.951,
        "recovery_s_max_at_most": 60,
    }
    assert [bar["ok"] for bar in held(figures, bars)] == [True, False, False]


def test_recovery_counts_from_the_first_round_after_the_thaw() -> None:
    """Who wakes first tells how the round ended that it was in when it froze: that is no recovery."""

    def said(round: int, time: float) -> dict[str, object]:
        return {"round": round, "time": time, "own_included": True}

    rounds = [Round(n, 100.0 + 8 * n, 8, 2.0, 0, "", 0.0, 0.0, 0.0, 1.0, 0.0) for n in range(1, 9)]
    metrics = [said(4, 132.1), said(5, 150.1), said(8, 164.5)]
    evidence = cast(Evidence, SimpleNamespace(rounds=rounds, of=lambda name, kind: metrics))
    thawed = Happened(Planned("freeze", "worker-5", seconds=17.0), at=133.0, round=4, undone_at=150.0)
    found = with_recovery(thawed, evidence, began=100.0)
    assert (found["recovery_s"], found["recovery_rounds"], found["recovers"]) == (14.5, 2, True)
