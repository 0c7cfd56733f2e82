"""Laws of the lab's wire: rates, delays, losses and cuts are as asked, for made-up and for real packets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dtrain.experiments.lab_switch import Switch
from dtrain.experiments.lab_wire import QUEUE_S, HomeLink, Wire
from dtrain.experiments.netns import Internet, missing

HOME = HomeLink(up_mbps=5, down_mbps=20, rtt_ms=100)


def wire_of(**links: HomeLink) -> Wire:
    wire = Wire(seed=1)
    for name, link in links.items():
        wire.add(name, link)
    return wire


def stream(wire: Wire, source: str, target: str, packets: int, size: int = 1250) -> list[float]:
    """When packets that are sent as fast as the uplink takes them are there."""
    now, there = 0.0, []
    for _ in range(packets):
        arrival = wire.send(now, source, target, size)
        if arrival is not None and (at := wire.receive(arrival, target, size)) is not None:
            there.append(at)
        now += size * 8 / 5e6
    return there


def test_the_narrower_line_sets_the_rate() -> None:
    """5 Mbit/s up into 20 down are 5; into 2 down are 2, and what does not fit is dropped."""
    fast = stream(wire_of(a=HOME, b=HOME), "a", "b", 1000)
    assert len(fast) == 1000
    assert 1000 * 1250 * 8 / (fast[-1] - 0.05) == pytest.approx(5e6, rel=0.01)
    slow = stream(wire_of(a=HOME, b=HomeLink(down_mbps=2, rtt_ms=100)), "a", "b", 1000)
    rate = len(slow) * 1250 * 8 / (slow[-1] - 0.05)
    assert rate == pytest.approx(2e6, rel=0.01) and len(slow) < 600


def test_a_round_trip_is_the_mean_of_both_lines() -> None:
    """100 ms and 300 ms make 200 ms, both ways together; the queue adds no more than it may."""
    wire = wire_of(a=HomeLink(rtt_ms=100), b=HomeLink(rtt_ms=300))
    there = wire.send(0.0, "a", "b", 100)
    assert there is not None and wire.send(there, "b", "a", 100) == pytest.approx(0.2)
    full = wire_of(a=HOME, b=HOME)
    arrivals = [full.send(0.0, "a", "b", 1250) for _ in range(1000)]
    queued = [at for at in arrivals if at is not None]
    assert max(queued) < 0.05 + QUEUE_S + 0.01 and None in arrivals
    assert full.counts()["a"]["overflowed"] == arrivals.count(None)


def test_losses_are_as_many_as_asked_for_and_the_same_each_time() -> None:
    """1 % of the packets, by a seed; jitter lets none overtake another."""
    lossy = HomeLink(rtt_ms=100, loss=0.01, jitter_ms=30)
    wires = [wire_of(a=lossy, b=lossy) for _ in range(2)]
    runs = [[wire.send(n / 1000, "a", "b", 100) for n in range(20_000)] for wire in wires]
    assert runs[0] == runs[1]
    assert 0.008 < runs[0].count(None) / 20_000 < 0.012
    there = [at for at in runs[0] if at is not None]
    assert there == sorted(there)
    spread = [at - n / 1000 for n, at in enumerate(runs[0]) if at is not None]
    assert min(spread) >= 0.05 and 0.07 < max(spread) < 0.09


def test_cuts_and_partitions() -> None:
    """A cut host reaches nobody and nobody it; sides of a partition do not reach each other; both heal."""
    wire = wire_of(a=HOME, b=HOME, c=HOME)

    def reaches(one: str, other: str) -> bool:
        return wire.send(0.0, one, other, 10) is not None

    wire.cut("a", True)
    assert not reaches("a", "b") and not reaches("b", "a") and reaches("b", "c")
    wire.cut("a", False)
    wire.partition([["a", "b"], ["c"]])
    assert reaches("a", "b") and not reaches("a", "c") and not reaches("c", "b")
    wire.partition([])
    assert reaches("c", "a")


RECEIVE = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection, _ = server.accept()
begin, count = time.monotonic(), 0
while blob := connection.recv(65536):
    count += len(blob)
print(count * 8 / (time.monotonic() - begin) / 1e6, flush=True)
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000))
connection.sendall(bytes(1_000_000))
"""


@pytest.fixture
def net() -> Iterator[tuple[Internet, Switch]]:
    if missing():
        pytest.skip(missing())
    with Switch(seed=1) as switch:
        made = Internet(f"dtrainw{os.getpid()}", switch)
        try:
            yield made, switch
        finally:
            made.close()


def ping(net: Internet, namespace: str, address: str, count: int = 5) -> tuple[int, float]:
    """(answers, shortest round trip in ms)."""
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", PING, address, str(count)]
    answers, least = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(answers), float(least)


PING = """
import socket, sys, time
times = []
for n in range(int(sys.argv[2])):
    with socket.socket() as probe:
        probe.settimeout(0.4)
        begin = time.monotonic()
        try:
            probe.connect((sys.argv[1], 9))  # refused at once, after one round trip
        except ConnectionRefusedError:
            times.append(time.monotonic() - begin)
        except OSError:
            pass
print(len(times), 1000 * min(times, default=0))
"""


def test_real_packets_fare_as_asked(net: tuple[Internet, Switch]) -> None:
    """Between two namespaces: the round trip, the rate of a TCP connection, a cut cable, a changed line, a home behind
    a masquerading router."""
    internet, switch = net
    one = internet.host("one", "20.0.0.1", HOME)
    other = internet.host("other", "20.0.0.2", HOME)
    home = internet.home("home", "20.0.1.1", "192.168.1", HOME)
    answers, least_ms = ping(internet, one, "20.0.0.2")
    assert answers == 5 and 98 < least_ms < 125
    answers, least_ms = ping(internet, home, "20.0.0.2", 2)
    assert answers == 2 and 98 < least_ms < 125
    assert ping(internet, one, "192.168.1.2", 1)[0] == 0

    inside = ["ip", "netns", "exec"]
    receiver = subprocess.Popen(
        [*inside, other, sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout is not None and receiver.stdout.readline() == "ready\n"
        subprocess.run([*inside, one, sys.executable, "-c", SEND, "20.0.0.2"], check=True, timeout=60)
        rate = float(receiver.communicate(timeout=60)[0])
    finally:
        receiver.kill()
        receiver.wait()
    assert 1.0 < rate < 5.1
    assert switch.counts()["one"]["up_bytes"] > 1_000_000

    switch.cut("other", True)
    assert ping(internet, one, "20.0.0.2", 1)[0] == 0
    switch.cut("other", False)
    switch.change("other", HomeLink())
    answers, least_ms = ping(internet, one, "20.0.0.2", 3)
    assert answers == 3 and 48 < least_ms < 75


def test_nothing_is_left(net: tuple[Internet, Switch]) -> None:
    """With the switch go its devices, with the internet its namespaces."""
    internet, switch = net
    internet.host("one", "20.0.0.1")
    internet.close()
    switch.close()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not re.search(rf"^{internet.prefix}-", listed, re.MULTILINE)
