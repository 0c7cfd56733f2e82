"""Laws of the network process's supervision: a command is answered or fails with a word, a dead child is replaced by
exactly one, and nothing is left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.dht import ipc, process
from dtrain.dht.process import ConnectionLost, ExchangeError, NetworkProcess, sweep_left_overs

pytestmark = pytest.mark.xdist_group("processes")

DEADLINE_S = 60.0

# Stands in for the interpreter that runs `dtrain.dht.start`: obeys over the same socket, without a network.
CHILD = """#!{python}
import os, signal, socket, sys
from pathlib import Path
from dtrain.dht import ipc

with Path(__file__).with_name("starts").open("a") as file:
    print(os.getpid(), file=file)
connection = socket.socket(fileno=int(sys.argv[-1]))

def say(**message):
    connection.sendall(ipc.encode(message))

while True:
    try:
        message = ipc.receive(connection)
    except EOFError:
        break
    do, number, args = message.get("do"), message.get("id"), message.get("args")
    if do == "echo":
        say(id=number, value=args)
    elif do == "fail":
        say(id=number, error="it is broken")
    elif do == "die":
        os._exit(1)
    elif do == "die once" and not Path(args["mark"]).exists():
        Path(args["mark"]).touch()
        os._exit(1)
    elif do == "tell":
        say(event="told", args=args)
    elif do == "ask":
        say(ask=args["question"], id=77)
        asked = number
    elif "answer" in message:
        say(id=asked, value=[message["answer"], message["value"]])
    elif do == "close" and not Path(__file__).with_name("stubborn").exists():
        break
    elif do == "close":
        signal.pause()
    elif do != "mute":
        say(id=number, value=None)
"""


@pytest.fixture(autouse=True)
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in in the interpreter's place, and the temp folder into the test's own."""
    script = tmp_path / "python"
    script.write_text(CHILD.format(python=sys.executable))
    script.chmod(0o700)
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(process, "RESTART_PAUSE_S", 0.05)
    return script


@contextmanager
def network(
    on_event: Callable[[Any], None] = lambda _: None, on_question: Callable[[str], Any] = lambda _: None
) -> Iterator[NetworkProcess]:
    """A network process that is closed at the end; after that nothing of it may be left."""
    made = NetworkProcess(on_event, on_question)
    try:
        made.command("echo")  # the child has written down that it lives
        yield made
    finally:
        made.close()
    assert not Path(made.private_folder).exists()


def starts(child: Path) -> list[int]:
    """Process ids of all children so far."""
    return [int(line) for line in child.with_name("starts").read_text().split()]


def eventually(look: Callable[[], Any], failure: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < until, failure
        time.sleep(0.01)


def assert_gone(pids: list[int]) -> None:
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), f"some of {pids} are left")


# ---------------------------------------------------------------------- commands


def test_a_command_is_answered(child: Path) -> None:
    """A value comes back as it is; an error is an ExchangeError with its text, and so is an answer that never comes."""
    with network() as net:
        assert net.command("echo", n=1, blob=b"x") == {"n": 1, "blob": b"x"}
        with pytest.raises(ExchangeError, match="it is broken"):
            net.command("fail")
        with pytest.raises(ExchangeError, match=r"did not answer 'mute' within"):
            net.command("mute", timeout_s=0.05)
        assert net.command("echo", n=2) == {"n": 2}
        assert net.pid == starts(child)[0]
    assert_gone(starts(child))
    assert list((child.parent / "temp").iterdir()) == []


def test_many_threads_get_their_own_answers() -> None:
    """Commands from many threads at once are answered each with its own value."""
    with network() as net:
        found: dict[int, Any] = {}

        def ask(number: int) -> None:
            found[number] = [net.command("echo", n=number, i=i, pad=bytes(5000)) for i in range(20)]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert found == {n: [{"n": n, "i": i, "pad": bytes(5000)} for i in range(20)] for n in range(8)}


def test_what_the_child_says_and_asks_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    """Events reach on_event; questions are answered by on_question, and a failing answer is None and a warning."""
    events: list[ipc.Message] = []

    def reply(question: str) -> str:
        if question == "state":
            return "all well"
        raise OSError("disk full")

    with network(events.append, reply) as net:
        net.tell("tell", n=3)
        assert net.command("ask", question="state") == [77, "all well"]
        assert events == [{"event": "told", "args": {"n": 3}}]
        assert net.command("ask", question="moon") == [77, None]
        assert "disk full" in caplog.text


# ---------------------------------------------------------------------- death


def test_a_command_under_way_when_the_child_dies_is_lost() -> None:
    """All that wait for an answer get ConnectionLost at once, not a timeout; so does every command after it."""
    with network() as net:
        lost = []

        def ask() -> None:
            try:
                net.command("mute", timeout_s=DEADLINE_S)
            except ConnectionLost as error:
                lost.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        with pytest.raises(ConnectionLost):
            net.command("die", timeout_s=DEADLINE_S)
        for thread in threads:
            thread.join(DEADLINE_S)
        assert len(lost) == 3
        for call in (net.command, net.tell):
            with pytest.raises(ConnectionLost):
                call("echo")


