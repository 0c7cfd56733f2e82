"""`dtrain simulate`: virtual swarms over a modelled network, one or a whole sweep, into a folder of results."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.errors import UsageError
from dtrain.trainer.wandb_log import add_flag

if TYPE_CHECKING:
    from dtrain.experiments.results import ResultFolder, Row
    from dtrain.experiments.sim_file import Sweep

INSTALL = "pip install 'dtrain[simulate]'"
DESCRIPTION = """\
Trains virtual swarms in one process each: the real worker loop, strategies and
codec over a modelled network, on a virtual clock. FILE says what is simulated and
what is varied; experiments/configs/ has examples. Equal files give equal results.
Runs that are in the result folder already are not repeated, so the same command
goes on after an interruption.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.epilog = "example: dtrain simulate experiments/configs/quick.toml"
    parser.add_argument("file", type=Path, metavar="FILE", help="the simulation file (TOML)")
    parser.add_argument("--out", type=Path, help="result folder (default: ./dtrain-simulations/NAME)")
    parser.add_argument("--seeds", type=int, metavar="N", help="repeat every run with N seeds")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="runs at a time (default: one per core)"
    )
    add_flag(parser, "every run that is finished")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if every run is finished."""
    for flag, value, least in (("--seeds", args.seeds, 1), ("--jobs", args.jobs, 0)):
        if value is not None and value < least:
            raise UsageError(f"{flag} must be at least {least}, not {value}")
    if importlib.util.find_spec("greenlet") is None:
        raise UsageError(f"dtrain simulate needs the package greenlet, which is not installed: {INSTALL}")
    from dtrain.experiments.results import ResultFolder
    from dtrain.experiments.signals import signals_interrupt
    from dtrain.experiments.sim_file import load_sweep

    sweep = load_sweep(args.file, seeds=args.seeds)
    folder = ResultFolder(args.out or Path("dtrain-simulations") / sweep.name)
    folder.create()
    with signals_interrupt():
        return _simulate(sweep, args, folder)


def _simulate(sweep: Sweep, args: argparse.Namespace, folder: ResultFolder) -> int:
    from rich.console import Console

    from dtrain.experiments.sim_jobs import run_all
    from dtrain.experiments.sim_report import Progress, print_table, summarize
    from dtrain.experiments.sim_wandb import SweepLog

    console = Console(width=None if sys.stdout.isatty() else 110)
    todo = [spec for spec in sweep.runs if folder.row(spec.id) is None]
    failed: dict[str, str] = {}
    seeds = len({spec.seed for spec in sweep.runs})
    log = SweepLog(args.wandb, sweep, folder)
    jobs = args.jobs or min(len(todo), os.cpu_count() or 1)

    def take(event: Row) -> None:
        progress.take(event)
        if "failed" in event:
            failed[event["id"]] = event["failed"]
        log.take(event)
        if "round" not in event:
            folder.write_summary(summarize(sweep, folder, failed))

    try:
        with Progress(sweep, todo, console) as progress:
            run_all(sweep, args.file, seeds, folder, todo, max(1, jobs), take)
    except KeyboardInterrupt:
        folder.write_summary(summarize(sweep, folder, failed))
        console.print("Stopped. The same command goes on with the runs that are missing.")
        raise
    folder.write_summary(summarize(sweep, folder, failed))
    print_table(sweep, folder, failed, console)
    _plot(folder, console)
    return 1 if failed else 0


def _plot(folder: ResultFolder, console: object) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No plots: the package matplotlib is not installed: {INSTALL}")
        return
    from dtrain.experiments.sim_plots import plot_all

    for path in plot_all(folder):
        print(f"Plot: {path}")
