"""Workers behind routers that let nothing in, and on machines that move: `make nat-test`, on Linux as root."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_tools import Swarm, WorkerProcess, eventually, swarm

from dtrain.dht.invite import decode
from dtrain.experiments.netns import Internet, internet, missing
from dtrain.trainer.cli_run import REACH_LINES

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
PORT = "31000"
SMALL = ("--preset", "tiny", "--inner-steps", "2", "--batch-size", "2")
EVERYWHERE = ("--host", "0.0.0.0", "--port", PORT, "--eval-every", "0")
SLOWLY = ("--max-tokens-per-s", "500")  # else a worker that is away misses dozens of rounds of the others
NOTICED_S = 10.0


@pytest.fixture
def net() -> Iterator[Internet]:
    with internet() as made:
        yield made


def invite_of(worker: WorkerProcess) -> str:
    """The invite that a worker prints."""
    found = eventually(lambda: re.search(r"dtrain join (\S+)", worker.tail()), f"no invite:\n{worker.tail()}")
    return str(found[1])


def begin(run: Swarm, namespace: str, start_workers: int, *flags: str) -> WorkerProcess:
    """The worker that begins the run; nothing is trained before `start_workers` are there."""
    flags = (*SMALL, *EVERYWHERE, "--start-workers", str(start_workers), *flags)
    return run.start("public", *flags, namespace=namespace)


def join(run: Swarm, namespace: str, name: str, invite: str, *flags: str) -> WorkerProcess:
    return run.start(name, *EVERYWHERE, "--invite", invite, *flags, namespace=namespace)


def wait_for_rounds(workers: list[WorkerProcess], number: int, since: float = 0.0) -> None:
    """All of them have been in `number` rounds with all of them, begun after `since` (time.time())."""

    def together(worker: WorkerProcess) -> int:
        rounds = [event for event in worker.events("round") if event["time"] > since]
        return sum(event["own_included"] and len(event["contributors"]) == len(workers) for event in rounds)

    for worker in workers:
        eventually(
            lambda worker=worker: together(worker) >= number,
            f"{worker.name} is not in the rounds:\n{worker.tail()}",
        )


def assert_one_theta(workers: list[WorkerProcess]) -> None:
    """Whoever completed a round has the same digest after it."""
    digests = [worker.digests() for worker in workers]
    for number in set().union(*digests):
        assert len({d[number] for d in digests if number in d}) == 1, f"round {number}"


def assert_payloads_travelled(workers: list[WorkerProcess]) -> None:
    """In its last round each worker has sent and received about its own payload or more."""
    for worker in workers:
        before, last = worker.events("round")[-2:]
        for way in ("bytes_up", "bytes_down"):
            moved = last[way] - before[way]
            assert moved > 0.9 * last["payload_bytes"] > 0, f"{worker.name}: {moved} {way}"


def reach_of(worker: WorkerProcess) -> str:
    return str(worker.wait_for("start")["reach"])


@pytest.mark.parametrize("how", ["relayed", "client"])
def test_a_worker_that_nobody_can_dial_contributes(how: str, tmp_path: Path, net: Internet) -> None:
    """Behind a masquerading router, known to nobody, a worker joins through one public peer and is in the rounds."""
    with swarm("nat-one", tmp_path) as run:
        public = begin(run, net.host("public", "20.0.0.1"), 2)
        flags = ["--no-relay"] if how == "client" else []
        hidden = join(run, net.home("a", "20.0.1.1", "192.168.1"), "hidden", invite_of(public), *flags)
        wait_for_rounds([public, hidden], 3)
        assert (reach_of(public), reach_of(hidden)) == ("direct", how)
        assert REACH_LINES[how] in hidden.tail()
        assert decode(invite_of(hidden)).addresses[how == "relayed" :] == decode(invite_of(public)).addresses
        assert_payloads_travelled([public, hidden])
        assert_one_theta([public, hidden])


@pytest.mark.parametrize("how", ["relayed", "client"])
def test_two_that_cannot_dial_each_other_meet(how: str, tmp_path: Path, net: Internet) -> None:
    """Two workers behind different routers and one public peer make rounds of three; one may invite the other."""
    with swarm("nat-two", tmp_path) as run:
        flags = ["--no-relay"] if how == "client" else []
        public = begin(run, net.host("public", "20.0.0.1"), 3)
        hidden = [join(run, net.home("a", "20.0.1.1", "192.168.1"), "a", invite_of(public), *flags)]
        hidden.append(join(run, net.home("b", "20.0.2.1", "192.168.1"), "b", invite_of(hidden[0]), *flags))
        wait_for_rounds([public, *hidden], 3)
        assert [reach_of(worker) for worker in hidden] == [how, how]
        assert_payloads_travelled([public, *hidden])
        assert_one_theta([public, *hidden])


def test_two_meet_through_a_relay_alone(tmp_path: Path, net: Internet) -> None:
    """Where nobody who trains can be dialled, the relay carries the rounds."""
    with swarm("nat-relay", tmp_path) as run:
        public = begin(run, net.host("public", "20.0.0.1"), 3)
        homes = {name: net.home(name, f"20.0.{n}.1", "192.168.1") for n, name in enumerate("ab", 1)}
        hidden = [join(run, home, name, invite_of(public)) for name, home in homes.items()]
        wait_for_rounds([public, *hidden], 1)
        public.process.send_signal(signal.SIGSTOP)  # it trains no more; its network process goes on
        wait_for_rounds(hidden, 3, since=time.time())
        assert_payloads_travelled(hidden)
        assert_one_theta([public, *hidden])


def test_a_forwarded_port_makes_a_worker_dialable(tmp_path: Path, net: Internet) -> None:
    """Where the router passes the port on, the worker finds that out, and invites others to the router's address."""
    with swarm("nat-open", tmp_path) as run:
        public = begin(run, net.host("public", "20.0.0.1"), 3)
        home = net.home("a", "20.0.1.1", "192.168.1")
        net.forward(home, int(PORT), "192.168.1")
        open_one = join(run, home, "open", invite_of(public))
        assert reach_of(open_one) == "direct"
        assert decode(invite_of(open_one)).addresses[0].startswith(f"/ip4/20.0.1.1/tcp/{PORT}/")
        hidden = join(run, net.home("b", "20.0.2.1", "192.168.1"), "hidden", invite_of(open_one))
        wait_for_rounds([public, open_one, hidden], 3)
        assert_one_theta([public, open_one, hidden])


