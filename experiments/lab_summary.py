"""What a scenario came to: figures from the workers' own metrics and journals, held against the scenario's bars."""

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from dtrain.experiments.lab_director import Happened
from dtrain.experiments.lab_evidence import HEAL_S, Evidence, Round
from dtrain.experiments.lab_file import Scenario
from dtrain.experiments.network import Link
from dtrain.experiments.plan_cost import round_cost

Figures = dict[str, Any]


def summarize(evidence: Evidence, *, began: float, seconds: float, clean: Mapping[str, Any]) -> Figures:
    """The scenario's figures; see the README of the lab's configs for what each means."""
    scenario, rounds = evidence.scenario, evidence.rounds
    events = [with_recovery(one, evidence, began) for one in evidence.happened]
    recoveries = [event["recovery_s"] for event in events if event["recovery_s"] is not None]
    lags = [event["recovery_rounds"] for event in events if event["recovery_rounds"] is not None]
    round_s = _round_s(rounds)
    loss, clean_loss = _eval_loss(evidence), clean.get("eval_loss")
    failed = evidence.failed_rounds()
    figures: Figures = {
        "scenario": scenario.name,
        "seed": scenario.lab.seed,
        "workers": scenario.lab.workers,
        "rounds": len(rounds),
        "failed_rounds": len(failed),
        "failed": failed,
        "contributors_mean": round(statistics.fmean(one.contributors for one in rounds), 3)
        if rounds
        else 0.0,
        "compute_share_mean": _compute_share(evidence),
        "digests_equal": _digests_equal(evidence),
        "eval_loss": loss,
        "clean_eval_loss": clean_loss,
        "loss_over_clean": round(loss / clean_loss, 4) if loss and clean_loss else None,
        "round_s_median": round_s,
        "clean_round_s_median": clean.get("round_s_median"),
        "round_time_over_clean": _ratio(round_s, clean.get("round_s_median")),
        "recovery_s_max": max(recoveries, default=None),
        "recovery_rounds_max": max(lags, default=None),
        "rounds_to_contribute_max": _rounds_to_contribute(evidence),
        "discarded_rounds": evidence.report.discarded_rounds,
        "unrecovered": sum(event["recovery_s"] is None for event in events if event["recovers"]),
        "violations": len(evidence.report.violations),
        "accounting": vars(evidence.report),
        "events": events,
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}",
        **_plan(scenario, evidence, round_s),
    }
    return figures


def held(figures: Figures, bars: Mapping[str, float]) -> list[Figures]:
    """Each bar with the figure and whether it is kept. A figure that is not there keeps no bar."""
    results = []
    for key, bar in bars.items():
        name, _, way = key.rpartition("_at_")
        value = figures.get(name)
        ok = value is not None and (value <= bar if way == "most" else value >= bar)
        results.append({"bar": key, "asked": bar, "value": value, "ok": bool(ok)})
    return results


def _round_s(rounds: Sequence[Round]) -> float | None:
    """Median seconds from one round's end to the next one's; the first two are left out, in which all warm up."""
    ends = [one.at for one in rounds[2:]]
    spans = [after - before for before, after in itertools.pairwise(ends)]
    return round(statistics.median(spans), 3) if spans else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return round(value / other, 4) if value and other else None


def _compute_share(evidence: Evidence) -> float | None:
    """Mean over the workers of the share that each knew of itself after its last round."""
    last = [
        rounds[-1]["compute_share"]
        for name in evidence.scenario.names
        if (rounds := evidence.of(name, "round"))
    ]
    return round(statistics.fmean(last), 4) if last else None


def _digests_equal(evidence: Evidence) -> bool:
    """In every round of the history, and of all that went to its end."""
    law = {violation.partition(":")[0] for violation in evidence.report.violations}
    last = [stops[-1] for name in evidence.scenario.names if (stops := evidence.of(name, "stop"))]
    rounds = max((stop["round"] for stop in last), default=0)
    return not law & {"agreed", "one"} and len({s["digest"] for s in last if s["round"] == rounds}) == 1


def _eval_loss(evidence: Evidence) -> float | None:
    """Of the newest theta that anybody has evaluated."""
    found = [event for name in evidence.scenario.names for event in evidence.of(name, "eval")]
    known = [event for event in found if event["eval_loss"] is not None and event["round"]]
    newest = max(known, key=lambda event: event["round"], default=None)
    return None if newest is None else float(newest["eval_loss"])


def _rounds_to_contribute(evidence: Evidence) -> int | None:
    """The most rounds from a worker's coming in (its theta is that of the others) to the first round with it."""
    lags = []
    for name in evidence.scenario.names:
        rounds = evidence.of(name, "round")
        for joined in evidence.of(name, "joined"):
            mine = [e for e in rounds if e["own_included"] and e["time"] > joined["time"]]
            if mine:
                lags.append(mine[0]["round"] - joined["round"])
    return max(lags, default=None)


