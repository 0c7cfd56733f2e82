"""The simulation files that are shipped can be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.experiments.sim_file import load_sweep
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.model import GPT
from dtrain.trainer.strategies import make_strategy

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "experiments" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_simulation_file_names_what_exists(path: Path) -> None:
    """Each run of each file has a strategy that accepts its settings, and the runs come in whole rounds."""
    for run in load_sweep(path).runs:
        make_strategy(run.manifest, FlatParameters(GPT(run.manifest.model)).shapes)
        assert run.rounds >= 1
