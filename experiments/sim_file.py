"""Simulation files: what is simulated and what is varied. experiments/configs/quick.toml is one.

A file holds the sections of `sim_config.py`, any sections of a run file ([model], [train], [codec] ...), and what is
varied: [grid] gives lists of values of dotted keys, [[variants]] a label and values of their own. Every variant is
simulated at every point of the grid with every seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dtrain.experiments.sim_config import (
    OWN_SECTIONS,
    AttackConfig,
    ChurnConfig,
    MachinesConfig,
    NetworkConfig,
    SimulateConfig,
)
from dtrain.trainer.config import require
from dtrain.trainer.data import file_sha256
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import SECTIONS, Manifest, preset_manifest, refuse_unknown
from dtrain.trainer.optimizers import OPTIMIZERS
from dtrain.trainer.strategies import STRATEGIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHORT_NAMES = {"simulate.workers": "M", "train.inner_steps": "H", "strategy.name": "", "network.profile": ""}
"""How varied settings are called in labels; others by the last part of their key."""


@dataclass(frozen=True)
class RunSpec:
    """One simulated run."""

    label: str
    """What distinguishes it in legends; the same for all seeds."""
    manifest: Manifest
    simulate: SimulateConfig
    network: NetworkConfig
    machines: MachinesConfig
    churn: ChurnConfig
    attack: AttackConfig = field(default_factory=AttackConfig)
    settings: Mapping[str, object] = field(default_factory=dict)
    """Dotted key -> value of what is varied."""

    @property
    def id(self) -> str:
        """A folder name that changes with every setting that could change the result."""
        sections = {name: asdict(getattr(self, name)) for name in OWN_SECTIONS}
        for name in ("seeds", "target_loss"):  # they change no run
            del sections["simulate"][name]
        if self.attack == AttackConfig():  # runs of before there were attacks keep their names
            del sections["attack"]
        if self.machines.precision == MachinesConfig.precision:  # so do those of before it could be chosen
            del sections["machines"]["precision"]
        text = json.dumps([self.manifest.to_dict(), sections], sort_keys=True)
        slug = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")[:60]
        return f"{slug}-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def seed(self) -> int:
        return self.manifest.train.seed

    @property
    def rounds(self) -> int:
        """Rounds that the run has."""
        return self.simulate.steps // self.manifest.train.inner_steps

    @property
    def eval_every(self) -> int:
        """Rounds between two evaluations."""
        return max(1, round(self.simulate.eval_every_steps / self.manifest.train.inner_steps))


@dataclass(frozen=True)
class Sweep:
    """All runs of one file."""

    name: str
    description: str
    runs: tuple[RunSpec, ...]
    data: Path | None
    """The text file that is trained on; None = Python's library sources."""


