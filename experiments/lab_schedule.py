"""What will happen in a scenario, and when: decided by the file and the seed alone, before anything runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dtrain.experiments.lab_config import EventRule
from dtrain.experiments.lab_file import Scenario, worker_name

KILL, LEAVE = "kill", "leave"


@dataclass(frozen=True)
class Planned:
    """One thing that will happen to one worker, or to the swarm."""

    kind: str
    worker: str
    """Its name; "" where it concerns none of them."""
    round: int = 0
    """When so many rounds are done; 0 = at `at_s`."""
    at_s: float = 0.0
    """Seconds after the first round's beginning."""
    seconds: float = 0.0
    """Until it is undone; 0 = never."""
    sides: tuple[tuple[str, ...], ...] = ()


def schedule(scenario: Scenario) -> list[Planned]:
    """Everything that is planned: equal files and seeds give equal schedules."""
    chance = random.Random(f"lab {scenario.name} {scenario.lab.seed}")
    victims = _turns(scenario, chance)
    planned = [one for rule in scenario.events for one in _expand(rule, scenario, victims)]
    return planned + list(_churn(scenario, chance))


def _turns(scenario: Scenario, chance: random.Random) -> Iterator[str]:
    """Workers one after another, in an order of their own each time around, so that each has time to come back."""
    names = [name for name, place in zip(scenario.names, scenario.places) if not place.late]
    last = ""
    while True:
        turn = chance.sample(names, len(names))
        if len(turn) > 2 and turn[0] == last:
            turn.append(turn.pop(0))
        yield from turn
        last = turn[-1]


def _expand(rule: EventRule, scenario: Scenario, victims: Iterator[str]) -> Iterator[Planned]:
    rounds: Sequence[int] = [rule.round]
    if rule.every_rounds:
        rounds = range(rule.round, (rule.until_round or scenario.lab.rounds) + 1, rule.every_rounds)
    at_s = max(0.0, rule.at_s)
    sides = tuple(tuple(map(worker_name, side)) for side in rule.sides)
    for round in rounds:
        if rule.kind in ("partition", "bootstrap-dies"):
            yield Planned(rule.kind, "", round, at_s, rule.seconds, sides)
            continue
        for name in map(worker_name, rule.workers) if rule.workers else [next(victims)]:
            yield Planned(rule.kind, name, round, at_s, rule.seconds)


def _churn(scenario: Scenario, chance: random.Random) -> Iterator[Planned]:
    """Failures of a Poisson process. Who fails is drawn from those that have been back for a while."""
    churn, lab = scenario.churn, scenario.lab
    if not churn.mtbf_s:
        return
    back_at = dict.fromkeys(scenario.names, 0.0)
    now = chance.expovariate(1 / churn.mtbf_s)
    while now < lab.duration_s:
        up = [name for name, since in back_at.items() if since <= now]
        if len(up) > 2:
            name = chance.choice(up)
            down_s = max(1.0, chance.expovariate(1 / max(1.0, churn.down_s)))
            kind = KILL if chance.random() < churn.kill_share else LEAVE
            back_at[name] = now + down_s + churn.back_s
            yield Planned(kind, name, 0, round(now, 3), round(down_s, 3))
        now += chance.expovariate(1 / churn.mtbf_s)
