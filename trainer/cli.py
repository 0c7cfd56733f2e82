"""The `dtrain` command: parses, wires a `dht` exchange into a `trainer` worker, runs. Imports lazily, so that
`dtrain --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "worker": ("dtrain.trainer.cli_worker", "join a run, or begin one, and train"),
    "status": ("dtrain.trainer.cli_control", "what this machine's workers are doing"),
    "pause": ("dtrain.trainer.cli_control", "hand in what is trained, then hold until `dtrain resume`"),
    "resume": ("dtrain.trainer.cli_control", "go on after a pause"),
    "finish": ("dtrain.trainer.cli_control", "leave after the round under way"),
    "stop": ("dtrain.trainer.cli_control", "leave now"),
    "limit": (
        "dtrain.trainer.cli_control",
        "what a worker may take: bandwidth, computing time, hours, traffic",
    ),
    "log": ("dtrain.trainer.cli_control", "what a worker said last"),
    "dashboard": ("dtrain.experiments.dashboard", "watch a run, control this machine, compare experiments"),
    "bench": ("dtrain.experiments.bench", "measure speed and size side by side"),
    "plan": ("dtrain.experiments.plan", "predict bytes, time and memory of a run"),
    "simulate": ("dtrain.experiments.simulate", "compare strategies over a modelled network"),
    "demo": ("dtrain.experiments.demo", "watch a small swarm train on this machine"),
}

DESCRIPTION = """\
Train a language model together with others, over ordinary internet links.

  dtrain demo                                see it work on this machine
  dtrain worker --run-id NAME                begin a run, or join it on this machine
  dtrain worker --run-id NAME --invite TEXT  join a run elsewhere
  dtrain dashboard --run-id NAME             watch it in the browser
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="dtrain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = parsers.add_parser(name, help=text, description=text)
        if name == wanted:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(arguments)

    from dtrain.trainer.errors import DtrainError

    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).run(args))
    except DtrainError as error:
        print(f"dtrain: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
