"""Result folders of `dtrain simulate`: how they are written and read.

One folder holds one sweep, and a sweep is a list of simulated runs (every combination of the config, once per seed):

    summary.json            what the sweep is and one row per finished run, in the config's order
    runs/ID/run.json        that run's row alone; it is written last, so a run is finished when it is there
    runs/ID/rounds.jsonl    one line per round as it ends; an interrupted run has the rounds it got to
    runs/ID/machine.json    what the simulation cost here: wall seconds, memory, versions; no result
    plots/NAME.png, .svg    loss against tokens, against bytes sent per worker, against virtual time

Equal config, seed and software give equal bytes in all files but machine.json and the plots.

summary.json
    format          1
    name            the config's name
    description     one line from the config, may be ""
    finished        whether every run is there
    runs_total      runs in the sweep
    runs_failed     {id: the reason in one line} of runs that could not be finished
    varied          names of the row fields and dotted settings in which the runs differ, for grouping and legends
    rows            a list, one object per finished run:
        id                       folder below runs/, unique in the sweep
        label                    name of the run's variant and of what is varied; runs that differ in the seed share it
        strategy                 strategy.name
        workers                  workers that the run began with
        seed                     train.seed
        profile                  network profile
        overlap                  exchange.overlap
        inner_steps              inner steps per round of a worker (H)
        rounds                   rounds completed
        num_params               parameters of the model
        tokens                   tokens trained by all workers together, in the history of the last theta
        eval_loss                nats per token after the last round
        bytes_up_per_worker      bytes sent, mean over the workers that were there; payloads, aggregates and states
        bytes_down_per_worker    the same received
        payload_bytes            size of a payload, mean over rounds and workers
        bytes_per_param_step     bytes that a worker sent, per parameter and inner step
        ratio_vs_fp32_allreduce  bytes that an fp32 ring all-reduce at each of the same inner steps would have sent,
                                 over bytes sent; null for one worker alone
        virtual_time_s           seconds on the virtual clock from the run's beginning to its last round's end
        compute_share            share of that time that workers spent in inner steps, mean over workers
        contributors_mean        workers whose payload is in a round, mean over rounds
        lost_sections            parts of payloads that came too late and went back into the error feedback
        digest                   hex hash of the last theta
        digests_equal            whether all workers held one theta after every round
        train_loss               mean `loss` of the last tenth of the rounds: over more text than eval_loss; nearly
                                 equal runs differ less in it. It stands in summary.json alone
        settings                 {dotted setting: value} of all that is varied in the sweep
        to_target                only with simulate.target_loss: {loss, tokens, time_s, bytes_up_per_worker} where the
                                 evaluation loss first was that low, on a straight line between two evaluations; null
                                 if it never was. It stands in summary.json alone

runs/ID/rounds.jsonl, one object per line; round 0 is the beginning and has only round, time_s, tokens and eval_loss
    round                   rounds completed
    time_s                  virtual time
    tokens                  as above, so far
    loss                    mean training loss of the round over its workers, weighted by tokens
    eval_loss               as above; null in rounds without an evaluation
    bytes_up_per_worker     as above, so far; bytes_down_per_worker too
    contributors            workers whose payload is in the round
    wait_s, exchange_s      mean seconds from a payload until its group met, and from there to the last aggregate
    compute_share           as above, so far
    lost_sections           as above, in this round
    digest                  hex hash of theta after the round
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.trainer.errors import UsageError

FORMAT = 1
SUMMARY, RUNS, PLOTS = "summary.json", "runs", "plots"

Row = dict[str, Any]


class ResultFolder:
    """One sweep's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder, or go on with the one that is there. UsageError if it cannot be written."""
        try:
            for name in (RUNS, PLOTS):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot write {self.path}: {error.strerror}; type --out with a folder you own"
            ) from None

    def run_folder(self, run_id: str) -> Path:
        """Where one run's files are; made if it is not there."""
        folder = self.path / RUNS / run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def row(self, run_id: str) -> Row | None:
        """A finished run's row, None if the run is not finished."""
        found = read_json(self.path / RUNS / run_id / "run.json")
        return found if isinstance(found, dict) else None

    def rounds(self, run_id: str) -> list[Row]:
        """The rounds that a run has completed, oldest first."""
        return list(read_lines(self.path / RUNS / run_id / "rounds.jsonl"))

    def write_row(self, run_id: str, row: Mapping[str, Any]) -> None:
        """Mark a run as finished."""
        write_json(self.run_folder(run_id) / "run.json", row)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write summary.json, whole or not at all."""
        path = self.path / SUMMARY
        write_json(path, summary)
        return path

    def summary(self) -> Row:
        """What summary.json holds. UsageError if this is no result folder."""
        found = read_json(self.path / SUMMARY)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UsageError(f"{self.path} is no folder that dtrain simulate wrote: it has no {SUMMARY}")
        return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write under another name, then rename: readers see the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What a file holds, None if it is not there or is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_lines(path: Path) -> Iterator[Row]:
    """The whole lines of a JSONL file; a torn last line is passed over, a missing file has none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
