"""Laws of admission, with real workers: a token lets in whom it says, and nobody else trains or gets the weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from canary_tools import WANDB, canary
from sim_tools import write_file
from swarm_tools import DEADLINE_S, eventually, our_processes

from dtrain.dht.invite import decode
from dtrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("processes")

JOIN = ("--host", "127.0.0.1", "--threads", "1", "--no-lan", "--eval-every", "0", "--checkpoint-every", "5")
FAST = ("--preset", "tiny", "--inner-steps", "2", "--batch-size", "2", "--matchmaking-s", "4")


class Machine:
    """A folder in which commands are typed; all share one runtime folder, as the users of one computer."""

    def __init__(self, base: Path, name: str):
        self.base, self.folder = base, base / name
        self.folder.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []

    def type(self, *arguments: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "DTRAIN_RUNTIME_DIR": str(self.base / "runtime"), "OMP_NUM_THREADS": "1"}
        env["PYTHONFAULTHANDLER"] = "1"
        command = [sys.executable, "-m", "dtrain.trainer.cli", *arguments]
        # Files: who reads a pipe too late stops its writer.
        number = len(self.started)
        with self.file("out", number).open("wb") as out, self.file("err", number).open("wb") as err:
            process = subprocess.Popen(command, env=env, cwd=self.folder, stdout=out, stderr=err)
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a command that ends by itself."""
        code = self.type(*arguments).wait(DEADLINE_S)
        return code, self.said("out"), self.said("err")

    def file(self, where: str, number: int) -> Path:
        return self.folder / f"{number}.{where}"

    def said(self, where: str) -> str:
        """By the newest command."""
        return self.file(where, len(self.started) - 1).read_text().strip()

    def events(self, kind: str) -> list[dict[str, object]]:
        return [
            event
            for path in self.folder.glob("dtrain-runs/*/*/metrics.jsonl")
            for event in read_metrics(path)
            if event["event"] == kind
        ]


@contextmanager
def machines(base: Path, *names: str) -> Iterator[list[Machine]]:
    made = [Machine(base, name) for name in names]
    try:
        yield made
    finally:
        for process in [process for machine in made for process in machine.started]:
            process.kill()
            process.wait()
        eventually(lambda: not our_processes(base), "processes are left", 10.0)


@pytest.mark.timeout(600)
def test_an_invite_lets_in_whom_it_says_until_it_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The organizer needs no invite; nobody else comes in without; one use is one machine; revoked is out.

    Keys of wandb, of the hub and of a bucket, the invite's token, control tokens and private keys are in no file that
    the workers, a dashboard and a simulation wrote (metrics, journals, checkpoints, wandb's own), not in what they
    said, and not in the DHT; but in the private files that are made for them, and in the lines that hand them over.
    """
    names = "organizer", "guest", "second", "stranger", "watcher"
    with canary(tmp_path, monkeypatch) as birds, machines(tmp_path, *names) as made:
        host, guest, second, stranger, watcher = made
        host.type("worker", "--run-id", "guarded", *JOIN, *WANDB, *FAST, "--admission", "token")
        eventually(lambda: host.events("round"), "the organizer's worker did not begin")
        code, line, note = host.run("invite", "--run-id", "guarded", "--uses", "1", "--expires", "12h")
        assert code == 0 and line.startswith("dtrain://") and "For 1 machine" in note
        invite = decode(line)
        assert invite.token is not None
        birds.hand_over("token", invite.token.seed, host.file("out", 1))

        # All at once: to come up takes long.
        uninvited = stranger.type("worker", "--run-id", "guarded", *JOIN)
        joined = guest.type("join", line, "--yes", *JOIN, *WANDB, "--journal")
        page = watcher.type("dashboard", "--run-id", "guarded", "--no-browser", "--port", "0", *WANDB)
        assert uninvited.wait(DEADLINE_S) == 2
        refusal = stranger.said("err")
        assert refusal.count("\n") == 0 and "ask its organizer" in refusal
        eventually(lambda: guest.events("first_contribution"), "the guest did not come in")
        token = eventually(lambda: re.search(r"#token=(\S+)", watcher.said("out")), "no dashboard")[1]
        birds.hand_over("dashboard", token.encode(), watcher.file("out", 0))
        birds.read_the_run("guarded", invite)
        code, _, refusal = second.run("join", line, "--yes", *JOIN)
        assert (code, refusal.count("\n")) == (1, 0) and "used as often as it may be" in refusal
        assert not second.events("round")

        token_id = invite.token.grant.id
        assert f"dtrain revoke {token_id}" in note
        assert token_id in host.run("invite", "--run-id", "guarded", "--list")[1]
        code, said, err = host.run("revoke", token_id, "--run-id", "guarded")
        assert code == 0 and "Revoked" in said, err
        assert joined.wait(DEADLINE_S) == 1 and "revoked" in guest.said("err").splitlines()[-1]

        def counted() -> bool:
            counts = dict(host.events("refused")[-1]["counts"])  # type: ignore[call-overload]
            return bool(counts.get("used-up")) and bool(counts.get("revoked"))

        eventually(counted, f"the refusals were not counted: {host.events('refused')[-3:]}")
        rounds = len(host.events("round"))
        eventually(lambda: len(host.events("round")) > rounds + 1, "the organizer's worker stopped")

        for process in (host.started[0], page):
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) in (0, 130)
        simulation = str(write_file(watcher.folder))
        assert watcher.run("simulate", simulation, "--jobs", "1", *WANDB)[0] == 0
        birds.search(host.folder / "dtrain-runs" / "guarded")
