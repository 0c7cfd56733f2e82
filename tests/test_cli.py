"""What a user sees who types something wrong: one line that says what and how to mend it, exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from swarm_tools import swarm

from dtrain.dht.invite import Invite, decode
from dtrain.trainer.cli import main

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWAFrq41GtRiDSGeKvjd3UycrWzVWjDf5p6PBXbiPpzMeK"
INVITE = Invite("other", bytes(32), bytes(32), (NOBODY,))


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in a folder of its own and sees no other worker of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command prints."""
    assert main(["worker", "--host", "127.0.0.1", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dtrain: ")
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("run_id", ["a b", "../up", "", "x" * 65, "naïve", "a\x1b[31m"])
def test_a_run_id_has_plain_characters_only(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run id goes into file names and DHT keys: nothing but letters, digits, '-' and '_'."""
    line = refused(capsys, "--run-id", run_id)
    assert "run" in line and "\x1b" not in line


def test_no_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --run-id or --invite the line says what to type."""
    assert "--run-id NAME" in refused(capsys)


def test_an_unknown_preset_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt preset is answered with those that exist."""
    line = refused(capsys, "--run-id", "r", "--preset", "tyni")
    assert "tyni" in line and "tiny" in line and "gpt2" in line


def test_a_missing_data_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the file."""
    assert "nowhere.txt" in refused(capsys, "--run-id", "r", "--data", "nowhere.txt")


def test_an_empty_data_file(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty text cannot be trained on, and the line says so."""
    Path("empty.txt").touch()
    assert "empty" in refused(capsys, "--run-id", "r", "--data", "empty.txt")


def test_a_missing_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the file and the flag."""
    line = refused(capsys, "--run-id", "r", "--config", "nowhere.toml")
    assert "nowhere.toml" in line and "--config" in line


def test_an_unknown_key_in_the_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the key and the one that was probably meant."""
    Path("run.toml").write_text("[train]\ninner_step = 3\n")
    line = refused(capsys, "--run-id", "r", "--config", "run.toml")
    assert "train.inner_step" in line and "did you mean inner_steps?" in line


@pytest.mark.parametrize(
    "text", ["hello", "dtrain://", INVITE.encode()[:-6], INVITE.encode() + "AA", "dtrain://!!!"]
)
def test_a_wrong_invite(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Garbage and cut-off invites are told apart from network trouble."""
    assert "invite" in refused(capsys, "--invite", text)


def test_an_invite_to_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A run id that contradicts the invite: the line names both."""
    line = refused(capsys, "--run-id", "mine", "--invite", INVITE.encode())
    assert "mine" in line and "other" in line


def test_nobody_answers_at_the_invite(capsys: pytest.CaptureFixture[str]) -> None:
    """An unreachable peer: the line names its address."""
    line = refused(capsys, "--invite", INVITE.encode())
    assert "/ip4/127.0.0.1/tcp/9/" in line


def test_a_malformed_peer_address(capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is none is named as such."""
    assert "127.0.0.1:31337" in refused(capsys, "--run-id", "r", "--peer", "127.0.0.1:31337")


def test_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the port and the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(capsys, "--run-id", "r", "--port", str(port))
    assert str(port) in line and "--port" in line


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_an_impossible_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A port number that does not exist is refused before anything starts."""
    assert "--port" in refused(capsys, "--run-id", "r", "--port", port)


@pytest.mark.parametrize("host", ["localhost", "1.2.3", "::1", "8.8.8.8"])
def test_an_impossible_host(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--host wants an IPv4 address of this machine."""
    assert main(["worker", "--run-id", "r", "--host", host]) == 2
    assert host in capsys.readouterr().err


def test_an_unwritable_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints cannot be written there: the line names the folder and the flag."""
    Path("file").touch()
    line = refused(capsys, "--run-id", "r", "--folder", "file/below")
    assert "file/below" in line and "--folder" in line


def test_settings_that_contradict_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A joiner whose flags differ from the run's manifest is refused, with both values, and the run goes on."""
    with swarm("shared", tmp_path) as run:
        first = run.start(
            "a", "--preset", "tiny", "--inner-steps", "2", "--batch-size", "2", "--eval-every", "0"
        )
        first.wait_for_round(1)
        line = refused(capsys, "--run-id", "shared", "--inner-steps", "7")
        assert "train.inner_steps" in line and "7" in line and "2" in line
        first.wait_for_round(first.events("round")[-1]["round"] + 1)


def test_a_run_that_the_peer_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reachable peer of another run: the line says that it knows no such run."""
    with swarm("known", tmp_path) as run:
        first = run.start(
            "a", "--preset", "tiny", "--inner-steps", "2", "--batch-size", "2", "--eval-every", "0"
        )
        first.wait_for_round(1)
        invite = first.log.read_text().split("dtrain join ")[1].split()[0]
        address = decode(invite).addresses[0]
        assert "unknown-run" in refused(capsys, "--run-id", "unknown-run", "--peer", address)


def test_an_output_that_nobody_reads_any_more_is_no_error() -> None:
    """`dtrain ... | head` ends without a traceback, with the exit code of a program that SIGPIPE ended."""
    scenario = Path(__file__).parent.parent / "experiments/configs/lab/soak.toml"
    command = [sys.executable, "-m", "dtrain.trainer.cli", "lab", str(scenario), "--schedule"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_another_kind_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A lost connection that nobody has seen to is a bug, and looks like one."""

    def broken(args: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("dtrain.experiments.plan.run", broken)
    with pytest.raises(BrokenPipeError):
        main(["plan", "--params", "1e6", "--workers", "4"])


def test_help_is_quick_and_imports_no_torch() -> None:
    """`dtrain --help` loads neither torch nor hivemind."""
    code = "import sys; from dtrain.trainer.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'hivemind', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "worker" in done.stdout
