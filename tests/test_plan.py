"""`dtrain plan`: its payloads are the codec's, its times the simulator's, its mistakes one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sim_tools import only_run, simulated, write_file

from dtrain.compression.codec import Codec
from dtrain.experiments.network import MESSAGE_BYTES, WIRE_OVERHEAD, Link, ModelledLinks, arrivals_s
from dtrain.experiments.plan_cost import bytes_per_param, round_cost
from dtrain.experiments.scaled import BYTES, scaled
from dtrain.trainer import cli
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.model import GPT
from dtrain.trainer.strategies import STRATEGIES

COMMAND = ["plan", "--params", "1e9", "--workers", "32", "--up", "20", "--down", "100", "--rtt", "80"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_payloads_are_the_codecs(strategy: str) -> None:
    """The predicted payload of a real model's tensors is what the codec writes for them, within 2 %."""
    manifest = preset_manifest("sizes", "tiny", {"strategy.name": strategy})
    codec = Codec(manifest.codec, FlatParameters(GPT(manifest.model)).shapes)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for _, shape in codec.shapes]
    payload = codec.encode(values, codec.error_feedback(), decay=1.0, run=bytes(8), round=0)
    assert bytes_per_param(manifest) * codec.num_params == pytest.approx(len(payload), rel=0.02)


@pytest.mark.parametrize(
    ("workers", "more"),
    [
        (3, "[network]\nprofile = 'dsl'\n"),
        (6, "[network]\nprofile = 'mobile'\n"),
        (3, "[network]\nprofile = 'dsl'\nup_mbps = 0.5\n[strategy]\nname = 'diloco'\n"),
    ],
)
def test_the_plan_is_what_the_simulator_sees(workers: int, more: str, tmp_path: Path) -> None:
    """Round time, bytes and compute share of a simulated run agree with the prediction within 5 %, the first round
    aside, for which workers come one by one."""
    path = write_file(tmp_path, more, (("workers = 3", f"workers = {workers}"), ("dim = 64", "dim = 128")))
    spec = only_run(path)
    row, lines = simulated(spec)
    (link,) = spec.network.links
    cost = round_cost(spec.manifest, row["num_params"], workers, link, spec.machines.step_time_s)
    ends = {line["round"]: line["time_s"] for line in lines}
    round_s = (ends[row["rounds"]] - ends[1]) / (row["rounds"] - 1)
    assert round_s == pytest.approx(cost.round_s, rel=0.05)
    assert row["bytes_up_per_worker"] / row["rounds"] == pytest.approx(cost.up_bytes, rel=0.05)
    assert row["payload_bytes"] == pytest.approx(cost.payload_bytes, rel=0.05)
    assert row["compute_share"] == pytest.approx(cost.compute_share, rel=0.05)


def test_the_hidden_reduce_nothing() -> None:
    """Those that can be dialled have spans that are longer by that much, and a group forms through a relay."""
    manifest, link = preset_manifest("plan", "tiny"), Link(8, 8, 100)
    all_reduce, few = (round_cost(manifest, 1e8, 8, link, 1.0, num_hidden=hidden) for hidden in (0, 6))
    sections, aggregates = (
        all_reduce.payload_bytes / 8,
        all_reduce.up_bytes / 7 - all_reduce.payload_bytes / 8,
    )
    assert few.up_bytes == pytest.approx(4 * sections + 7 * 4 * aggregates)
    assert few.down_bytes == pytest.approx(7 * 4 * sections + 4 * aggregates)
    longer_s = WIRE_OVERHEAD * 7 * 3 * (sections + aggregates) / 1e6  # 8 Mbit/s, first down, then up
    assert few.exchange_s - all_reduce.exchange_s == pytest.approx(0.1 + longer_s, rel=1e-3)
    assert few.payload_bytes == all_reduce.payload_bytes


def test_a_lost_last_packet_costs_two_round_trips() -> None:
    """As often as the unluckiest of those that go on together is lost, however often in a row; nothing without loss."""
    sent = np.array([[0.0, 1000.0], [1000.0, 0.0]])
    clean, lossy = (arrivals_s([Link(8, 8, 100, loss)] * 2, sent, np.zeros(2)) for loss in (0.0, 0.1))
    wire = (1000 + MESSAGE_BYTES) * WIRE_OVERHEAD
    assert clean[0, 1] == pytest.approx(0.05 + wire / 1e6)
    slower = wire * (0.1 * 0.1**0.5 / (1.22 * 1460) - 1e-6)  # Mathis et al.
    once = 1 - 0.9**2  # one of two packets; again: one of them twice, and so on
    again = sum(1 - (1 - 0.1**times) ** 2 for times in range(2, 9))
    assert lossy[0, 1] - clean[0, 1] == pytest.approx(slower + 0.2 * (once + again), rel=1e-3)
    assert not clean.diagonal().any() and not lossy.diagonal().any()
    meets = []
    for loss in (0.0, 0.1):
        links = ModelledLinks(1000)
        for name in "ab":
            links.add(name, Link(8, 8, 100, loss))
        meets.append(links.meet_s("ab"))
    assert meets[1] - meets[0] == pytest.approx(0.2 * (once + again), rel=1e-3)


def test_the_table_has_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    """Each strategy has its line, and what was given is among the assumptions."""
    assert cli.main([*COMMAND, "--step-time", "1.2"]) == 0
    text = capsys.readouterr().out
    for name in STRATEGIES:
        assert re.search(rf"^ ?{name}\b", text, re.MULTILINE), name
    assert "20 Mbit/s up, 100 down, 80 ms" in text and "1.2 s (given)" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0.400 B"), (99.97, "100 B"), (999.0, "999 B"), (1234.0, "1.23 kB"), (5e15, "5,000 TB")],
)
def test_figures_are_short(value: float, text: str) -> None:
    """Three digits in the largest unit that a figure reaches."""
    assert scaled(value, BYTES) == text


@pytest.mark.parametrize("size", [("1e3", "2"), ("1e6", "4"), ("1e9", "32"), ("1e13", "1024")])
def test_the_table_fits_a_plain_terminal(size: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """80 columns, from the smallest model and swarm to the largest, and nothing is cut off."""
    params, workers = size
    assert cli.main(["plan", "--params", params, "--workers", workers]) == 0
    table = capsys.readouterr().out.partition("Assumptions:")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80 and "…" not in table


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "1"], "--workers must be from 2 to 1024, not 1"),
        (["--hidden", "32"], "--hidden must be from 0 to 31, fewer than --workers, not 32"),
        (["--params", "nan"], "--params must be from 1e3 to 1e13"),
        (["--step-time", "0"], "--step-time must be above 0"),
        (["--up", "-3"], "up_mbps must be a number"),
        (["--profile", "adsl"], "choose one of datacenter"),
        (["--profile", "mixed"], "plan takes all workers to be equal"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Impossible figures: one line, exit code 2."""
    assert cli.main([*COMMAND, *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
