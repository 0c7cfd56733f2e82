"""Laws of how workers on one machine find each other: the living are found, the dead are cleared away."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import platformdirs
import pytest

from dtrain.dht import rendezvous
from dtrain.dht.rendezvous import LocalWorker


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime"


def worker(run_id: str = "run", pid: int | None = None) -> LocalWorker:
    pid = os.getpid() if pid is None else pid
    return LocalWorker(run_id, pid, "12D3KooW", "ab" * 32, ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooW"])


def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_published_worker_is_found_under_its_run_only(runtime: Path) -> None:
    """Who publishes is found by the run id, complete, and by no other id; removing the file ends it."""
    path = rendezvous.publish(worker())
    assert rendezvous.find("run") == [worker()]
    assert rendezvous.find("ru") == rendezvous.find("run2") == rendezvous.find("RUN") == []
    path.unlink()
    assert rendezvous.find("run") == []
    assert list(runtime.iterdir()) == []


def test_the_folder_is_private(runtime: Path) -> None:
    """Only this user may read or add addresses, whatever the umask."""
    before = os.umask(0)
    try:
        rendezvous.folder()
    finally:
        os.umask(before)
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_without_a_variable_the_system_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_RUNTIME_DIR comes next; without it, a folder of this host in the user's state folder."""
    monkeypatch.delenv("DTRAIN_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    assert rendezvous.folder() == tmp_path / "xdg" / "dtrain"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(platformdirs, "user_state_path", lambda name: tmp_path / "state" / name)
    monkeypatch.setattr(socket, "gethostname", lambda: "host")
    assert rendezvous.folder() == tmp_path / "state" / "dtrain" / "host"


def test_the_dead_are_cleared_away() -> None:
    """A killed worker's file goes when somebody looks; the living beside it are found."""
    left = rendezvous.publish(worker(pid=dead_pid()))
    rendezvous.publish(worker())
    assert rendezvous.find("run") == [worker()]
    assert not left.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        json.dumps({**worker().__dict__, "extra": 1}),
        json.dumps({**worker().__dict__, "pid": "me"}),
        json.dumps({**worker().__dict__, "pid": 10**30}),
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_damaged_file_hides_nobody(text: str | bytes, runtime: Path) -> None:
    """Files that hold something else are passed over."""
    rendezvous.publish(worker())
    (runtime / "run.000.json").write_bytes(text.encode() if isinstance(text, str) else text)
    assert rendezvous.find("run") == [worker()]


def test_the_lock_is_held_by_one_at_a_time() -> None:
    """Who asks for the lock while another has it waits, and goes on when the other lets go."""
    asking, entered = threading.Event(), threading.Event()

    def second() -> None:
        asking.set()
        with rendezvous.lock():
            entered.set()

    thread = threading.Thread(target=second)
    with rendezvous.lock():
        thread.start()
        assert asking.wait(10)
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join(10)
