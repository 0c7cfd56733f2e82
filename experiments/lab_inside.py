"""The lab's work, inside its corner of the machine (`lab_enter`): run a scenario, judge it, keep what it left.

python -m dtrain.experiments.lab_inside FILE --out DIR ...      started by `dtrain lab`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from dtrain.experiments import lab, lab_clean
from dtrain.experiments.lab_config import Place
from dtrain.experiments.lab_director import Director, Stuck
from dtrain.experiments.lab_enter import reap, settle_in
from dtrain.experiments.lab_evidence import Evidence
from dtrain.experiments.lab_file import Scenario
from dtrain.experiments.lab_gauges import Gauges
from dtrain.experiments.lab_places import BOOTSTRAP, NamespacePlaces, Places
from dtrain.experiments.lab_plot import plot_timeline
from dtrain.experiments.lab_schedule import schedule
from dtrain.experiments.lab_summary import Figures, held, result_rows, summarize
from dtrain.experiments.lab_swarm import LabSwarm
from dtrain.experiments.lab_table import LabTable
from dtrain.experiments.results import FORMAT, ResultFolder, write_json
from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.errors import DtrainError
from dtrain.trainer.run_file import write_run_file

WIDTH = 100
INTERRUPTED = "interrupted"
BUNDLED = ("*.log", "*.jsonl", "*.json", "*.toml", "*.png")


def main(argv: list[str]) -> int:
    """The exit code: 0 if all bars are kept, 1 if not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser()
    lab.add_arguments(parser)
    args = parser.parse_args(argv)
    settle_in()
    scenario = lab.load(args)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)

    try:
        with signals_interrupt():
            return run_scenario(scenario, args, console, namespaces, reap)
    except KeyboardInterrupt:
        return 130
    except DtrainError as error:
        print(f"dtrain: {error}", file=sys.stderr)
        return error.exit_code


def namespaces(scenario: Scenario) -> Places:
    """Hosts for a scenario's workers, and for its bootstrap peer."""
    places = dict(zip(scenario.names, scenario.places))
    if scenario.lab.bootstrap:
        places[BOOTSTRAP] = Place()
    return NamespacePlaces(places, scenario.lab.seed)


def run_scenario(
    scenario: Scenario,
    args: argparse.Namespace,
    console: Console,
    make_places: Callable[[Scenario], Places],
    bury: Callable[[list[subprocess.Popen[bytes]]], None],
) -> int:
    """The clean baseline, then the scenario; whatever happens, the result folder says what there was."""
    out: Path = args.out
    clean: Figures = {}
    if not args.no_clean and scenario.clean == "simulated":
        console.print("The clean baseline: the same swarm in memory, nothing fails.", highlight=False)
        clean = lab_clean.simulated(scenario, out)
    elif not args.no_clean and scenario.clean == "measured":
        console.print("The clean baseline: the same swarm, nothing fails.", highlight=False)
        clean = play(lab_clean.undisturbed(scenario), out / "clean", console, make_places, bury, {})
    return _finish(play(scenario, out, console, make_places, bury, clean), scenario, args, console)


def play(
    scenario: Scenario,
    out: Path,
    console: Console,
    make_places: Callable[[Scenario], Places],
    bury: Callable[[list[subprocess.Popen[bytes]]], None],
    clean: Figures,
) -> Figures:
    """Run a scenario to whatever end it comes to; its figures."""
    out.mkdir(exist_ok=True)
    (out / "scenario.toml").write_text(scenario.text)
    run_file = out / "run.toml"
    run_file.write_text(write_run_file(scenario.manifest, str(run_file)))
    began, trouble, traffic = time.monotonic(), "", {}
    places = make_places(scenario)
    swarm = LabSwarm(scenario, out, places, run_file)
    table, gauges = LabTable(console, swarm), Gauges(swarm)

    def tick() -> None:
        bury([worker.process for worker in swarm.everybody if worker.process is not None])
        gauges.look()

    director = Director(swarm, places, schedule(scenario), table.tell, table.show, tick)
    console.print(f"{scenario.name}: {scenario.description}", highlight=False, markup=False)
    try:
        with table:
            director.play(out)
    except Stuck as error:
        trouble = str(error)
    except KeyboardInterrupt:
        trouble = INTERRUPTED
    except Exception:  # a bug of ours must leave what the workers wrote, too
        trouble = traceback.format_exc()
    try:
        swarm.stop()
        traffic = places.counts()
        places.close()
        swarm.keep()
    except KeyboardInterrupt:  # whatever still runs ends with our namespace
        trouble = INTERRUPTED
    figures = _judge(scenario, out, director, time.monotonic() - began, clean)
    return {**figures, **gauges.figures(), "traffic": traffic, "trouble": trouble}


