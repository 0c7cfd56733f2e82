"""The `dtrain` command: parses, wires a `dht` exchange into a `trainer` worker, runs. Imports lazily, so that
`dtrain --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence

_CONTROL = "dtrain.trainer.cli_control"

GROUPS = {
    "Take part": {
        "join": ("dtrain.trainer.cli_join", "join a run with the invite that you were given"),
        "worker": ("dtrain.trainer.cli_worker", "begin a run, or join one that is visible here, by its name"),
        "runs": ("dtrain.trainer.cli_runs", "list the runs that are visible here"),
        "doctor": (
            "dtrain.trainer.cli_doctor",
            "check whether this machine can take part, before any download",
        ),
        "dashboard": (
            "dtrain.experiments.dashboard",
            "watch a run, control this machine, compare experiments",
        ),
        "demo": ("dtrain.experiments.demo", "watch a small swarm train on this machine"),
    },
    "Your worker": {
        "status": (_CONTROL, "what this machine's workers are doing"),
        "pause": (_CONTROL, "hand in what is trained, then hold until `dtrain resume`"),
        "resume": (_CONTROL, "go on after a pause"),
        "finish": (_CONTROL, "leave after the round under way"),
        "stop": (_CONTROL, "leave now"),
        "limit": (_CONTROL, "what a worker may take: bandwidth, computing time, hours, traffic"),
        "log": (_CONTROL, "what a worker said last"),
        "credit": ("dtrain.trainer.cli_credit", "what your workers contributed, countersigned; verify FILE"),
        "service": ("dtrain.trainer.cli_service", "have a worker begin at login, and again when it fails"),
    },
    "Use what was trained": {
        "generate": ("dtrain.trainer.cli_generate", "have the model write on from a prompt"),
        "eval": ("dtrain.trainer.cli_eval", "loss, perplexity and bits per byte on text it has not seen"),
        "export": ("dtrain.trainer.cli_export", "write the model for other programs, with a model card"),
    },
    "Organize": {
        "create": ("dtrain.trainer.cli_create", "prepare a run: its settings, your key, an invite"),
        "data": ("dtrain.trainer.cli_data", "look at what a run would train on: samples, tokens, speed"),
        "tokenizer": ("dtrain.trainer.cli_tokenizer", "train a tokenizer, or look at one"),
        "bootstrap": (
            "dtrain.trainer.cli_bootstrap",
            "keep a run reachable, and its newest weights, on a small server",
        ),
        "invite": ("dtrain.trainer.cli_invite", "print an invite to a run that this machine takes part in"),
        "revoke": ("dtrain.trainer.cli_revoke", "take back an invite, or shut out one machine"),
        "bench": ("dtrain.experiments.bench", "measure speed and size side by side"),
        "plan": ("dtrain.experiments.plan", "predict bytes, time and memory of a run"),
        "lab": ("dtrain.experiments.lab", "run real workers on home connections while things fail"),
        "simulate": ("dtrain.experiments.simulate", "compare strategies over a modelled network"),
    },
}
SPINS = "3000"
"""How often GNU OpenMP's threads look for more work before they sleep, 0.2 ms: torch's would spin through the first
20 ms of the codec, which then has one core of two. Training has the same speed (experiments/LOG.md)."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

DESCRIPTION = """\
Train a language model together with others, over ordinary internet links.

  dtrain join INVITE            join a run that you were invited to
  dtrain worker --run-id NAME   begin a run; others on this network join with the same line
  dtrain demo                   see it work on this machine first
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one line on stderr and exit code 2."""
    args = parse(list(sys.argv[1:] if argv is None else argv))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported

    from dtrain.trainer.errors import DtrainError

    try:
        code = int(importlib.import_module(COMMANDS[args.command][0]).run(args))
        sys.stdout.flush()
        return code
    except DtrainError as error:
        print(f"dtrain: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE


def _nobody_reads() -> bool:
    """Whether what reads our output has ended, as `head` does; then the rest of it goes nowhere, without complaint."""
    output = select.poll()
    output.register(sys.stdout, 0)
    ended = bool(output.poll(0))
    if ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ended


def parse(arguments: list[str]) -> argparse.Namespace:
    """A command's flags; only its own module is imported. Ends the process with a line if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="dtrain",
        usage="dtrain COMMAND ...",
        description=DESCRIPTION,
        epilog=_page(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = parsers.add_parser(
            name, prog=f"dtrain {name}", description=text[0].upper() + text[1:] + "."
        )
        if name == wanted:
            importlib.import_module(module).add_arguments(command)
    return parser.parse_args(arguments)


def _page() -> str:
    """All commands, by what they are for."""
    lines = []
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:<10} {text}" for name, (_, text) in commands.items()]
        lines.append("")
    return "\n".join(lines) + "\n`dtrain COMMAND --help` shows a command's flags and an example."


if __name__ == "__main__":
    sys.exit(main())
