"""Laws of the dashboard's server: who may control, what it tells, and that nothing it serves runs a foreign script."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_tools import ABOUT, Client, Stage

from dtrain.experiments import dashboard
from dtrain.experiments.dashboard_app import create_app
from dtrain.experiments.dashboard_guard import TOKEN_HEADER, Access
from dtrain.experiments.dashboard_results import Results
from dtrain.experiments.results import ResultFolder
from dtrain.trainer.cli import main
from dtrain.trainer.errors import UsageError

HERE = "http://127.0.0.1:8080"
ADDRESS = re.compile(r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b|/ip[46]/")
ACTIONS = ["pause", "resume", "finish", "limits"]


class FakeMachine:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def workers(self) -> list[dict[str, Any]]:
        return [{"pid": 7, "name": "ada", "state": "training"}]

    def act(self, action: str, pid: int) -> dict[str, Any]:
        if pid != 7:
            raise UsageError(f"no worker of yours has the process id {pid}")
        self.told.append((action, pid))
        return {"pid": pid}

    def set_limits(self, pid: int, changes: dict[str, Any]) -> dict[str, Any]:
        self.told.append(("limits", pid, changes))
        return {"pid": pid}

    def log(self, pid: int, lines: int) -> list[dict[str, Any]]:
        return [{"time": 1.0, "text": "hello"}] * min(lines, 2)


class Served:
    """A dashboard under the test client."""

    def __init__(
        self, stage: Stage, *, public: bool = False, show_invite: bool = True, results: Path | None = None
    ):
        self.stage, self.machine, self.access = stage, FakeMachine(), Access(public, "secret")

        class Watched:
            history, about, invite = stage.history, stage.about, stage.invite

        app = create_app(
            hub=stage.hub,
            access=self.access,
            run=Watched(),
            machine=self.machine,
            show_invite=show_invite,
            results=None if results is None else Results(results),
        )
        self.client = Client(app, HERE)

    def post(self, action: str, **headers: str) -> int:
        body = {"pid": 7, "limits": {"threads": 2}} if action == "limits" else {"pid": 7}
        given = {TOKEN_HEADER: "secret", "origin": HERE} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        return self.client.post(f"/api/worker/{action}", body, given).status_code


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "dashboard")
    stage.enter("ada", "bert")
    for _ in range(6):
        stage.play_round()
    yield stage
    stage.history.close()


@pytest.mark.parametrize("action", ACTIONS)
def test_the_owner_controls_the_worker(stage: Stage, action: str) -> None:
    """With the token, from this page, a control reaches the worker."""
    served = Served(stage)
    assert served.post(action) == 200
    assert served.machine.told[0][:2] == (action, 7)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "headers",
    [
        {TOKEN_HEADER: ""},
        {TOKEN_HEADER: "guess"},
        {TOKEN_HEADER: "sécret"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"host": "evil.example"},
        {"host": "evil.example:8080", "origin": "http://evil.example:8080"},
    ],
)
def test_nobody_else_does(stage: Stage, action: str, headers: dict[str, str]) -> None:
    """No token, a wrong one, another site's page, or another name for this machine: 403, and nothing happens."""
    served = Served(stage)
    assert served.post(action, **headers) == 403
    assert served.machine.told == []


@pytest.mark.parametrize("action", ACTIONS)
def test_a_public_page_controls_nothing(stage: Stage, action: str) -> None:
    """Not even with the token; nor does it tell of this machine's workers or their logs."""
    served = Served(stage, public=True)
    assert served.post(action) == 403
    for path in ("/api/worker", "/api/worker/log?pid=7"):
        assert served.client.get(path, headers={TOKEN_HEADER: "secret"}).status_code == 403
    assert served.machine.told == []
    assert served.client.get("/api/run", headers={"host": "example.org"}).status_code == 200


