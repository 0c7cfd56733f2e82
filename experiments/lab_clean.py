"""The clean baseline of a scenario: what the same swarm reaches where nothing fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dtrain.experiments.lab_config import ChurnConfig as LabChurn
from dtrain.experiments.lab_config import Place
from dtrain.experiments.lab_file import CLEAN, Scenario
from dtrain.experiments.results import write_json
from dtrain.experiments.sim_config import ChurnConfig, MachinesConfig, NetworkConfig, SimulateConfig
from dtrain.experiments.sim_file import RunSpec
from dtrain.experiments.sim_swarm import simulate
from dtrain.trainer.data import open_corpus


def undisturbed(scenario: Scenario) -> Scenario:
    """The same swarm on clean connections, without events."""
    places = tuple(Place(scenario.clean_link) for _ in scenario.places)
    return replace(scenario, places=places, events=(), churn=LabChurn(), bars={}, clean="none")


def simulated(scenario: Scenario, out: Path) -> dict[str, Any]:
    """The same workers, rounds and seed through the simulator: the same loop, strategy and codec. Its row, which is in
    clean.json too; taken from there if it is there already, as it would be the same again."""
    path = out / CLEAN
    if not path.exists():
        write_json(path, _simulate(scenario))
    return {"eval_loss": json.loads(path.read_text())["eval_loss"]}


def _simulate(scenario: Scenario) -> dict[str, Any]:
    train, lab = scenario.manifest.train, scenario.lab
    steps = lab.rounds * train.inner_steps
    spec = RunSpec(
        label="clean",
        manifest=scenario.manifest,
        simulate=SimulateConfig(workers=lab.workers, steps=steps, eval_every_steps=steps),
        network=NetworkConfig(profile="datacenter"),
        machines=MachinesConfig(step_time_s=train.batch_size * train.seq_len / (lab.tokens_per_s or 1e4)),
        churn=ChurnConfig(),
    )
    torch.set_num_threads(1)
    return simulate(spec, open_corpus(scenario.manifest.data, None), lambda _: None)
