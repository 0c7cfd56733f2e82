"""`dtrain lab`: real workers on home connections of the lab's own making, while links, machines and processes fail."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.experiments.lab_file import Scenario

INSIDE = "dtrain.experiments.lab_inside"
NO_NAMESPACES = "they need Linux with ip, nft and unshare, as root or where users may have them"
DESCRIPTION = """\
Runs a scenario: every worker is a real `dtrain worker` on a host of its own, with
a connection of a home (rate, round trip, loss, NAT), and the scenario's faults
happen on schedule. Ends with a summary, a timeline, and a proof from the workers'
signed journals that nothing was lost or counted twice. Exit code 0 if every bar of
the scenario is kept. Nothing is left on the machine but the result folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.epilog = "example: dtrain lab experiments/configs/lab/freeze.toml"
    parser.add_argument("file", type=Path, metavar="FILE", help="the scenario (TOML)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="result folder (default: ./dtrain-lab/NAME-1, -2, ...)"
    )
    parser.add_argument("--seed", type=int, help="another seed than the file's")
    parser.add_argument("--rounds", type=int, metavar="N", help="another number of rounds than the file's")
    parser.add_argument("--hours", type=float, help="how long, for scenarios without rounds")
    parser.add_argument(
        "--times",
        type=int,
        default=1,
        metavar="N",
        help="how often, until one fails; results in DIR/1, DIR/2, ...",
    )
    parser.add_argument("--no-clean", action="store_true", help="leave out the clean baseline")
    parser.add_argument(
        "--loopback", action="store_true", help="on loopback through a proxy, where there are no namespaces"
    )
    parser.add_argument("--schedule", action="store_true", help="only print what would happen, and when")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if all bars are kept."""
    scenario = load(args)
    if args.schedule:
        return _print_schedule(scenario)
    out = result_folder(args.out, scenario.name)
    for number in range(1, args.times + 1):
        folder = out / str(number) if args.times > 1 else out
        if number > 1:
            _take_over_baseline(out / "1", folder)
        code = _once(scenario, args, folder)
        if args.times > 1:
            print(f"{scenario.name}, {number} of {args.times}: {'FAILED' if code else 'passed'}", flush=True)
        if code:
            return code
    return 0


def _take_over_baseline(first: Path, folder: Path) -> None:
    """What the simulator came to the first time it would come to again."""
    from dtrain.experiments.lab_file import CLEAN

    if (first / CLEAN).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(first / CLEAN, folder / CLEAN)


def _once(scenario: Scenario, args: argparse.Namespace, out: Path) -> int:
    from dtrain.experiments.lab_enter import run_inside, unshare_command
    from dtrain.experiments.signals import signals_interrupt

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; type --out with a folder you own") from None
    unshare = None if args.loopback else unshare_command()
    if unshare is None:
        return _on_loopback(scenario, args, out)
    arguments = [str(args.file.resolve()), "--out", str(out.resolve()), *_handed_on(args)]
    with signals_interrupt():
        return run_inside(unshare, INSIDE, arguments)


def _on_loopback(scenario: Scenario, args: argparse.Namespace, out: Path) -> int:
    """Without namespaces: in this process, with a line that says what is not modelled."""
    from rich.console import Console

    from dtrain.experiments.lab_inside import run_scenario
    from dtrain.experiments.lab_proxy import ProxyPlaces
    from dtrain.experiments.signals import signals_interrupt

    if scenario.lab.bootstrap:
        raise UsageError(f"{args.file} has a bootstrap peer, which needs network namespaces: {NO_NAMESPACES}")
    if not args.loopback:
        print(f"There are no network namespaces here: {NO_NAMESPACES}.")
    print(f"The lab runs {ProxyPlaces.not_modelled}.", flush=True)
    args.out = out.resolve()
    with signals_interrupt():
        return run_scenario(
            scenario,
            args,
            Console(width=None if sys.stdout.isatty() else 100),
            lambda one: ProxyPlaces(dict(zip(one.names, one.places))),
            lambda own: None,
        )


def load(args: argparse.Namespace) -> Scenario:
    """The scenario as the file and the flags have it."""
    from dtrain.experiments.lab_file import load_scenario

    if args.hours is not None and not 0 < args.hours < 1000:
        raise UsageError(f"--hours must be above 0, not {args.hours:g}")
    if args.times < 1:
        raise UsageError(f"--times must be at least 1, not {args.times}")
    changes: dict[str, float] = {}
    if args.rounds is not None:
        changes["rounds"] = args.rounds
    if args.hours is not None:
        changes.update(duration_s=3600 * args.hours, timeout_s=3600 * args.hours + 1800)
    return load_scenario(args.file, seed=args.seed, changes=changes)


def result_folder(typed: Path | None, name: str) -> Path:
    """Where results go: an empty folder. UsageError if the typed one holds something."""
    if typed is not None:
        if typed.exists() and (not typed.is_dir() or any(typed.iterdir())):
            raise UsageError(f"--out {typed} holds something already: type another folder, or remove it")
        return typed
    number = 1
    while (folder := Path("dtrain-lab") / f"{name}-{number}").exists():
        number += 1
    return folder


def _handed_on(args: argparse.Namespace) -> list[str]:
    flags = []
    for flag in ("seed", "rounds", "hours"):
        if getattr(args, flag) is not None:
            flags += [f"--{flag}", str(getattr(args, flag))]
    return [*flags, *(["--no-clean"] if args.no_clean else [])]


def _print_schedule(scenario: Scenario) -> int:
    from dtrain.experiments.lab_schedule import schedule

    for one in schedule(scenario):
        when = f"after round {one.round}" if one.round else f"at {one.at_s:.1f} s"
        lasts = f", for {one.seconds:g} s" if one.seconds else ""
        sides = " | ".join(" ".join(side) for side in one.sides)
        sys.stdout.write(f"{when:<16} {one.kind:<10} {one.worker or sides}{lasts}\n")
    return 0
