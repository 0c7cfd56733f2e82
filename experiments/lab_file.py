"""Scenario files of `dtrain lab`: the swarm, its connections, what happens to it, and the bars that it is held to.

A file is TOML. [model], [data], [train], [strategy], [codec] and [exchange] are a run's own settings, as in a run file;
the rest is described in `lab_config`. experiments/configs/lab/ has the scenarios that are shipped.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dtrain.experiments.lab_config import (
    CLEANS,
    FIGURES,
    KINDS,
    ChurnConfig,
    EventRule,
    LabConfig,
    Place,
)
from dtrain.experiments.lab_wire import HomeLink
from dtrain.trainer.config import require
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import SECTIONS, Manifest, preset_manifest, refuse_unknown, validate_run_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLEAN = "clean.json"  # the simulated baseline, in the result folder


@dataclass(frozen=True)
class Scenario:
    """A whole file."""

    name: str
    description: str
    lab: LabConfig
    churn: ChurnConfig
    places: tuple[Place, ...]
    """By worker; the first is worker-1's."""
    events: tuple[EventRule, ...]
    bars: Mapping[str, float]
    """Figure of the summary and "_at_most" or "_at_least" -> number."""
    clean: str
    """How the clean baseline is had: "simulated" (in memory, without network), "measured" (the same swarm without
    events over `clean_link`), or "none", as by default without rounds, which the simulator counts in."""
    clean_link: HomeLink
    manifest: Manifest
    text: str = field(repr=False)
    """The file's own text."""

    @property
    def names(self) -> list[str]:
        return [worker_name(number) for number in range(1, self.lab.workers + 1)]


def worker_name(number: int) -> str:
    return f"worker-{number}"


