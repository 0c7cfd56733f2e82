"""Laws of admission, with real workers: a token lets in whom it says, and nobody else trains or gets the weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from swarm_tools import DEADLINE_S, eventually, our_processes

from dtrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("processes")

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


@pytest.mark.timeout(400)
def test_an_invite_lets_in_whom_it_says_until_it_is_revoked(tmp_path: Path) -> None:
    """The organizer needs no invite; nobody else comes in without; one use is one machine; revoked is out."""
    join = ("--host", "127.0.0.1", "--threads", "1", "--no-lan", "--eval-every", "0")
    with machines(tmp_path, "organizer", "guest", "second", "stranger") as (host, guest, second, stranger):
        host.type("worker", "--run-id", "guarded", *join, *FAST, "--admission", "token")
        eventually(lambda: host.events("round"), "the organizer's worker did not begin")
        code, invite, note = host.run("invite", "--run-id", "guarded", "--uses", "1", "--expires", "12h")
        assert code == 0 and invite.startswith("dtrain://") and "For 1 machine" in note

        uninvited = stranger.type(
            "worker", "--run-id", "guarded", *join
        )  # beside the guest: to come up takes long
        joined = guest.type("join", invite, "--yes", *join)
        assert uninvited.wait(DEADLINE_S) == 2
        refusal = stranger.said("err")
        assert refusal.count("\n") == 0 and "ask its organizer" in refusal
        eventually(lambda: guest.events("first_contribution"), "the guest did not come in")
        code, _, refusal = second.run("join", invite, "--yes", *join)
        assert (code, refusal.count("\n")) == (1, 0) and "used as often as it may be" in refusal
        assert not second.events("round")

        token_id = re.search(r"dtrain revoke ([0-9a-f]{16})", note)
        assert token_id is not None
        assert token_id[1] in host.run("invite", "--run-id", "guarded", "--list")[1]
        code, said, err = host.run("revoke", token_id[1], "--run-id", "guarded")
        assert code == 0 and "Revoked" in said, err
        assert joined.wait(DEADLINE_S) == 1 and "revoked" in guest.said("err").splitlines()[-1]

        def counted() -> bool:
            counts = dict(host.events("refused")[-1]["counts"])  # type: ignore[call-overload]
            return bool(counts.get("used-up")) and bool(counts.get("revoked"))

        eventually(counted, f"the refusals were not counted: {host.events('refused')[-3:]}")
        rounds = len(host.events("round"))
        eventually(lambda: len(host.events("round")) > rounds + 1, "the organizer's worker stopped")
