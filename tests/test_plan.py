"""`dtrain plan`: its payloads are the codec's, its times the simulator's, its mistakes one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sim_tools import only_run, simulated, write_file

from dtrain.compression.codec import Codec
from dtrain.experiments.plan_cost import bytes_per_param, round_cost
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
    """Round time, bytes and compute share of a simulated run agree with the prediction within 5 %."""
    path = write_file(tmp_path, more, (("workers = 3", f"workers = {workers}"), ("dim = 64", "dim = 128")))
    spec = only_run(path)
    row, _ = simulated(spec)
    (link,) = spec.network.links
    cost = round_cost(spec.manifest, row["num_params"], workers, link, spec.machines.step_time_s)
    assert row["virtual_time_s"] / row["rounds"] == pytest.approx(cost.round_s, rel=0.05)
    assert row["bytes_up_per_worker"] / row["rounds"] == pytest.approx(cost.up_bytes, rel=0.05)
    assert row["payload_bytes"] == pytest.approx(cost.payload_bytes, rel=0.05)
    assert row["compute_share"] == pytest.approx(cost.compute_share, rel=0.05)


def test_the_table_has_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    """Each strategy has its line, and what was given is among the assumptions."""
    assert cli.main([*COMMAND, "--step-time", "1.2"]) == 0
    text = capsys.readouterr().out
    for name in STRATEGIES:
        assert re.search(rf"│ {name}\b", text), name
    assert "20 Mbit/s up, 100 down, 80 ms" in text and "1.2 s (given)" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "1"], "--workers must be from 2 to 1024, not 1"),
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
