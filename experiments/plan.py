"""`dtrain plan`: what a run would cost each worker, strategy by strategy, before anybody starts it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.experiments.scaled import BYTES, SECONDS, TOKENS, scaled
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dtrain.experiments.network import Link
    from dtrain.experiments.plan_cost import RoundCost
    from dtrain.trainer.manifest import Manifest

DAY_S = 86_400.0
DENSE_KINDS = {"fp16": 16, "fp32": 32, "8-bit": 8}
"""Ways to send every value -> codec.dense_bits."""
FLOPS_PER_PARAM_AND_TOKEN = 6.0
DESCRIPTION = """\
Predicts bytes, time and memory of a round for every strategy, from the network
and cost model that dtrain simulate goes by. Nothing is trained.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.epilog = "example: dtrain plan --params 1e9 --workers 32 --up 20 --down 100 --rtt 80"
    parser.add_argument("--params", type=float, required=True, metavar="N", help="parameters, such as 1e9")
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="workers in a round")
    parser.add_argument(
        "--hidden",
        type=int,
        default=0,
        metavar="N",
        help="of them behind routers that let nobody in, as dtrain doctor tells",
    )
    parser.add_argument(
        "--profile", default="cable", help="connection whose figures stand where none is given"
    )
    parser.add_argument("--up", type=float, metavar="MBPS", help="megabits per second from a worker")
    parser.add_argument("--down", type=float, metavar="MBPS", help="megabits per second to a worker")
    parser.add_argument(
        "--rtt", type=float, metavar="MS", help="round trip between two workers, milliseconds"
    )
    parser.add_argument("--loss", type=float, metavar="SHARE", help="share of packets lost, such as 0.001")
    parser.add_argument("--step-time", type=float, metavar="S", help="seconds per inner step on one worker")
    parser.add_argument(
        "--tflops", type=float, default=40.0, help="a worker's speed, for want of --step-time"
    )
    parser.add_argument("--step-tokens", type=int, metavar="N", help="tokens per inner step of one worker")
    parser.add_argument("--inner-steps", type=int, metavar="H", help="inner steps per round (H)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    from rich.console import Console

    from dtrain.experiments.plan_cost import round_cost

    link, preset = _link(args), _preset(args.params)
    plans = _plans(preset, args.inner_steps)
    tokens = args.step_tokens or plans[0][1].train.batch_size * plans[0][1].train.seq_len
    step_s = args.step_time or FLOPS_PER_PARAM_AND_TOKEN * args.params * tokens / (args.tflops * 1e12)
    costs = [
        (
            label,
            manifest,
            round_cost(manifest, args.params, args.workers, link, step_s, num_hidden=args.hidden),
        )
        for label, manifest in plans
    ]
    console = Console(width=None if sys.stdout.isatty() else 120)
    _print(console, args, costs, tokens)
    for line in _assumptions(args, link, preset, step_s, tokens):
        console.print(line, highlight=False)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.params) and 1e3 <= args.params <= 1e13):
        raise UsageError(f"--params must be from 1e3 to 1e13, such as 1e9, not {args.params:g}")
    if not 2 <= args.workers <= 1024:
        raise UsageError(f"--workers must be from 2 to 1024, not {args.workers}")
    if not 0 <= args.hidden < args.workers:
        raise UsageError(
            f"--hidden must be from 0 to {args.workers - 1}, fewer than --workers, not {args.hidden}"
        )
    for flag in ("step_time", "tflops", "step_tokens", "inner_steps"):
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{flag.replace('_', '-')} must be above 0, not {value}")


def _link(args: argparse.Namespace) -> Link:
    from dtrain.experiments.network import profile_links

    given = {"up_mbps": args.up, "down_mbps": args.down, "rtt_ms": args.rtt, "loss": args.loss}
    links = profile_links(args.profile, {name: value for name, value in given.items() if value is not None})
    if len(links) > 1:
        raise UsageError(f"--profile {args.profile} mixes connections; plan takes all workers to be equal")
    return links[0]


