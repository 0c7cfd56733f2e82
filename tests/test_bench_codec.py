"""`dtrain bench codec` measures what it says, on few parameters here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from dtrain.compression.spec import CodecSpec
from dtrain.experiments import bench_codec_data, bench_codec_memory
from dtrain.trainer.cli import main

FEW = ["bench", "codec", "--params", "1e6", "--k", "64", "--repetitions", "1"]


def test_every_kernel_is_measured_on_random_and_on_real_deltas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row per data and kernel, with times, sizes and floors; the table and the peak are printed."""
    delta = [torch.randn(128, 192, generator=torch.Generator().manual_seed(0)) ** 3]
    monkeypatch.setattr(
        bench_codec_data, "real", lambda rounds, spec, batch_size: ([("t", (128, 192))], [delta], [2.0, 1.0])
    )
    path = tmp_path / "figures.json"
    assert main([*FEW, "--transform", "none", "--rounds", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = {(row["data"], row["kernel"]): row for row in report["rows"]}
    assert set(rows) == set(itertools.product(["uniform", "real"], ["floor", "numba", "reference"]))
    for row in rows.values():
        assert (row["transform"], row["k"], row["value_bits"], row["threads"]) == ("none", 64, 2, 1)
        assert row["encode_ns_per_param"] > 0 and row["decode8_ns_per_param"] > 0
    uniform = rows["uniform", "numba"]
    assert (
        9 < uniform["bits_per_coefficient"] < 10.1
        and abs(uniform["floor_bits_per_coefficient"] - 9.86) < 0.01
    )
    assert "torch" in report["machine"] and "peak_memory_ratio" in report
    assert "decode 8" in capsys.readouterr().out


def test_what_threads_gain_is_shown_beside_what_the_machine_could_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several numbers of threads, the gain of each and the gain of a plain loop on the same cores."""
    path = tmp_path / "figures.json"
    flags = ["--transform", "none", "--rounds", "0", "--threads", "1,2", "--json", str(path)]
    assert main([*FEW, *flags]) == 0
    gains = json.loads(path.read_text())["thread_gains_of_the_machine"]["2"]
    assert 0 < gains["arithmetic"] < 4 and 0 < gains["memory"] < 4
    printed = " ".join(capsys.readouterr().out.split())
    one, two = [row for row in json.loads(path.read_text())["rows"] if row["kernel"] == "numba"]
    assert one["encode_gain"] == one["decode8_gain"] == 1.0
    assert f"2 threads encode {two['encode_gain']:.2f}×, decode {two['decode8_gain']:.2f}×" in printed
    assert "This machine's own gain with 2 threads" in printed


def test_real_deltas_come_from_a_training() -> None:
    """Two rounds of the tiny model: every parameter has a delta, and the loss falls."""
    shapes, deltas, losses = bench_codec_data.real(2, CodecSpec(k=64), batch_size=1)
    assert [tuple(tensor.shape) for tensor in deltas[-1]] == [shape for _, shape in shapes]
    assert len(deltas) == 2 and losses[1] < losses[0] < 5.6  # nats per byte; ln 256 = 5.55 at the start
    assert all(bool(tensor.any()) for tensor in deltas[0])


def test_memory_is_the_error_feedback_and_little_more() -> None:
    """Feedback, encode and decode take at most 1.1 times the parameters' fp32 bytes."""
    shapes = [("matrix", (4096, 4096))]
    ratio = bench_codec_memory.peak_ratio(CodecSpec(k=64), shapes, [[torch.ones(4096, 4096)]])
    if ratio is None:
        pytest.skip("this system does not count a process's peak")
    assert 0.9 < ratio < 1.1


def test_misuse_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown transform is refused with the choices, before anything is measured."""
    assert main([*FEW, "--transform", "fft"]) == 2
    assert "choose from none, dct" in capsys.readouterr().err
