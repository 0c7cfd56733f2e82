"""Metrics to Weights & Biases, for those who ask for it with --wandb; nothing of wandb is loaded otherwise.

What goes out is figures and the run's manifest, which is public anyway. wandb's own curiosity (host name, command line,
code, git, printed lines, hardware) is switched off: an invite or a token must not end up on somebody's server.
"""

from __future__ import annotations

import argparse
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain.trainer.errors import UsageError
from dtrain.trainer.metrics import Metrics, MetricsLog

MODES = ("offline", "online", "disabled")
AUTO = "auto"
PROJECT = "dtrain"
NEEDS = "--wandb needs one package more: pip install 'dtrain[wandb]'"
LOGIN_S = 10.0
OF_EVENTS = {
    "round": (
        "loss",
        "tokens",
        "payload_bytes",
        "bytes_up",
        "bytes_down",
        "wait_s",
        "exchange_s",
        "compute_share",
    ),
    "eval": ("eval_loss",),
}
"""What a worker's events give to its wandb run."""


def add_flag(parser: Any, what: str) -> None:
    """Declare --wandb; `what` says what is logged."""
    parser.add_argument(
        "--wandb",
        nargs="?",
        const=AUTO,
        default="disabled",
        type=_mode,
        metavar="MODE",
        help=f"log {what} to Weights & Biases: offline, online or disabled (default); "
        "without a mode: online if you are logged in, else offline, into ./wandb",
    )


def _mode(text: str) -> str:
    if text not in (AUTO, *MODES):
        raise argparse.ArgumentTypeError(f"there is no mode {text!r}: choose of {', '.join(MODES)}")
    return text


def resolve_mode(mode: str) -> str:
    """One of MODES for what --wandb was given. UsageError if it cannot be had."""
    if mode in ("disabled", "offline"):
        return mode
    if _is_logged_in(_library()):
        return "online"
    if mode == "online":
        raise UsageError("--wandb online: type `wandb login` first, or --wandb offline")
    return "offline"


class WandbRun:
    """One wandb run; `log` may be called from several threads."""

    def __init__(self, mode: str, name: str, group: str, config: Mapping[str, Any]):
        mode, wandb = resolve_mode(mode), _library()
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            host="",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            group=group,
            config=dict(config),
            mode=mode,
            settings=settings,
        )
        self._lock = threading.Lock()

    def log(self, values: Mapping[str, Any]) -> None:
        """Add one row; what is no finite number is left out."""
        row = {
            key: value
            for key, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        with self._lock:
            self._run.log(row)

    def close(self) -> None:
        self._run.finish()

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WithWandb:
    """A worker's metrics, of which the figures go to wandb too."""

    def __init__(self, metrics: Metrics, run: WandbRun):
        self._metrics, self._run = metrics, run

    def write(self, event: str, **fields: Any) -> None:
        self._metrics.write(event, **fields)
        if event in OF_EVENTS:
            figures = {key: fields.get(key) for key in OF_EVENTS[event]}
            self._run.log({"round": fields["round"], **figures})


@contextmanager
def open_metrics(folder: Path, mode: str, name: str, manifest: Mapping[str, Any]) -> Iterator[Metrics]:
    """A worker's metrics file, and with it a wandb run if one is asked for. `manifest` is `Manifest.to_dict()`."""
    with MetricsLog(folder / "metrics.jsonl") as metrics:
        if mode == "disabled":
            yield metrics
            return
        with WandbRun(mode, name, str(manifest["run_id"]), manifest) as run:
            yield WithWandb(metrics, run)


def _library() -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise UsageError(NEEDS) from None
    return wandb


def _is_logged_in(wandb: Any) -> bool:
    """Whether a key is there; asks nobody for one."""
    try:
        return bool(wandb.login(prompt=False, verify=False, timeout=int(LOGIN_S)))
    except Exception:  # its client raises several types where there is no network or no key
        return False