def test_before_it_is_set_up_a_dead_child_is_not_replaced(child: Path) -> None:
    """A child that dies while the worker is still connecting is the worker's error to report."""
    with network() as net:
        with pytest.raises(ConnectionLost):
            net.command("die")
        with pytest.raises(ConnectionLost):
            net.command("echo")
    assert len(starts(child)) == 1


def test_a_dead_child_is_replaced_by_one(child: Path) -> None:
    """When the child dies another takes its place, is set up once, and has a folder of its own; the old one is gone."""
    ready = threading.Event()
    with network() as net:
        net.set_up = ready.set
        for deaths in (1, 2):
            ready.clear()
            folder = net.private_folder
            (folder / "socket").touch()
            psutil.Process(net.pid).kill()
            assert ready.wait(DEADLINE_S)
            assert net.command("echo", n=deaths) == {"n": deaths}
            assert len(starts(child)) == 1 + deaths
            assert not folder.exists() and net.private_folder.exists()
            assert_gone(starts(child)[:-1])
    assert_gone(starts(child))


def test_a_child_that_dies_while_it_is_set_up_is_replaced_by_one(child: Path, tmp_path: Path) -> None:
    """However often the new child dies on the way, in the end exactly one lives, and no more were started than died."""
    ready, num_deaths = threading.Event(), 3
    with network() as net:

        def set_up() -> None:
            for number in range(num_deaths):
                net.command("die once", mark=str(tmp_path / f"mark{number}"))
            ready.set()

        net.set_up = set_up
        psutil.Process(net.pid).kill()
        assert ready.wait(DEADLINE_S)
        assert net.command("echo", n=1) == {"n": 1}
        time.sleep(
            4 * process.RESTART_PAUSE_S
        )  # a second restart that went on beside the first would show by now
        assert net.command("echo", n=2) == {"n": 2}
        assert len(starts(child)) == 2 + num_deaths
        assert_gone(starts(child)[:-1])
    assert_gone(starts(child))
    assert list((tmp_path / "temp").iterdir()) == []


def test_a_set_up_that_fails_is_tried_again(child: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the network is away for a while, children are replaced until one can be set up; the log says why."""
    ready, attempts = threading.Event(), []
    with network() as net:

        def set_up() -> None:
            attempts.append(net.pid)
            if len(attempts) < 3:
                net.command("fail")
            ready.set()

        net.set_up = set_up
        psutil.Process(net.pid).kill()
        assert ready.wait(DEADLINE_S)
        assert net.command("echo", n=1) == {"n": 1}
        assert attempts == starts(child)[1:] and len(attempts) == 3
        assert caplog.text.count("it is broken") == 2
    assert_gone(starts(child))


# ---------------------------------------------------------------------- the end


def test_a_child_that_does_not_end_is_killed(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that hangs on its way out is given CLOSE_TIMEOUT_S and then killed."""
    monkeypatch.setattr(process, "CLOSE_TIMEOUT_S", 0.2)
    child.with_name("stubborn").touch()
    with network() as net:
        net.command("echo")
    assert_gone(starts(child))


def test_a_child_that_was_never_asked_ends_at_once(child: Path) -> None:
    """Whoever typed something wrong does not wait until the child has come up."""
    child.with_name("stubborn").touch()
    began = time.monotonic()
    net = NetworkProcess(lambda _: None, lambda _: None)
    net.close()
    assert time.monotonic() - began < process.CLOSE_TIMEOUT_S
    assert_gone([net.pid])
    assert not Path(net.private_folder).exists()


def test_closing_ends_a_restart_under_way(child: Path) -> None:
    """A worker that leaves while its network process is being replaced leaves no child behind."""
    begun = threading.Event()
    with network() as net:

        def set_up() -> None:
            begun.set()
            net.command("mute", timeout_s=DEADLINE_S)

        net.set_up = set_up
        psutil.Process(net.pid).kill()
        assert begun.wait(DEADLINE_S)
    assert_gone(starts(child))
    eventually(
        lambda: not any(t.name == "network-restart" for t in threading.enumerate()), "a thread is left"
    )
    assert_gone(starts(child))
    assert list((child.parent / "temp").iterdir()) == []


def dead_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_only_what_the_dead_left_is_swept_away() -> None:
    """Folders named after processes that live no more go with all in them; everything else in the temp folder stays."""
    temp = Path(tempfile.gettempdir())
    dead = temp / f"dtrain-{dead_pid()}-abc"
    stay = [
        temp / f"dtrain-{name}" for name in (f"{os.getpid()}-abc", "1-abc", "x-abc", "²-abc", f"{10**30}-abc")
    ]
    stay += [temp / f"{dead_pid()}-dtrain-abc", temp / f"dtrain-{dead_pid()}"]
    for folder in (dead, *stay):
        folder.mkdir()
        (folder / "file").write_text("x")
    sweep_left_overs()
    assert sorted(temp.iterdir()) == sorted(stay)
