"""`--up`, `--down` and the count of traffic, measured where they matter: on the wire. `make nat-test`, as root."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from swarm_tools import swarm
from test_nat import invite_of

from dtrain.experiments.netns import internet, missing, run

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
RUN = """
[model]
preset = "tiny"
[train]
inner_steps = 1
batch_size = 2
[strategy]
name = "diloco"
[codec]
dense_bits = 8
[exchange]
start_workers = 2
"""  # a payload of 0.9 MB, and hardly any training: all of the line is wanted
EVERYWHERE = ("--host", "0.0.0.0", "--no-lan", "--eval-every", "0")
WINDOW_S, WATCHED_S = 10.0, 45.0
MEGABIT = 1e6


def on_the_wire(namespace: str) -> tuple[int, int]:
    """Bytes (sent, received) by that host so far, all headers of the wire included."""
    stats = json.loads(run("ip", "-n", namespace, "-s", "-j", "link", "show", "wan"))[0]["stats64"]
    return stats["tx"]["bytes"], stats["rx"]["bytes"]


def fastest(samples: list[tuple[float, int]]) -> float:
    """Megabit per second of the busiest WINDOW_S."""
    rates = [0.0]
    for began, before in samples:
        later = [(at, count) for at, count in samples if at - began >= WINDOW_S]
        if later:
            rates.append((later[0][1] - before) * 8 / MEGABIT / (later[0][0] - began))
    return max(rates)


def watch(namespace: str) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """(moment, bytes sent), (moment, bytes received), several times a second."""
    sent, received, until = [], [], time.monotonic() + WATCHED_S
    while (now := time.monotonic()) < until:
        up, down = on_the_wire(namespace)
        sent.append((now, up))
        received.append((now, down))
        time.sleep(0.5)
    return sent, received


def test_a_limit_holds_on_the_wire(tmp_path: Path) -> None:
    """A worker of `--up 1mbit --down 2mbit` sends under 1.1 Mbit/s and receives under 2.2 in any ten seconds, headers
    and encryption included, though it could use much more, and it takes part in rounds all the same. What it counts for
    `--daily` and `--monthly` is what went over the wire, within a tenth."""
    config = tmp_path / "run.toml"
    config.write_text(RUN)
    with internet() as net, swarm("limits", tmp_path) as swarm_:
        limited, free = net.host("limited", "20.0.0.1"), net.host("free", "20.0.0.2")
        flags = (*EVERYWHERE, "--port", "31000", "--config", str(config), "--up", "1mbit", "--down", "2mbit")
        first = swarm_.start("limited", *flags, namespace=limited)
        address = first.wait_for("start")
        other = swarm_.start("free", *EVERYWHERE, "--invite", invite_of(first), namespace=free)
        other.wait_for("joined")
        sent, received = watch(limited)
        up, down = fastest(sent), fastest(received)
        print(f"up {up:.2f} Mbit/s, down {down:.2f} Mbit/s, {(sent[-1][1] - sent[0][1]) / 1e6:.1f} MB sent")
        assert address["reach"] == "direct"
        assert up < 1.1 and down < 2.2
        assert sent[-1][1] - sent[0][1] > 1e6  # else nothing was limited
        assert any(len(event["contributors"]) == 2 for event in first.events("round"))
        first.interrupt()
        assert first.wait() == 0
        taken = sum(on_the_wire(limited))
        counted = sum(json.loads((first.folder / "traffic.json").read_text()).values())
        print(f"{counted / 1e6:.2f} MB counted, {taken / 1e6:.2f} MB on the wire: {counted / taken:.3f}")
        assert 0.9 < counted / taken < 1.1