def with_recovery(one: Happened, evidence: Evidence, began: float) -> Figures:
    """The event, and how long until its worker was in a round again (or until the swarm completed one)."""
    since = one.undone_at if one.undone_at is not None else one.at
    name = one.planned.worker
    comes_back = one.undone_at is not None or one.planned.kind in ("join", "move")
    recovery: float | None = None
    lag: int | None = None
    if name and comes_back:
        # Who thaws first says how the round ended that it was in.
        done = max((number.number for number in evidence.rounds if number.at <= since), default=0)
        mine = [event for event in evidence.of(name, "round") if event["own_included"]]
        back = next((event for event in mine if event["time"] > since and event["round"] > done), None)
        if back is not None:
            recovery, lag = back["time"] - since, back["round"] - done
    else:
        wanted = evidence.scenario.lab.workers if one.planned.kind == "partition" else 1
        after = [r for r in evidence.rounds if r.at > since and r.contributors >= wanted]
        recovery = after[0].at - since if after else None
    last = max((number.at for number in evidence.rounds), default=0.0)
    return {
        **one.to_dict(began),
        "recovers": last - since > HEAL_S or recovery is not None,
        "recovery_s": None if recovery is None else round(recovery, 2),
        "recovery_rounds": lag,
    }


def _plan(scenario: Scenario, evidence: Evidence, round_s: float | None) -> Figures:
    """What `dtrain plan`'s model says of a round, by the slowest connection, against what was measured."""
    train, rate = scenario.manifest.train, scenario.lab.tokens_per_s
    params = scenario.manifest.model.num_params
    if not rate:
        return {"plan_round_s": None, "round_time_over_plan": None}
    links = [place.link for place in scenario.places]
    slowest = min(links, key=lambda link: (link.up_mbps or 1e6, -link.rtt_ms))
    link = Link(
        slowest.up_mbps or 1e4,
        slowest.down_mbps or 1e4,
        max(one.rtt_ms for one in links),
        max(one.loss for one in links),
    )
    workers, step_s = scenario.lab.workers, train.batch_size * train.seq_len / rate
    hidden = min(sum(place.nat for place in scenario.places), workers - 1)
    cost = round_cost(scenario.manifest, params, workers, link, step_s, num_hidden=hidden)
    exchange_s = _exchange_s(evidence.rounds)
    return {
        "plan_round_s": round(cost.round_s, 3),
        "plan_exchange_s": round(cost.exchange_s, 3),
        "round_time_over_plan": _ratio(round_s, cost.round_s),
        "exchange_s": exchange_s,
        "exchange_time_over_plan": _ratio(exchange_s, cost.exchange_s),
    }


def _exchange_s(rounds: Sequence[Round]) -> float | None:
    """Median seconds from when the last member was ready until the last aggregate was there; the first two rounds are
    left out. Waiting for others is not in it: `dtrain plan` takes all to be equal."""
    spans = [one.meet_s + one.exchange_s for one in rounds[2:]]
    return round(statistics.median(spans), 3) if spans else None


def result_rows(evidence: Evidence, figures: Figures, began: float) -> tuple[Figures, list[Figures]]:
    """The scenario as a run of the dashboard's Experiments page: its row and its rounds (see `results`)."""
    manifest, rounds = evidence.scenario.manifest, evidence.rounds
    losses = {
        event["round"]: event["eval_loss"]
        for name in evidence.scenario.names
        for event in evidence.of(name, "eval")
    }
    lines = [
        {
            **asdict(one),
            "round": one.number,
            "time_s": round(one.at - began, 3),
            "eval_loss": losses.get(one.number),
            "bytes_up_per_worker": one.bytes_up,
        }
        for one in rounds
    ]
    row = {
        "id": f"seed-{figures['seed']}",
        "label": figures["scenario"],
        "strategy": manifest.strategy.name,
        "workers": figures["workers"],
        "seed": figures["seed"],
        "profile": "lab",
        "overlap": manifest.exchange.overlap,
        "inner_steps": manifest.train.inner_steps,
        "rounds": len(rounds),
        "num_params": manifest.model.num_params,
        "tokens": rounds[-1].tokens if rounds else 0,
        "eval_loss": figures["eval_loss"],
        "bytes_up_per_worker": rounds[-1].bytes_up if rounds else 0,
        "virtual_time_s": round(rounds[-1].at - began, 3) if rounds else 0,
        "compute_share": figures["compute_share_mean"],
        "contributors_mean": figures["contributors_mean"],
        "digests_equal": figures["digests_equal"],
        "settings": {},
    }
    return row, lines