def test_a_mistake_is_answered_with_a_line(stage: Stage) -> None:
    """A worker that has ended, an unknown action, a body of the wrong form: a status that says so, no traceback."""
    client, headers = Served(stage).client, {TOKEN_HEADER: "secret"}
    answer = client.post("/api/worker/pause", {"pid": 8}, headers=headers)
    assert answer.status_code == 400 and "8" in answer.json()["error"]
    assert client.post("/api/worker/explode", {"pid": 7}, headers=headers).status_code == 422
    assert client.post("/api/worker/pause", {"pid": "x"}, headers=headers).status_code == 422


def test_the_page_confines_scripts(stage: Stage) -> None:
    """Every answer, also a refusal, carries the policy that lets no foreign or inline script run."""
    client = Served(stage).client
    for path in ("/", "/static/page.js", "/api/run", "/api/worker", "/nowhere"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy
    html = client.get("/").text
    assert "<script>" not in html and " style=" not in html and not re.search(r"\son\w+=", html)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """No file of the page names another host to load from, and none makes markup of text."""
    for path in dashboard_files():
        text = path.read_text()
        if path.parent.name != "vendor":
            assert "//" not in re.sub(r"(?m)(^|\s)//.*|http://www\.w3\.org/2000/svg", "", text), path.name
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
                path.name
            )


def dashboard_files() -> list[Path]:
    folder = Path(dashboard.__file__).parent / "dashboard_static"
    return [path for path in folder.rglob("*") if path.suffix in (".js", ".css", ".html")]


def test_no_endpoint_tells_addresses(stage: Stage) -> None:
    """What peers say of their addresses goes no further, and a public page shows the invite only if it is told to."""
    for actor in stage.actors.values():
        actor.changes["address"] = "/ip4/203.0.113.9/tcp/4001/p2p/x"
    stage.play_round()
    client = Served(stage, public=True, show_invite=False).client
    for path in (
        "/api/run",
        "/api/info",
        "/api/events",
        "/api/curves/train_loss",
        "/metrics",
        "/openapi.json",
    ):
        answer = client.get(path)
        assert answer.status_code == 200
        assert not ADDRESS.search(answer.text) and stage.invite not in answer.text, path
    assert client.get("/api/invite.svg").status_code == 404


def test_the_api(stage: Stage) -> None:
    """The run, its curves, its events, the invite with its code, and the description of all that."""
    client = Served(stage).client
    assert client.get("/api/run").json()["health"]["round"] == 6
    assert client.get("/api/curves/train_loss").json()["round"] == [1, 2, 3, 4, 5, 6]
    zoomed = client.get("/api/curves/train_loss", params={"axis": "round", "start": 2, "end": 4}).json()
    assert zoomed["round"] == [2, 3, 4]
    assert client.get("/api/curves/passwords").status_code == 422
    newest = client.get("/api/events", params={"limit": 1}).json()[0]
    assert client.get("/api/events", params={"before": newest["id"]}).json()[0]["id"] < newest["id"]
    assert client.get("/api/info").json()["join"] == f"dtrain join {stage.invite}"
    assert client.get("/api/invite.svg").headers["content-type"].startswith("image/svg")
    described = client.get("/openapi.json").json()["paths"]
    assert {"/api/run", "/api/stream", "/api/worker/{action}", "/api/results", "/metrics"} <= set(described)
    assert all(entry.get("description") for path in described.values() for entry in path.values())


def test_metrics_are_prometheus_text(stage: Stage) -> None:
    """Every line is a comment or `name{labels} number`, and a hostile name stays inside its quotes."""
    stage.actors["ada"].changes["name"] = 'a"} 1\nevil 1'
    stage.play_round()
    text = Served(stage).client.get("/metrics").text
    line = re.compile(r'# (HELP|TYPE) .+|\w+(\{(\w+="([^"\\\n]|\\.)*",?)+\})? -?[0-9.e+-]+')
    assert all(line.fullmatch(row) for row in text.splitlines())
    assert 'dtrain_round{run="test"} 7' in text and "\nevil" not in text