def load_sweep(path: Path, *, seeds: int | None = None) -> Sweep:
    """Read a simulation file. UsageError, in one line that names the file and the key, if anything is wrong."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}") from None
    try:
        return _sweep(tree, path, seeds)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _sweep(tree: dict[str, Any], path: Path, seeds: int | None) -> Sweep:
    known = ["name", "description", *OWN_SECTIONS, *SECTIONS, "grid", "variants"]
    refuse_unknown(tree, known, prefix="")
    name, description = tree.pop("name", path.stem), tree.pop("description", "")
    require(isinstance(name, str), "name", "be text", name)
    require(isinstance(description, str), "description", "be text", description)
    rule = "be 1 to 64 letters, digits, '-' or '_', beginning with a letter or digit"
    require(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) is not None, "name", rule, name)
    grid = _grid(tree.pop("grid", {}))
    variants = _variants(tree.pop("variants", []))
    base = dict(_dotted(tree))
    if seeds is not None:
        base["simulate.seeds"] = seeds
    data = _data_file(base, path)
    count = OWN_SECTIONS["simulate"](**_part(base, "simulate")).seeds
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    varied = [*dict.fromkeys(key for _, values in variants for key in values), *grid]
    runs = [
        _run(name, variant, point, {**base, **values, **point}, varied, seed)
        for variant, values in variants
        for point in points
        for seed in range(count)
    ]
    _refuse_twins(runs)
    return Sweep(name, description, tuple(runs), data)


def _run(
    name: str,
    variant: str,
    point: Mapping[str, Any],
    settings: dict[str, Any],
    varied: Sequence[str],
    seed: int,
) -> RunSpec:
    own = {part: kind(**_part(settings, part)) for part, kind in OWN_SECTIONS.items()}
    shared = {key: value for key, value in settings.items() if key.partition(".")[0] in SECTIONS}
    preset = shared.pop("model.preset", "tiny")
    require(isinstance(preset, str), "model.preset", "be text", preset)
    shared = {"exchange.start_workers": own["simulate"].workers, **shared, "train.seed": seed}
    manifest = preset_manifest(name, preset, shared)
    choices = ", ".join(STRATEGIES)
    require(
        manifest.strategy.name in STRATEGIES, "strategy.name", f"be one of {choices}", manifest.strategy.name
    )
    choices = ", ".join(OPTIMIZERS)
    require(
        manifest.train.optimizer in OPTIMIZERS,
        "train.optimizer",
        f"be one of {choices}",
        manifest.train.optimizer,
    )
    rule, most = "leave at least one honest worker", own["simulate"].workers - 1
    require(own["attack"].attackers <= most, "attack.attackers", rule, own["attack"].attackers)
    steps, inner = own["simulate"].steps, manifest.train.inner_steps
    require(steps % inner == 0, "simulate.steps", f"be a multiple of train.inner_steps = {inner} here", steps)
    shown = {key: settings[key] for key in varied if key in settings}
    label = " ".join([variant, *map(_word, point, point.values())]).strip()
    return RunSpec(label or manifest.strategy.name, manifest, **own, settings=shown)


def _word(key: str, value: object) -> str:
    """How a varied setting appears in a label."""
    short = SHORT_NAMES.get(key, key.rpartition(".")[2])
    return f"{short}={value}" if short else str(value)


def _grid(table: Any) -> dict[str, list[Any]]:
    require(isinstance(table, Mapping), "grid", "be a table of lists, [grid]", table)
    grid = dict(_dotted(table))
    for key, values in grid.items():
        _check_key(key)
        require(
            isinstance(values, list) and len(values) > 0, f"grid: {key}", "be a list of values to try", values
        )
    return grid


def _variants(tables: Any) -> list[tuple[str, dict[str, Any]]]:
    good = isinstance(tables, list) and all(isinstance(table, Mapping) for table in tables)
    require(good, "variants", "be tables, [[variants]]", tables)
    found = []
    for table in tables:
        label, values = table.get("label"), dict(_dotted({k: v for k, v in table.items() if k != "label"}))
        require(isinstance(label, str) and label != "", "variants.label", "be the variant's name", label)
        for key in values:
            _check_key(key)
        found.append((str(label), values))
    return found or [("", {})]


def _check_key(key: str) -> None:
    kinds = {**OWN_SECTIONS, **SECTIONS}
    known = [f"{part}.{item.name}" for part, kind in kinds.items() for item in fields(kind)]
    refuse_unknown([key], [k for k in known if k not in ("simulate.seeds", "train.seed")], prefix="")


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _part(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}."
    values = {key[len(start) :]: value for key, value in settings.items() if key.startswith(start)}
    refuse_unknown(values, [item.name for item in fields(OWN_SECTIONS[name])], prefix=start)
    return values


def _data_file(base: dict[str, Any], path: Path) -> Path | None:
    """`data.file`, relative to the simulation file, becomes the manifest's settings for it."""
    file = base.pop("data.file", None)
    if file is None:
        return None
    require(isinstance(file, str), "data.file", "be the path of a text file", file)
    data = path.parent / str(file)
    base.update({"data.source": "file", "data.name": data.name, "data.sha256": file_sha256(data)})
    return data


def _refuse_twins(runs: Sequence[RunSpec]) -> None:
    seen: dict[str, RunSpec] = {}
    for run in runs:
        if run.id in seen:
            raise UsageError(f"grid, variants: the run {run.label!r} comes twice; leave one of them out")
        seen[run.id] = run
