"""Simulated runs in Weights & Biases: one wandb run for each, written when it is finished."""

from __future__ import annotations

from dtrain.experiments.results import ResultFolder, Row
from dtrain.experiments.sim_file import Sweep
from dtrain.trainer.wandb_log import WandbRun, resolve_mode


class SweepLog:
    """`take` gets the events of `sim_jobs.Report`. UsageError at the beginning if the mode cannot be had."""

    def __init__(self, mode: str, sweep: Sweep, folder: ResultFolder):
        self._mode, self._folder, self._name = resolve_mode(mode), folder, sweep.name
        self._specs = {spec.id: spec for spec in sweep.runs}

    def take(self, event: Row) -> None:
        """Log a run that has just been finished: its rounds as rows, its settings as the config."""
        if self._mode == "disabled" or "done" not in event:
            return
        spec, row = self._specs[event["id"]], self._folder.row(event["id"])
        assert row is not None
        config = {**spec.manifest.to_dict(), "simulated": {k: v for k, v in row.items() if k != "settings"}}
        with WandbRun(self._mode, f"{spec.label}, seed {spec.seed}", self._name, config) as run:
            for line in self._folder.rounds(spec.id):
                run.log(line)
