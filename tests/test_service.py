"""`dtrain service`: what the system is given to run, and that nothing of it stays."""

from __future__ import annotations

import plistlib
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.dht.invite import Invite
from dtrain.trainer import service
from dtrain.trainer.cli import main
from dtrain.trainer.service import Launchd, Service, Systemd, launchd_plist, systemd_unit

PEER = "12D3KooWAFrq41GtRiDSGeKvjd3UycrWzVWjDf5p6PBXbiPpzMeK"
INVITE = Invite("our-model", bytes(32), bytes(32), (f"/ip4/10.0.0.1/tcp/31337/p2p/{PEER}",)).encode()
# Stands in for systemctl and launchctl, which need a user's session: writes down how it is called.
TOOL = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  *"show"*) printf 'NRestarts=2\\nActiveState=active\\nSubState=running\\nUnitFileState=enabled\\n' ;;
  *"print"*) printf 'gui/0/dtrain-our-model = {\\n\\tstate = running\\n}\\n' ;;
  *"$REFUSE"*) echo "Failed to connect to bus" >&2; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a system of the test's own; the file says what the system was asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("systemctl", "launchctl"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("REFUSE", "nothing is refused")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "a folder, 100%").mkdir()
    monkeypatch.chdir(tmp_path / "a folder, 100%")
    return tmp_path / "calls"


def test_install_status_uninstall(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A unit that only its user can read, begun at once and at login; in the end it is gone."""
    assert main(["service", "install", "join", INVITE, "--hours", "22:00-08:00"]) == 0
    unit = Systemd().file("our-model")
    text = unit.read_text()
    assert f'"join" "{INVITE}" "--hours" "22:00-08:00" "--yes"' in text and "Restart=on-failure" in text
    assert stat.S_IMODE(unit.stat().st_mode) == 0o600
    begun = ["daemon-reload", "enable dtrain-our-model.service", "restart dtrain-our-model.service"]
    assert calls.read_text().splitlines() == [f"systemctl --user {call}" for call in begun]
    assert main(["service", "status"]) == 0
    assert "our-model: active (running), begins at login, begun again 2 times" in capsys.readouterr().out
    assert main(["service", "uninstall"]) == 0
    assert "disable --now dtrain-our-model.service" in calls.read_text()
    assert not unit.exists() and list(unit.parent.iterdir()) == []
    assert main(["service", "status"]) == 2
    assert "dtrain service install join INVITE" in capsys.readouterr().err


def test_where_the_user_has_no_systemd(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's own words in one line, and no file that waits for a better day."""
    monkeypatch.setenv("REFUSE", "daemon-reload")
    assert main(["service", "install", "bootstrap", "--run-id", "our-model"]) == 1
    error = capsys.readouterr().err
    assert "Failed to connect to bus" in error and error.count("\n") == 1
    assert not Systemd().file("our-model").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "install join INVITE"),
        (["demo"], "not demo"),
        (["join", "dtrain://nonsense"], "invite"),
        (["worker"], "--run-id NAME"),
        (["worker", "--run-id", "a/b"], "will not do"),
        (["worker", "--run-id", "a", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_cannot_run_is_not_installed(
    words: list[str], said: str, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake is told now, not at the next login."""
    assert main(["service", "install", *words]) == 2
    assert said in capsys.readouterr().err and not calls.exists()


def test_several_services(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its name; none is ended by accident, and an unknown one is answered with those that exist."""
    for run_id in ("one", "two"):
        assert main(["service", "install", "worker", "--run-id", run_id]) == 0
    assert main(["service", "uninstall"]) == 2
    assert "one, two" in capsys.readouterr().err
    assert main(["service", "uninstall", "three"]) == 2
    assert main(["service", "uninstall", "one"]) == 0
    assert Systemd().names() == ["two"]


def hostile(folder: Path) -> Service:
    words = (sys.executable, "-c", 'print("a b")', "$HOME", "100%", "back\\slash", "--name", "it's")
    return Service("our-model", words, folder, {"DTRAIN_RUNTIME_DIR": '/a "quoted" 50% folder'})


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Also with words that mean something to systemd; nothing is found to warn of."""
    unit = systemd_unit(hostile(tmp_path))
    assert verified(unit, tmp_path) == (0, "")
    assert "perhaps" in verified(unit.replace("Restart=on-failure", "Restart=perhaps"), tmp_path)[1]


def verified(unit: str, folder: Path) -> tuple[int, str]:
    """systemd's exit code and its warnings."""
    path = folder / "dtrain-our-model.service"
    path.write_text(unit)
    (folder / "run").mkdir(exist_ok=True)
    seen = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", "--recursive-errors=no", str(path)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(folder / "run"), "HOME": str(folder)},
        check=False,
    )
    return seen.returncode, seen.stderr


def test_launchd_reads_the_agent_back(tmp_path: Path) -> None:
    """Every word arrives as it was typed, and only a failure begins it again."""
    read = plistlib.loads(launchd_plist(hostile(tmp_path)))
    assert read["ProgramArguments"] == list(hostile(tmp_path).command)
    assert read["RunAtLoad"] is True and read["KeepAlive"] == {"SuccessfulExit": False}
    assert read["WorkingDirectory"] == str(tmp_path)


def test_launchd_is_asked_for_the_same(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Install, install anew, status and uninstall on a Mac."""
    monkeypatch.setattr(sys, "platform", "darwin")
    for _ in range(2):
        assert main(["service", "install", "worker", "--run-id", "our-model"]) == 0
    agent = Launchd().file("our-model")
    assert agent.parent.name == "LaunchAgents" and agent.exists()
    assert main(["service", "status", "our-model"]) == 0
    assert "our-model: running, begins at login" in capsys.readouterr().out
    assert main(["service", "uninstall"]) == 0
    assert not agent.exists()
    asked = [line.split()[1] for line in calls.read_text().splitlines()]
    assert asked == ["bootstrap", "bootout", "bootstrap", "print", "bootout"]


def test_without_systemd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says what to do instead."""
    monkeypatch.setattr(service.shutil, "which", lambda name: None)
    assert main(["service", "status"]) == 2
    assert "Dockerfile" in capsys.readouterr().err