def result_folder(base: Path, runs: int, rounds: int) -> None:
    folder = ResultFolder(base)
    folder.create()
    rows = []
    for index in range(runs):
        run_id = f"run-{index}"
        row = {
            "id": run_id,
            "label": f"k {index}",
            "strategy": "sparseloco",
            "eval_loss": 2.0 - index / 10,
            "tokens": 100,
        }
        lines = [
            {
                "round": r,
                "tokens": 10 * r,
                "time_s": 2.0 * r,
                "bytes_up_per_worker": 5 * r,
                "eval_loss": 4.0 / (r + 1),
            }
            for r in range(rounds)
        ]
        path = folder.run_folder(run_id) / "rounds.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        folder.write_row(run_id, row)
        rows.append(row)
    summary = {
        "format": 1,
        "name": "sweep",
        "description": "",
        "finished": True,
        "varied": ["codec.k"],
        "rows": rows,
    }
    folder.write_summary(summary)


def test_results_are_read(stage: Stage, tmp_path: Path) -> None:
    """Every sweep with its rows; a run's columns, thinned when they are long; no path leads outside."""
    result_folder(tmp_path / "results" / "a", 3, 5000)
    client = Served(stage, results=tmp_path / "results").client
    (sweep,) = client.get("/api/results").json()
    assert (sweep["folder"], len(sweep["rows"]), sweep["varied"]) == ("a", 3, ["codec.k"])
    columns = client.get(
        "/api/results/curve", params={"folder": "a", "run": "run-1", "max_points": 400}
    ).json()
    assert 300 < len(columns["round"]) <= 400
    assert max(columns["eval_loss"]) == 4.0 and columns["loss"][0] is None
    for folder, run in (("..", "run-1"), ("a", "../a/runs/run-1"), ("a", "run-9"), ("/etc", "x")):
        assert client.get("/api/results/curve", params={"folder": folder, "run": run}).status_code == 404


def test_the_default_listens_on_loopback() -> None:
    """Only --public opens the page to other machines."""
    for public, host in ((False, "127.0.0.1"), (True, "0.0.0.0")):
        listener = dashboard.listen(0, public)
        assert listener.getsockname()[0] == host
        listener.close()


def test_the_default_port_gives_way_but_a_typed_one_does_not() -> None:
    """Two dashboards on one machine: the second takes another port, unless the user named this one."""
    taken = dashboard.listen(0, False)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=str(port)):
        dashboard.listen(port, False)
    taken.close()


@pytest.mark.parametrize(
    "flags, word",
    [
        ([], "--run-id"),
        (["--run-id", "a b"], "run id"),
        (["--invite", "nonsense"], "invite"),
        (["--results", "/no/such/folder"], "--results"),
        (["--run-id", "r", "--port", "99999"], "--port"),
        (["--run-id", "r", "--show-addresses"], "--public"),
        (["--run-id", "r", "--target-rounds", "-1"], "--target-rounds"),
    ],
)
def test_bad_use_is_one_line(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a line that says what to type instead."""
    assert main(["dashboard", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dtrain: ") and word in error and "\n" not in error


def test_without_its_libraries_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker's install lacks the web server: one line, no traceback."""
    import builtins

    real = builtins.__import__

    def without_fastapi(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "dtrain.experiments.dashboard_app":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_fastapi)
    assert main(["dashboard", "--run-id", "r"]) == 2
    assert "dtrain[dashboard]" in capsys.readouterr().err


def test_the_parser_knows_its_flags() -> None:
    """The public page is an explicit wish, never the default."""
    parser = argparse.ArgumentParser()
    dashboard.add_arguments(parser)
    args = parser.parse_args(["--run-id", ABOUT.run_id])
    assert args.public is False and args.show_addresses is False and args.port is None
