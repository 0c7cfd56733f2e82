"""Planned faults leave nothing behind, and thaw what they froze."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from swarm_tools import eventually

from dtrain.dht.faults import THAW

Sleeper = subprocess.Popen[bytes]


@pytest.fixture
def frozen() -> Iterator[tuple[Sleeper, Sleeper]]:
    """A network process, leader of a group of its own, and its worker; both are stopped."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    network, worker = subprocess.Popen(sleep, start_new_session=True), subprocess.Popen(sleep)
    for process in (network, worker):
        os.kill(process.pid, signal.SIGSTOP)
    yield network, worker
    for process in (network, worker):
        process.kill()
        process.wait()


def thaw(freeze_s: float, network: Sleeper, worker: Sleeper) -> Sleeper:
    return subprocess.Popen([sys.executable, "-c", THAW, str(freeze_s), str(network.pid), str(worker.pid)])


def is_stopped(process: Sleeper) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def test_a_frozen_worker_is_thawed_even_if_its_network_process_is_gone(
    frozen: tuple[Sleeper, Sleeper],
) -> None:
    """Whoever is still there goes on after the freeze."""
    network, worker = frozen
    network.kill()
    network.wait()
    assert thaw(0.3, network, worker).wait(20) == 0
    eventually(lambda: not is_stopped(worker), "it is still frozen", 10.0)


def test_killing_a_frozen_worker_ends_the_freeze(frozen: tuple[Sleeper, Sleeper]) -> None:
    """Its network process wakes up at once, to see that its worker is gone, and nothing lives on to thaw it later."""
    network, worker = frozen
    thawing = thaw(600.0, network, worker)
    worker.kill()
    worker.wait()
    assert thawing.wait(20) == 0
    eventually(lambda: not is_stopped(network), "it is still frozen", 10.0)