def _preset(params: float) -> str:
    """The preset nearest in size, whose H and codec are taken."""
    from dtrain.trainer.manifest import preset_manifest
    from dtrain.trainer.presets import PRESETS

    def distance(name: str) -> float:
        model = preset_manifest("plan", name).model
        block = 4 * model.dim**2 + 2 * model.dim * model.hidden_dim
        return abs(math.log((model.vocab_size * model.dim + model.num_layers * block) / params))

    return min(PRESETS, key=distance)


def _plans(preset: str, inner_steps: int | None) -> list[tuple[str, Manifest]]:
    """(label, manifest) of every strategy, at its defaults and in the ways that change its bytes or time."""
    from dtrain.trainer.inner import DELTA
    from dtrain.trainer.manifest import preset_manifest
    from dtrain.trainer.strategies import STRATEGIES

    plans = []
    for name, strategy in STRATEGIES.items():
        ways: list[tuple[str, dict[str, object]]] = [(name, {})]
        if strategy.defaults.get("codec.kind") == "dense" and strategy.collects == DELTA:
            ways = [(f"{name} {kind}", {"codec.dense_bits": bits}) for kind, bits in DENSE_KINDS.items()]
        if strategy.collects == DELTA:  # the others exchange every step: there is nothing to overlap with
            label, values = ways[0]
            ways.append((f"{label}, overlap", {**values, "exchange.overlap": "eager"}))
        for label, values in ways:
            several = strategy.defaults.get("train.inner_steps") != 1
            shared = {"strategy.name": name, "train.inner_steps": inner_steps if several else None, **values}
            plans.append((label, preset_manifest("plan", preset, shared)))
    return plans


def _print(
    console: Console,
    args: argparse.Namespace,
    costs: Sequence[tuple[str, Manifest, RoundCost]],
    step_tokens: int,
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"{args.params:,.0f} parameters, {args.workers} workers: each worker, each round",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("strategy", no_wrap=True)
    for name in ("H", "payload", "up", "down", "round", "compute", "tokens\na day", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, manifest, cost in costs:
        tokens_a_day = args.workers * manifest.train.inner_steps * step_tokens * DAY_S / cost.round_s
        table.add_row(
            label,
            str(manifest.train.inner_steps),
            scaled(cost.payload_bytes, BYTES),
            scaled(cost.up_bytes, BYTES),
            scaled(cost.down_bytes, BYTES),
            scaled(cost.round_s, SECONDS),
            f"{100 * cost.compute_share:.1f} %",
            scaled(tokens_a_day, TOKENS),
            scaled(cost.memory_bytes, BYTES),
        )
    console.print(table)


def _assumptions(
    args: argparse.Namespace, link: Link, preset: str, step_s: float, step_tokens: int
) -> list[str]:
    from dtrain.experiments import network

    source = "given" if args.step_time else f"6 FLOP per parameter and token at {args.tflops:g} TFLOP/s"
    return [
        "Assumptions:",
        f"- every worker: {link.up_mbps:g} Mbit/s up, {link.down_mbps:g} down, {link.rtt_ms:g} ms round trip, "
        f"{100 * link.loss:g} % loss",
        f"- an inner step: {step_tokens:,} tokens in {step_s:.3g} s ({source})",
        f"- H and codec of the preset {preset}; payload sizes from the codec itself, on a sample",
        f"- a group forms in {network.MEET_S:g} s + {network.MEET_RTTS:g} round trip; a lost last packet costs "
        f"{network.PROBE_RTTS:g} more",
        f"- {network.MESSAGE_BYTES / 1e3:g} kB besides with each section and aggregate, then "
        f"{100 * (network.WIRE_OVERHEAD - 1):.0f} % more on the wire (not in up and down)",
        f"- {network.CODEC_NS_PER_PARAM:g} ns per parameter for codec, outer step and digest",
        *_of_hidden(args),
        "- tokens a day: of all workers together",
        "- memory: fp32 weights, gradients, optimizer, theta, error feedback, shared state; activations not counted",
    ]


def _of_hidden(args: argparse.Namespace) -> list[str]:
    if not args.hidden:
        return []
    return [
        f"- {args.hidden} of {args.workers} workers cannot be dialled: they reduce nothing and send less; the bytes "
        "are the others', and what two of them say to each other goes through a third"
    ]