def load_scenario(
    path: Path, *, seed: int | None = None, changes: Mapping[str, float] | None = None
) -> Scenario:
    """Read a file. `seed` and `changes` (fields of [lab]) win over it. UsageError names what is wrong in it."""
    try:
        text = path.read_text()
        tree = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}") from None
    lab = tree.setdefault("lab", {})
    if isinstance(lab, dict):
        lab.update(
            {key: value for key, value in {"seed": seed, **(changes or {})}.items() if value is not None}
        )
    try:
        return _scenario(tree, path.stem, text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _scenario(tree: dict[str, Any], stem: str, text: str) -> Scenario:
    own = ("name", "description", "lab", "churn", "link", "places", "events", "bars", "clean")
    refuse_unknown(tree, [*own, *SECTIONS], prefix="")
    name = validate_run_id(str(tree.get("name", stem)))
    lab = LabConfig(**_known(tree.get("lab", {}), LabConfig, "lab"))
    churn = ChurnConfig(**_known(tree.get("churn", {}), ChurnConfig, "churn"))
    link = _link(tree.get("link", {}), "link")
    clean = dict(tree.get("clean", {}))
    refuse_unknown(clean, ["kind", "link"], prefix="clean.")
    kind = clean.get("kind", "simulated" if lab.rounds else "none")
    require(kind in CLEANS, "clean.kind", f"be one of {', '.join(CLEANS)}", kind)
    endless = kind == "simulated" and not lab.rounds
    require(not endless, "clean.kind", "be measured or none where lab.rounds is 0", kind)
    scenario = Scenario(
        name=name,
        description=str(tree.get("description", "")),
        lab=lab,
        churn=churn,
        places=_places(tree.get("places", []), link, lab.workers),
        events=tuple(_rule(table, lab) for table in _tables(tree.get("events", []), "events")),
        bars=_bars(tree.get("bars", {})),
        clean=kind,
        clean_link=_link(clean["link"], "clean.link") if "link" in clean else link,
        manifest=_manifest(name, tree, lab),
        text=text,
    )
    _check_events(scenario)
    return scenario


def _known(table: Any, kind: type, prefix: str) -> dict[str, Any]:
    require(isinstance(table, Mapping), prefix, f"be a table, [{prefix}]", table)
    refuse_unknown(table, [item.name for item in fields(kind)], prefix=f"{prefix}.")
    return dict(table)


def _tables(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    good = isinstance(value, list) and all(isinstance(table, Mapping) for table in value)
    require(good, name, f"be tables, [[{name}]]", value)
    return list(value)


def _link(table: Any, prefix: str) -> HomeLink:
    values = _known(table, HomeLink, prefix)
    for key, value in values.items():
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6
        require(good, f"{prefix}.{key}", "be a number of at least 0", value)
    require(values.get("loss", 0) < 1, f"{prefix}.loss", "be below 1, such as 0.01", values.get("loss"))
    return HomeLink(**values)


def _places(tables: Any, link: HomeLink, workers: int) -> tuple[Place, ...]:
    places = [Place(link) for _ in range(workers)]
    names = [item.name for item in fields(Place) if item.name != "link"]
    for table in _tables(tables, "places"):
        refuse_unknown(table, ["workers", "link", *names], prefix="places.")
        values = {key: table[key] for key in names if key in table}
        for number in _numbers(table.get("workers"), "places.workers", workers):
            own = places[number - 1].link
            if "link" in table:
                own = _link({**vars(own), **table["link"]}, "places.link")
            places[number - 1] = Place(**{**vars(places[number - 1]), **values, "link": own})
    require(not places[0].late, "places.late", "not hold for worker-1, which begins the run", True)
    return tuple(places)


def _numbers(value: Any, key: str, workers: int) -> tuple[int, ...]:
    good = isinstance(value, list) and all(type(n) is int and 1 <= n <= workers for n in value)
    require(good, key, f"be a list of workers' numbers, 1 to {workers}", value)
    return tuple(value)


def _rule(table: Mapping[str, Any], lab: LabConfig) -> EventRule:
    refuse_unknown(table, [item.name for item in fields(EventRule)], prefix="events.")
    kind = table.get("kind")
    require(kind in KINDS, "events.kind", f"be one of {', '.join(KINDS)}", kind)
    values = dict(table)
    if "workers" in values:
        values["workers"] = _numbers(values["workers"], "events.workers", lab.workers)
    if "sides" in values:
        sides = values["sides"]
        require(isinstance(sides, list), "events.sides", "be lists of workers' numbers", sides)
        values["sides"] = tuple(_numbers(side, "events.sides", lab.workers) for side in sides)
    rule = EventRule(**values)
    for name in ("round", "every_rounds", "until_round", "seconds"):
        value = getattr(rule, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        require(good, f"events.{name}", "be a number of at least 0", value)
    is_timed = (rule.round > 0) != (rule.at_s >= 0)
    require(is_timed, "events.round", "say when, or events.at_s instead of it", rule.round)
    if kind in ("freeze", "cut", "partition", "fill"):
        require(rule.seconds > 0, "events.seconds", f"say how long a {kind} lasts", rule.seconds)
    require((kind == "bootstrap-dies") <= lab.bootstrap, "lab.bootstrap", "be true for it to die", False)
    require((kind == "partition") == bool(rule.sides), "events.sides", "be given for a partition", rule.sides)
    return rule


def _check_events(scenario: Scenario) -> None:
    for rule in scenario.events:
        for number in rule.workers:
            place = scenario.places[number - 1]
            if rule.kind == "join":
                require(place.late, "events.workers", "be marked late in [[places]] to join", number)
            if rule.kind == "fill":
                require(place.disk_mb > 0, "events.workers", "have places.disk_mb to be filled", number)
            if rule.kind == "move":
                require(not place.nat, "events.workers", "not be behind NAT to move", number)


def _bars(table: Any) -> dict[str, float]:
    require(isinstance(table, Mapping), "bars", "be a table, [bars]", table)
    for key, value in table.items():
        good = re.fullmatch(r"[a-z_]+_at_(most|least)", key) is not None
        require(good, f"bars.{key}", "end in _at_most or _at_least", value)
        refuse_unknown([key.rpartition("_at_")[0]], FIGURES, prefix="bars.")
        require(type(value) in (int, float), f"bars.{key}", "be a number", value)
    return {key: float(value) for key, value in table.items()}


def _manifest(name: str, tree: Mapping[str, Any], lab: LabConfig) -> Manifest:
    values: dict[str, object] = {}
    for section in SECTIONS:
        table = tree.get(section, {})
        require(isinstance(table, Mapping), section, f"be a table, [{section}]", table)
        values.update({f"{section}.{key}": value for key, value in table.items()})
    preset = values.pop("model.preset", "tiny")
    shared = {"train.seed": lab.seed, **values}
    return preset_manifest(name, str(preset), shared)
