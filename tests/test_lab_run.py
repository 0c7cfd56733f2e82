"""The lab itself: a small scenario from the command to its proof, and nothing left of one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from swarm_tools import eventually

from dtrain.experiments.dashboard_results import Results
from dtrain.experiments.netns import missing

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("processes"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
SMALL = """
description = "Two homes, of which one is frozen"
[lab]
workers = 2
rounds = 8
tokens_per_s = 256
[link]
up_mbps = 5
down_mbps = 20
rtt_ms = 60
[model]
dim = 64
num_layers = 1
num_heads = 2
hidden_dim = 128
[data]
eval_tokens = 512
[train]
batch_size = 2
seq_len = 32
inner_steps = 8
[exchange]
start_workers = 2
overlap = "eager"
[[events]]
kind = "freeze"
workers = [2]
round = 3
seconds = 2
[bars]
unrecovered_at_most = 0
"""


def start(tmp_path: Path, scenario: str = SMALL) -> subprocess.Popen[str]:
    (tmp_path / "small.toml").write_text(scenario)
    command = [sys.executable, "-m", "dtrain.trainer.cli", "lab", "small.toml", "--out", "out"]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes_of(tmp_path: Path) -> list[psutil.Process]:
    """Whoever was started for a scenario in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(tmp_path) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_small_scenario(tmp_path: Path) -> None:
    """It passes; the summary, the timeline and the dashboard's files are there; the journals prove every payload."""
    lab = start(tmp_path)
    output = lab.communicate()[0]
    assert lab.returncode == 0, output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["passed"] and summary["rounds"] == 8 and summary["digests_equal"]
    assert summary["accounting"]["payloads"] >= 15 and summary["accounting"]["violations"] == []
    assert [event["kind"] for event in summary["events"]] == ["freeze"]
    assert summary["eval_loss"] and summary["clean_eval_loss"] and summary["round_time_over_plan"] > 0.9
    assert summary["exchange_s"] and summary["exchange_time_over_plan"]
    assert (tmp_path / "out" / "timeline.png").stat().st_size > 10_000
    results = Results(tmp_path / "out")
    (shown,) = results.folders()
    curve = results.curve(shown["folder"], shown["rows"][0]["id"])
    assert curve is not None and curve["round"] == [float(n) for n in range(1, 9)]
    assert not processes_of(tmp_path)


def test_a_soak_in_small(tmp_path: Path) -> None:
    """For as long as asked instead of so many rounds, with a worker that fails by chance and comes back."""
    shape, _, _ = SMALL.partition("[[events]]")
    churn = "[churn]\nmtbf_s = 8\ndown_s = 1\nback_s = 8\n[bars]\nunrecovered_at_most = 0\n"
    shape = shape.replace("workers = 2\nrounds = 8", "workers = 3\nrounds = 0\nduration_s = 40")
    shape = shape.replace("start_workers = 2", "start_workers = 3")  # nobody leaves before all are in
    lab = start(tmp_path, shape + churn)
    output = lab.communicate()[0]
    assert lab.returncode == 0, output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["passed"] and summary["rounds"] >= 8 and summary["digests_equal"]
    assert {event["kind"] for event in summary["events"]} <= {"kill", "leave"} and summary["events"]
    assert summary["accounting"]["payloads"] >= 15 and summary["accounting"]["violations"] == []
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left(number: signal.Signals, tmp_path: Path) -> None:
    """However the lab ends, its workers, its network and its mounts end with it."""
    before = set(os.listdir("/tmp"))
    lab = start(tmp_path)
    log = tmp_path / "out" / "logs" / "worker-1.log"
    eventually(lambda: log.exists() and "dtrain join" in log.read_text(), "no worker came up")
    assert len(processes_of(tmp_path)) >= 3
    lab.send_signal(number)
    lab.communicate(timeout=90)
    assert lab.returncode == (-number if number == signal.SIGKILL else 130)
    eventually(lambda: not processes_of(tmp_path), "a process is left", 10.0)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "lab-" not in listed
    assert not [
        name for name in set(os.listdir("/tmp")) - before if name.startswith(("dtrain-", "hivemind-"))
    ]
    if number == signal.SIGINT:
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["trouble"] == "interrupted" and (tmp_path / "out" / "bundle.tar.gz").exists()
