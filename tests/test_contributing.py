"""CONTRIBUTING.md keeps its word: what it shows works as it stands there."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
from test_worker import assert_one_theta, quick_manifest, swarm_of

from dtrain.trainer.strategies import STRATEGIES

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()


def test_a_strategy_is_one_file_and_one_dict_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategy of "Adding a strategy", taken from the text, trains in a swarm and keeps one theta."""
    section = TEXT.partition("## Adding a strategy\n")[2].partition("\n## ")[0]
    file, entry = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    code = [line for line in file.splitlines() if line.strip()]
    assert len(code) <= 20
    module = types.ModuleType("strategy_heavyball")
    exec(compile(file, "CONTRIBUTING.md", "exec"), module.__dict__)
    for name, strategy in eval("{" + entry + "}", module.__dict__).items():
        monkeypatch.setitem(STRATEGIES, name, strategy)
        manifest = quick_manifest(strategy__name=name, exchange__start_workers=2)
        assert manifest.codec.kind == "dense"
        with swarm_of(manifest, tmp_path) as threads:
            for worker in ("a", "b"):
                threads.start(worker, max_rounds=12)
            threads.join()
            assert_one_theta(threads, 12)
            losses = [e["loss"] for e in threads.events("a", "round")]
            assert losses[-1] < losses[0] - 0.3
            assert threads.workers["a"].strategy.shared_state()["velocity"].any()
