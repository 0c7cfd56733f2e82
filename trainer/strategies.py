"""The strategies by name. A new one is a file like `strategy_diloco.py` and a line in the dict below."""

from __future__ import annotations

from dtrain.compression.layout import Shapes
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.strategy import Strategy
from dtrain.trainer.strategy_ddp import Ddp
from dtrain.trainer.strategy_demo import Demo
from dtrain.trainer.strategy_diloco import Diloco
from dtrain.trainer.strategy_sparseloco import SparseLoco

STRATEGIES: dict[str, type[Strategy]] = {
    "sparseloco": SparseLoco,
    "diloco": Diloco,
    "demo": Demo,
    "ddp": Ddp,
}
"""Strategies by the name that `strategy.name` gives."""


def make_strategy(manifest: Manifest, shapes: Shapes) -> Strategy:
    """The strategy that the manifest names, for parameters of these (name, shape).

    UsageError lists the choices, or names a setting that the strategy has no use for.
    """
    return find(manifest.strategy.name)(manifest, shapes)


def find(name: str) -> type[Strategy]:
    """The strategy of this name; UsageError lists the choices."""
    if name not in STRATEGIES:
        raise UsageError(
            f"there is no strategy.name (--strategy) {name!r}: choose one of {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[name]
