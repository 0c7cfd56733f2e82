"""The example in CONTRIBUTING.md works as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

GUIDE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


def test_the_example_averages_what_three_workers_sent() -> None:
    """Run as printed, it sends little and moves the model by a few coefficients, towards the deltas' mean."""
    section = GUIDE.read_text().split("## The codec alone\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(example, str(GUIDE), "exec"), names)
    codec, model = names["codec"], names["model"]
    torch.manual_seed(0)
    before = torch.nn.Linear(512, 1024)
    moved = [a.data - b.data for a, b in zip(before.parameters(), model.parameters(), strict=True)]  # type: ignore[attr-defined]
    assert all(0.01 < float((step != 0).float().mean()) < 0.06 for step in moved[:1])
    assert all(len(payload) * 8 < 0.2 * codec.num_params for payload in names["payloads"])  # type: ignore[attr-defined]
    deltas = names["deltas"]
    for index, step in enumerate(moved):
        mean = sum(delta[index] for delta in deltas) / 3  # type: ignore[attr-defined]
        there = step != 0
        assert float((step[there] * mean[there] > 0).float().mean()) > 0.95
