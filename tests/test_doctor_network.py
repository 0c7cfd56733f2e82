"""`dtrain doctor` on machines whose network is planted with faults: `make nat-test`, on Linux as root."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from swarm_tools import DEADLINE_S, Swarm, WorkerProcess, swarm
from test_nat import EVERYWHERE, SMALL, invite_of

from dtrain.experiments.lab_places import skew_environment
from dtrain.experiments.netns import Internet, internet, missing
from dtrain.trainer.doctor import FAIL, OK, WARN, Check

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
NOTHING_COMES_IN = """
table ip firewall {
  chain in {
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
  }
}
"""
NOTHING_GOES_OUT = """
table ip firewall {
  chain out { type filter hook output priority 0; oifname "wan" meta l4proto tcp drop; }
}
"""


@pytest.fixture
def net() -> Iterator[Internet]:
    with internet() as made:
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Swarm]:
    with swarm("doctor", tmp_path) as made:
        yield made


def begin(run: Swarm, net: Internet) -> WorkerProcess:
    """The worker whose invite the doctor gets, on a machine where all is well."""
    return run.start("public", *SMALL, *EVERYWHERE, namespace=net.host("public", "20.0.0.1"))


def doctor(
    run: Swarm, namespace: str, invite: str, env: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Check]]:
    """Exit code and checks by name of `dtrain doctor INVITE` typed on that machine."""
    command = [sys.executable, "-m", "dtrain.trainer.cli", "doctor", invite, "--json", "--quick"]
    # Of this machine's own disk and memory nothing is asked here.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DTRAIN_RUNTIME_DIR": str(run.base / "runtime")}
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *command],
        cwd=run.base,
        env={**variables, **(env or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, {entry["check"]: Check(**entry) for entry in json.loads(done.stdout)}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.status == FAIL]


def test_the_faults_of_a_network_are_told_apart(net: Internet, run: Swarm) -> None:
    """Each planted fault, and it alone, is found on a machine of its own: nothing comes in (a firewall, a router), a
    clock 90 s ahead, nothing goes out, and last the bootstrap peer is dead. Who can only dial others, or is told the
    time by them, may take part: exit code 0 and a warning; the other faults end with 1."""
    public = begin(run, net)
    invite = invite_of(public)

    code, found = doctor(run, net.host("sound", "20.0.0.2"), invite)
    assert (code, failed(found), found["reachability"].status) == (0, [], OK), found
    assert found["clock"].status == OK and "Mbit/s" in found["bandwidth"].detail

    firewalled = net.host("firewalled", "20.0.0.3")
    net.inside(firewalled, "nft", "-f", "-", text=NOTHING_COMES_IN)
    for where in (firewalled, net.home("home", "20.0.1.1", "192.168.1")):
        code, found = doctor(run, where, invite)
        reachability = found["reachability"]
        assert (code, failed(found), reachability.status) == (0, [], WARN), found
        assert re.match("relayed|client", reachability.detail) and "forward" in reachability.fix

    ahead = skew_environment(run.base / "skew", 90.0)
    code, found = doctor(run, net.host("ahead", "20.0.0.4"), invite, ahead)
    assert (code, failed(found), found["clock"].status) == (0, [], WARN), found
    assert re.match(r"(89|90)\.\d s ahead", found["clock"].detail) and "set-ntp" in found["clock"].fix

    silent = net.host("silent", "20.0.0.5")
    net.inside(silent, "nft", "-f", "-", text=NOTHING_GOES_OUT)
    code, found = doctor(run, silent, invite)
    assert (code, failed(found)) == (1, ["bootstrap"]), found
    assert "firewall blocks outgoing TCP" in found["bootstrap"].fix

    public.interrupt()
    assert public.wait() == 0
    code, found = doctor(run, net.host("late", "20.0.0.6"), invite)
    assert (code, failed(found)) == (1, ["bootstrap"]), found
    assert "fresh invite" in found["bootstrap"].fix and "firewall" not in found["bootstrap"].fix
