"""`dtrain demo`: its figures on made-up metrics, and the real thing with few rounds."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from swarm_tools import eventually, started_with

from dtrain.experiments.demo_cast import FINISHED, KILLED, LEFT, Member, Script
from dtrain.experiments.demo_summary import Result, print_result, summarize
from dtrain.experiments.demo_table import Stage, table
from dtrain.experiments.demo_watch import WorkerView
from dtrain.trainer.cli import main
from dtrain.trainer.metrics import MetricsLog

pytestmark = pytest.mark.xdist_group("processes")

NUM_PARAMS, INNER_STEPS = 1000, 10


def actor(
    folder: Path,
    name: str,
    rounds: dict[int, str],
    fate: str,
    bytes_per_round: int = 100,
    digest: str = "theta",
    evaluations: dict[int, float] | None = None,
) -> Member:
    """A worker whose metrics say that it completed `rounds`: number -> letters of the contributors."""
    path = folder / name / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("start", name=name, peer_id=name, device="cpu", num_params=NUM_PARAMS)
        log.write(
            "joined", round=min(rounds) - 1, source="peers" if min(rounds) > 1 else "fresh", seconds=1.0
        )
        for number, loss in (evaluations or {}).items():
            log.write("eval", round=number, eval_loss=loss)
        for count, (number, letters) in enumerate(rounds.items(), 1):
            step = {"step": INNER_STEPS, "inner_steps": INNER_STEPS, "loss": 2.0, "tokens_per_s": 50.0}
            log.write("step", round=number - 1, tokens=count * 500, **step)
            log.write(
                "round",
                round=number,
                contributors=list(letters),
                own_included=name in letters,
                loss=2.0,
                tokens=count * 500,
                round_tokens=500,
                bytes_up=count * bytes_per_round,
                bytes_down=count * 70,
                wait_s=0.5,
                exchange_s=float(number),
                digest=f"{digest}{number}",
            )
        if fate in (FINISHED, LEFT):
            log.write(
                "stop",
                reason="",
                round=max(rounds),
                tokens=len(rounds) * 500,
                digest=f"{digest}{max(rounds)}",
            )
    member = Member(WorkerView(name, path), fate=fate)
    member.view.refresh()
    return member


def result_of(members: list[Member]) -> Result:
    return summarize(members, round_timeout_s=30.0, seconds=12.0)


@pytest.fixture
def cast(tmp_path: Path) -> list[Member]:
    """a stays, b leaves after round 2, c is killed in round 3, d comes in round 3."""
    everyone = {1: "abc", 2: "abc", 3: "acd", 4: "ad"}
    return [
        actor(tmp_path, "a", everyone, FINISHED, evaluations={0: 4.0, 4: 3.0}),
        actor(tmp_path, "b", {n: everyone[n] for n in (1, 2)}, LEFT),
        actor(tmp_path, "c", {n: everyone[n] for n in (1, 2)}, KILLED),  # killed before it saw round 3's end
        actor(tmp_path, "d", {n: everyone[n] for n in (3, 4)}, FINISHED),
    ]


def test_every_rounds_contributors_add_up(cast: list[Member]) -> None:
    """A worker counts in a round if its contribution is in theta, even if it died before it saw the result."""
    result = result_of(cast)
    assert result.rounds == 4
    assert result.contributors_per_round == [3, 3, 3, 2]
    assert result.contributors == [list("abc"), list("abc"), list("acd"), list("ad")]
    spans = {worker.name: (worker.joined_round, worker.left_round) for worker in result.workers}
    assert spans == {"a": (1, None), "b": (1, 2), "c": (1, 3), "d": (3, None)}
    assert [worker.state for worker in result.workers] == [FINISHED, LEFT, KILLED, FINISHED]
    assert result.workers[3].joined_from == "peers"


def test_the_ratio_counts_every_inner_step_and_every_byte(cast: list[Member]) -> None:
    """The comparison is 2 (N - 1) / N of the fp32 model per inner step and worker, over all bytes sent."""
    one_step = NUM_PARAMS * 4
    of_three, of_two = 2 * 2 / 3 * one_step * INNER_STEPS, 2 * 1 / 2 * one_step * INNER_STEPS
    wanted = (3 + 2 + 2 + 1) * of_three + 2 * of_two  # a, b, c and d as far as their own files go
    sent = 400 + 200 + 200 + 200
    assert result_of(cast).ratio_vs_fp32_allreduce == pytest.approx(wanted / sent)


def test_rounds_alone_are_no_merit(tmp_path: Path) -> None:
    """A round without others would need no all-reduce: it does not count for the ratio."""
    assert result_of([actor(tmp_path, "a", {1: "a", 2: "a"}, FINISHED)]).ratio_vs_fp32_allreduce == 0


def test_success_needs_a_lower_loss_and_one_theta(cast: list[Member], tmp_path: Path) -> None:
    """The demo succeeds only if the evaluation loss fell and all digests agree, in every round and at the end."""
    assert result_of(cast).ok
    stranger = actor(tmp_path, "e", {3: "ae", 4: "ae"}, KILLED, digest="other")
    assert not result_of([*cast, stranger]).digests_equal
    straggler = actor(tmp_path, "f", {3: "acd"}, FINISHED)
    assert not result_of([*cast, straggler]).digests_equal
    worse = actor(tmp_path, "g", {4: "ad"}, FINISHED, evaluations={0: 4.0, 4: 4.1})
    assert not result_of([worse]).ok
    unknown = actor(tmp_path, "h", {4: "ad"}, FINISHED)
    assert not result_of([unknown]).ok


def test_a_line_still_being_written_waits(tmp_path: Path) -> None:
    """The view takes in whole lines only, each once."""
    path = tmp_path / "metrics.jsonl"
    view = WorkerView("a", path)
    view.refresh()
    first, second = (
        '{"event": "eval", "round": 0, "eval_loss": 4.0}\n',
        '{"event": "state", "state": "waiting"}\n',
    )
    path.write_text(first + second[:20])
    view.refresh()
    assert (view.evaluations, view.state) == ({0: 4.0}, "starting")
    path.write_text(first + second)
    view.refresh()
    assert view.state == "waiting"


def test_the_summary_and_the_live_table_fit_80_columns(cast: list[Member]) -> None:
    """Nothing is wrapped or cut, on a terminal of 80 columns and in a plain file."""
    file = io.StringIO()
    console = Console(width=80, file=file)
    with Stage(console, 20) as stage:
        stage.tell("something")
        stage.show(cast)
    console.print(table(cast))
    print_result(result_of(cast), console)
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for word in ("something", "round 4/20", "MB down", "killed", "4.0000 -> 3.0000", "3 3 3 2", "all equal"):
        assert word in text


def test_a_terminal_gets_a_live_table(cast: list[Member]) -> None:
    """On a terminal the table is drawn over itself, without a thread of its own."""
    file = io.StringIO()
    console = Console(width=80, file=file, force_terminal=True)
    with Stage(console, 20) as stage:
        before = threading.active_count()
        stage.show(cast)
        assert threading.active_count() == before
    assert "tokens/s" in file.getvalue()


def test_the_script_leaves_room_for_everybody() -> None:
    """Somebody comes, somebody leaves and somebody dies, in this order and before the last round."""
    for rounds in range(6, 100):
        script = Script.of(rounds)
        assert 2 <= script.join < script.leave <= script.kill < rounds


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--workers", "0"], "--workers"),
        (["--rounds", "5"], "--rounds"),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--preset", "huge"], "huge"),
        (["--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_use_is_one_line(flags: list[str], word: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names what was wrong, also when a worker is the one to notice."""
    assert main(["demo", "--no-dashboard", *flags]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("dtrain: ") and word in error and "\n" not in error


# ---------------------------------------------------------------------- the real thing


@pytest.fixture
def temp_folder() -> Iterator[Path]:
    """The temp folder of one demo. Short, as the paths of sockets may have 107 characters at most."""
    path = Path(tempfile.mkdtemp(prefix="d"))
    yield path
    for process in processes_of(path):
        process.kill()
    shutil.rmtree(path, ignore_errors=True)


def processes_of(temp: Path) -> list[psutil.Process]:
    """All processes that were started with this temp folder."""
    return started_with("TMPDIR", str(temp))


def files_of(temp: Path) -> list[Path]:
    """All files but torch's compiler cache, which is one per user and torch's own."""
    return [path for path in temp.iterdir() if not path.name.startswith("torchinductor_")]


def start_demo(temp: Path, *flags: str, dashboard: bool = False) -> subprocess.Popen[str]:
    if not dashboard:
        flags = (*flags, "--no-dashboard")
    return subprocess.Popen(
        [sys.executable, "-m", "dtrain.trainer.cli", "demo", *flags],
        env={**os.environ, "TMPDIR": str(temp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(500)
def test_the_demo(temp_folder: Path, tmp_path: Path) -> None:
    """Workers come, leave and die; the rest train on, hold one theta, and nothing of ours is left."""
    figures_file = tmp_path / "demo.json"
    demo = start_demo(temp_folder, "--rounds", "8", "--json", str(figures_file), dashboard=True)
    assert demo.stdout is not None
    first = demo.stdout.readline()
    address = first.removeprefix("Dashboard: ").partition("#")[0]
    eventually(lambda: "worker-2" in snapshot_of(address), "the dashboard shows no run")
    output = first + demo.communicate(timeout=450)[0]
    assert demo.returncode == 0, output
    assert all(len(line) <= 80 for line in output.splitlines())
    figures = json.loads(figures_file.read_text())
    assert figures["rounds"] == 8
    assert figures["digests_equal"] is True
    assert figures["eval_loss_after"] < 0.8 * figures["eval_loss_before"]
    assert figures["ratio_vs_fp32_allreduce"] > 20
    assert figures["longest_wait_s"] < figures["round_timeout_s"]
    check_workers(figures)
    assert not processes_of(temp_folder)
    assert not files_of(temp_folder)


def snapshot_of(address: str) -> str:
    """What the demo's dashboard tells of the run."""
    try:
        with urllib.request.urlopen(f"{address}api/run", timeout=30) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError:
        return ""  # the run is not found yet


def check_workers(figures: dict[str, Any]) -> None:
    workers = {worker["name"]: worker for worker in figures["workers"]}
    fates = [workers[f"worker-{n}"]["state"] for n in (1, 2, 3, 4)]
    assert fates == ["left", "killed", "finished", "finished"]
    assert workers["worker-3"]["digest"] == workers["worker-4"]["digest"]
    late = workers["worker-4"]
    assert late["joined_from"] == "peers" and late["joined_round"] >= 2
    assert figures["contributors_per_round"][0] == 3
    for number, (count, names) in enumerate(
        zip(figures["contributors_per_round"], figures["contributors"], strict=True), 1
    ):
        assert count == len(names) >= 2
        for name in names:
            assert workers[name]["joined_round"] <= number <= (workers[name]["left_round"] or 8)
    assert workers["worker-1"]["left_round"] < 8 and workers["worker-2"]["left_round"] < 8
    for worker in workers.values():
        assert worker["device"] and worker["tokens"] > 0
        assert worker["bytes_up"] > 0 and worker["bytes_down"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_demo_leaves_nothing(number: signal.Signals, temp_folder: Path) -> None:
    """However the demo ends, its workers and their network processes end too."""
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed")
    demo = start_demo(temp_folder)
    daemon = "p2pd"
    eventually(lambda: any(p.name() == daemon for p in processes_of(temp_folder)), "no worker came up")
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode == (-number if number == signal.SIGKILL else 130)
    eventually(lambda: not processes_of(temp_folder), "a process is left", 20.0)
    if number != signal.SIGKILL:
        assert not files_of(temp_folder)


def test_a_worker_that_fails_ends_the_demo(temp_folder: Path) -> None:
    """A death that is not in the script is reported with the worker's last lines; nothing is left behind."""
    demo = start_demo(temp_folder)
    eventually(lambda: any(p.name() == "p2pd" for p in processes_of(temp_folder)), "no worker came up")
    (worker,) = psutil.Process(demo.pid).children()
    worker.kill()
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "dtrain: worker-1 failed with exit code -9" in output
    eventually(lambda: not processes_of(temp_folder), "a process is left", 5.0)
    eventually(lambda: not files_of(temp_folder), "a file is left", 5.0)
