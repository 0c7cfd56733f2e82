"""The dashboard on a real network: killed, it goes on where it was; without the bootstrap peer it goes on at all."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swarm_tools import eventually, our_processes
from test_dashboard_observer import STATUS, worker_of
from test_organizer import start

from dtrain.dht.exchange import DhtExchange
from dtrain.dht.invite import decode
from dtrain.trainer.bulletin import TOPIC, Bulletin, EvalLine, RoundLine
from dtrain.trainer.cli import main
from dtrain.trainer.signing import SignedManifest

pytestmark = pytest.mark.xdist_group("processes")


class Dashboard:
    """A `dtrain dashboard` process, started again as often as the test likes."""

    def __init__(self, folder: Path, invite: str):
        self._folder, self._invite, self._log = folder, invite, folder / "dashboard.log"

    def start(self) -> None:
        flags = ("--invite", self._invite, "--no-browser", "--port", "0")
        self.process = start(self._folder, self._log, "dashboard", *flags)
        address = eventually(lambda: re.search(r"http://[^/]+/", self._log.read_text()), "no address")
        self._address = address[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._address}{path}", timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError:
            return None  # no snapshot is there yet

    def until(self, matches: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """The snapshot that matches."""

        def look() -> dict[str, Any] | None:
            shown: dict[str, Any] | None = self.ask("api/run")
            return shown if shown is not None and matches(shown) else None

        return eventually(look, what)


class Talker:
    """A worker that trains nothing but says what one would."""

    def __init__(self, exchange: DhtExchange):
        self._exchange, self._told, self._since = exchange, Bulletin(), time.time()

    def complete(self, round: int) -> None:
        self._told.rounds.append(RoundLine(round, 2.0, 0.1, 0.4, 0.01, 1, True, 2.5, 3000))
        self._told.evals.append(EvalLine(round, 2.25))
        self._told.contributions += 1
        self._exchange.announce({**STATUS, "round": round, "work": 3000.0 * round, "tokens": 3000 * round})
        self._exchange.post(TOPIC, self._told.pack(self._since, (500 * round, 600 * round)))


def rounds_of(dashboard: Dashboard, curve: str) -> list[int]:
    return list(dashboard.ask(f"api/curves/{curve}")["round"])


@pytest.mark.timeout(300)
def test_killed_it_goes_on_and_so_it_does_without_the_bootstrap_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL and a restart the history is whole, what was missed is there, and nothing is there twice. When the
    bootstrap peer that it joined through is killed, news of the others still come."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))
    assert main(["create", "--run-id", "kept", "--preset", "tiny"]) == 0
    signed = SignedManifest.from_json(Path("dtrain-runs/kept/manifest.json").read_text())
    processes: list[subprocess.Popen[bytes]] = []
    worker: DhtExchange | None = None
    try:
        log, here = tmp_path / "boot.log", ("--host", "127.0.0.1", "--port", "0")
        processes.append(boot := start(tmp_path, log, "bootstrap", "--run-id", "kept", *here))
        invite = eventually(lambda: re.search(r"dtrain join (\S+)", log.read_text()), "no invite")[1]
        worker = worker_of(signed, tmp_path, tuple(decode(invite).addresses))
        dashboard, talker = Dashboard(tmp_path, invite), Talker(worker)
        dashboard.start()
        processes.append(dashboard.process)
        for round in (1, 2):
            talker.complete(round)
            dashboard.until(lambda s, n=round: s["eval_loss"] == [n, 2.25], f"round {round}")
        before = dashboard.ask("api/events")
        dashboard.kill()
        talker.complete(3)

        dashboard.start()
        processes.append(dashboard.process)
        shown = dashboard.until(lambda s: s["eval_loss"] == [3, 2.25] and s["health"]["round"] == 3, "more")
        assert rounds_of(dashboard, "eval_loss") == rounds_of(dashboard, "train_loss") == [1, 2, 3]
        assert [lanes["round"] for lanes in shown["rounds"]] == [3, 2, 1]
        assert [worker["name"] for worker in shown["workers"]] == ["ada"]
        assert [entry["contributions"] for entry in shown["board"]] == [3]
        assert dashboard.ask("api/events") == before and [e["kind"] for e in before] == ["joined"]

        boot.send_signal(signal.SIGKILL)
        boot.wait()
        talker.complete(4)
        shown = dashboard.until(lambda s: s["eval_loss"] == [4, 2.25] and s["health"]["round"] == 4, "news")
        assert shown["connection"] == ""
    finally:
        if worker is not None:
            worker.close()
        for process in processes:
            process.kill()
            process.wait()
    eventually(lambda: not our_processes(tmp_path), "a process is left", 10.0)