@pytest.mark.parametrize("who", ["hidden", "open", "public"])
def test_a_machine_that_moves_is_back_soon(who: str, tmp_path: Path, net: Internet) -> None:
    """A changed address is noticed within 10 s and the worker back in rounds, with the same peer id and one theta."""
    with swarm("nat-move", tmp_path) as run:
        places = {
            "public": (net.host("public", "20.0.0.1"), "wan", "20.0.0.1/8", "20.0.0.7/8"),
            "open": (net.host("open", "20.0.0.2"), "wan", "20.0.0.2/8", "20.0.0.9/8"),
            "hidden": (net.home("a", "20.0.1.1", "192.168.1"), "lan", "192.168.1.2/24", "192.168.1.77/24"),
        }
        workers = {"public": begin(run, places["public"][0], 3, *SLOWLY)}
        for name in ("open", "hidden"):
            workers[name] = join(run, places[name][0], name, invite_of(workers["public"]), *SLOWLY)
        wait_for_rounds([*workers.values()], 2)

        moved = time.time()
        net.move(*places[who])
        lost = workers[who].wait_for("network", lambda event: event["state"] == "lost")
        assert lost["time"] - moved < NOTICED_S
        assert places[who][3].split("/")[0] in lost["reason"]
        back = workers[who].wait_for("network", lambda event: event["state"] == "back")
        assert back["reach"] == ("relayed" if who == "hidden" else "direct")
        wait_for_rounds([*workers.values()], 2, since=moved)
        mover = workers[who].wait_for("start")["peer_id"]
        assert mover in workers["open" if who == "hidden" else "hidden"].events("round")[-1]["contributors"]
        assert_one_theta([*workers.values()])
