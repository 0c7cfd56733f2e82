"""Small simulations for tests."""

from __future__ import annotations

from pathlib import Path

from dtrain.experiments.results import Row
from dtrain.experiments.sim_file import RunSpec, load_sweep
from dtrain.experiments.sim_swarm import simulate
from dtrain.trainer.data import Corpus, open_corpus

TINY = """
name = "tiny"
[simulate]
workers = 3
steps = 12
eval_every_steps = 6
[model]
dim = 64
num_layers = 1
num_heads = 2
hidden_dim = 64
[train]
batch_size = 2
seq_len = 32
inner_steps = 3
[data]
eval_tokens = 512
"""


def write_file(folder: Path, more: str = "", replaced: tuple[tuple[str, str], ...] = ()) -> Path:
    """A simulation file: the tiny one with parts replaced and more after it."""
    text = TINY
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    path = folder / "sim.toml"
    path.write_text(text + more)
    return path


def only_run(path: Path) -> RunSpec:
    """The one run of a simulation file."""
    (spec,) = load_sweep(path).runs
    return spec


def corpus_of(spec: RunSpec) -> Corpus:
    """What a run trains on."""
    return open_corpus(spec.manifest.data, None)


def simulated(spec: RunSpec) -> tuple[Row, list[Row]]:
    """A run's row and its rounds."""
    rounds: list[Row] = []
    return simulate(spec, corpus_of(spec), rounds.append), rounds