def _judge(
    scenario: Scenario, out: Path, director: Director, seconds: float, clean: dict[str, Any]
) -> Figures:
    """The summary's figures; the dashboard's files and the timeline beside them."""
    evidence = Evidence(scenario, out, director.happened)
    began = director.began or time.time()
    figures = summarize(evidence, began=began, seconds=seconds, clean=clean)
    row, lines = result_rows(evidence, figures, began)
    folder = ResultFolder(out)
    folder.create()
    path = folder.run_folder(row["id"]) / "rounds.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.write_row(row["id"], row)
    try:
        plot_timeline(out / "timeline.png", scenario.name, evidence.metrics, figures["events"], lines, began)
    except ModuleNotFoundError:
        print("No timeline: the package matplotlib is not installed: pip install 'dtrain[simulate]'")
    return {
        "format": FORMAT,
        "name": scenario.name,
        "description": scenario.description,
        "finished": True,
        "varied": [],
        "rows": [row],
        **figures,
    }


def _finish(figures: Figures, scenario: Scenario, args: argparse.Namespace, console: Console) -> int:
    out, trouble = args.out, figures["trouble"]
    figures["bars"] = held(figures, scenario.bars)
    failed = [bar for bar in figures["bars"] if not bar["ok"]]
    violations = figures["accounting"]["violations"]
    figures["passed"] = not (failed or violations or trouble)
    figures["replay"] = _replay(figures, out, args)
    write_json(out / "summary.json", figures)
    for name in ("rounds", "failed_rounds", "contributors_mean", "compute_share_mean", "digests_equal"):
        console.print(f"{name:<24} {figures[name]}", highlight=False)
    for name in ("eval_loss", "clean_eval_loss", "round_s_median", "round_time_over_plan", "recovery_s_max"):
        console.print(f"{name:<24} {figures[name]}", highlight=False)
    for name in ("exchange_s", "exchange_time_over_plan"):
        console.print(f"{name:<24} {figures.get(name)}", highlight=False)
    accounting = figures["accounting"]
    told = ", ".join(
        f"{accounting[k]} {k}" for k in ("payloads", "delivered", "returned", "discarded", "unknown")
    )
    console.print(f"{'accounting':<24} {told}", highlight=False)
    for violation in violations[:10]:
        console.print(f"VIOLATION {violation}", style="red", highlight=False, markup=False)
    for bar in figures["bars"]:
        word = "kept" if bar["ok"] else "MISSED"
        console.print(f"bar {bar['bar']:<34} {bar['asked']:g}: {bar['value']}, {word}", highlight=False)
    if trouble:
        console.print(f"TROUBLE {trouble}", style="red", highlight=False, markup=False)
    console.print(f"Results: {out}", highlight=False, soft_wrap=True)
    if figures["passed"]:
        return 0
    console.print(f"Bundle: {_bundle(out)}\nReplay: {figures['replay']}", highlight=False, soft_wrap=True)
    return 130 if trouble == INTERRUPTED else 1


def _replay(figures: Figures, out: Path, args: argparse.Namespace) -> str:
    flags = [f"--seed {figures['seed']}"]
    flags += [
        f"--{name} {getattr(args, name)}" for name in ("rounds", "hours") if getattr(args, name) is not None
    ]
    return f"dtrain lab {out / 'scenario.toml'} {' '.join(flags)}"


def _bundle(out: Path) -> Path:
    """Everything that tells what went wrong, in one file: logs, journals, timeline, settings, summary."""
    path = out / "bundle.tar.gz"
    with tarfile.open(path, "w:gz") as bundle:
        for file in sorted({found for pattern in BUNDLED for found in out.rglob(pattern)}):
            if file.is_file() and "runtime" not in file.parts:
                bundle.add(file, Path(out.name) / file.relative_to(out))
    return path


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # process 1 of its namespace: with it everything in there ends
