"""The organizer's path: a run is created, kept reachable by a bootstrap peer, and joined by its invite."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from swarm_tools import DEADLINE_S, eventually, our_processes

from dtrain.dht.invite import decode
from dtrain.experiments.lab_places import skew_environment
from dtrain.trainer.cli import COMMANDS, main
from dtrain.trainer.manifest import manifest_from_toml, preset_manifest
from dtrain.trainer.presets import PRESETS
from dtrain.trainer.run_file import write_run_file
from dtrain.trainer.signing import SignedManifest

QUICK = ("--preset", "tiny", "--inner-steps", "2", "--batch-size", "2")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_run_file_is_the_run(preset: str, tmp_path: Path) -> None:
    """What `create` writes reads back to the very same settings, each with its meaning above it."""
    manifest = preset_manifest("r", preset, {"train.lr": 0.00123, "data.eval_fraction": 0.25})
    path = tmp_path / "run.toml"
    path.write_text(write_run_file(manifest, str(path)))
    assert manifest_from_toml(path) == manifest
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith(("#", "run_id")):
            assert lines[number - 1].startswith("# "), line


def test_create_asks_nothing_and_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Files, a key for its owner alone, a signed manifest; a second time it refuses, and the key is the same."""
    assert main(["create", "--run-id", "mine", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "dtrain worker --run-id mine" in out and "dtrain invite" in out
    folder = Path("dtrain-runs/mine")
    key = (folder / "organizer.key").read_bytes()
    assert stat.S_IMODE((folder / "organizer.key").stat().st_mode) == 0o600
    signed = SignedManifest.from_json((folder / "manifest.json").read_text())
    assert signed.manifest.train.inner_steps == 2
    assert main(["create", "--run-id", "mine"]) == 2
    assert "already" in capsys.readouterr().err and (folder / "organizer.key").read_bytes() == key
    assert main(["create", "--check", str(folder / "run.toml")]) == 0


@pytest.mark.parametrize("command", ["create", "bootstrap"])
def test_no_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what to type."""
    assert main([command]) == 2
    assert "--run-id NAME" in capsys.readouterr().err


def test_a_bad_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    """`--check` names the setting."""
    Path("run.toml").write_text('run_id = "r"\n[train]\nlr = -1\n')
    assert main(["create", "--check", "run.toml"]) == 2
    assert "train.lr" in capsys.readouterr().err


def test_bootstrap_needs_the_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was never created here, and no invite to it: the line says what to do."""
    assert main(["bootstrap", "--run-id", "unknown"]) == 2
    assert "dtrain create" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command's help shows how it is typed."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert f"dtrain {command}" in shown.partition("usage:")[2].partition("example")[2]


@pytest.mark.parametrize("command", ["status", "pause", "resume", "finish", "stop", "limit", "log", "invite"])
def test_no_worker_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is nothing to steer, the line says how to begin."""
    assert main([command]) == 2
    assert "dtrain join INVITE" in capsys.readouterr().err


def start(folder: Path, log: Path, *argv: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "dtrain.trainer.cli", *argv],
            cwd=folder,
            stdout=out,
            stderr=out,
            env=env,
            start_new_session=True,
        )


@pytest.mark.timeout(400)
def test_from_nothing_to_a_contribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Create, bootstrap, join: a volunteer with nothing but the invite, and a clock 90 s ahead, is shown the cost,
    trains and contributes; is steered from another terminal; and the bootstrap peer comes back at the same address as
    the same peer."""
    here = ("--host", "127.0.0.1")
    processes = []
    try:
        assert main(["create", "--run-id", "mine", *QUICK]) == 0
        log = tmp_path / "boot.log"
        processes.append(boot := start(tmp_path, log, "bootstrap", "--run-id", "mine", "--port", "0", *here))
        found = eventually(lambda: re.search(r"dtrain join (\S+)", log.read_text()), "no invite")
        assert main(["invite"]) == 0
        assert capsys.readouterr().out.split()[-1] == found[1]
        assert main(["doctor", found[1], "--quick", *here]) == 0
        assert "as the invite says" in capsys.readouterr().out
        with monkeypatch.context() as ahead:
            for name, value in skew_environment(tmp_path / "skew", 90.0).items():
                ahead.setenv(name, value)
            assert main(["doctor", found[1], "--quick", *here]) == 0
            assert re.search(r"warn  clock +(89|90)\.\d s ahead", capsys.readouterr().out)
            worker_log = tmp_path / "worker.log"
            flags = ("--yes", "--threads", "1", "--eval-every", "0", *here)
            processes.append(worker := start(tmp_path / "home", worker_log, "join", found[1], *flags))
        eventually(lambda: "has contributed" in worker_log.read_text(), f"no contribution: see {worker_log}")
        shown = worker_log.read_text()
        assert re.search(r"clock is (89|90) s ahead of the others': going by theirs", shown)
        assert (
            "Run mine: a tiny language model" in shown
            and "tokens/s" in shown
            and "to download first" in shown
        )

        assert main(["limit", "--name", "worker-1", "--gpu", "50%", "--up", "1mbit"]) == 0
        assert main(["pause", "--name", "worker-1"]) == 0
        eventually(lambda: "Holding: paused by you" in worker_log.read_text(), "no pause")
        capsys.readouterr()
        assert main(["status", "--name", "worker-1"]) == 0
        status = capsys.readouterr().out
        assert "paused" in status and "up 1 Mbit/s" in status and "50 %" in status
        assert main(["runs", "--no-lan"]) == 0
        assert "mine  (settings" in (runs := capsys.readouterr().out) and "2 peers on this machine" in runs
        assert main(["resume", "--name", "worker-1"]) == 0
        eventually(lambda: "Going on." in worker_log.read_text(), "it does not go on")
        capsys.readouterr()
        assert main(["log", "--name", "worker-1", "--lines", "100"]) == 0
        assert "has contributed" in (told := capsys.readouterr().out) and "Going on." in told
        assert main(["finish", "--name", "worker-1"]) == 0
        assert worker.wait(DEADLINE_S) == 0
        assert "finished, as you asked" in worker_log.read_text()

        assert main(["status", "--name", "bootstrap"]) == 0
        assert main(["stop", "--name", "bootstrap"]) == 0
        assert boot.wait(DEADLINE_S) == 0
        port = decode(found[1]).addresses[0].split("/")[4]
        again = tmp_path / "again.log"
        processes.append(start(tmp_path, again, "bootstrap", "--run-id", "mine", "--port", port, *here))
        same = eventually(lambda: re.search(r"dtrain join (\S+)", again.read_text()), "no invite")
        assert same[1] == found[1]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    eventually(lambda: not our_processes(tmp_path), "a process is left", 10.0)
