"""The swarm's metrics as one wandb run, row by row as rounds end."""

from __future__ import annotations

from dataclasses import asdict

from dtrain.experiments.dashboard_rows import Snapshot
from dtrain.trainer.wandb_log import WandbRun, resolve_mode


class SwarmLog:
    """`take` gets every snapshot; `close` ends the wandb run. UsageError if the mode cannot be had."""

    def __init__(self, mode: str):
        self._mode = resolve_mode(mode)
        self._run: WandbRun | None = None
        self._told: tuple[object, ...] = ()

    def take(self, snapshot: Snapshot) -> None:
        """Log what is new; the wandb run begins when the run is found."""
        news = (snapshot.health.round, snapshot.eval_loss, snapshot.train_loss)
        if self._mode == "disabled" or not snapshot.about.manifest_hash or news == self._told:
            return
        self._told = news
        if self._run is None:
            about = snapshot.about
            self._run = WandbRun(self._mode, f"{about.run_id}, the swarm", about.run_id, asdict(about))
        self._run.log(figures(snapshot))

    def close(self) -> None:
        if self._run is not None:
            self._run.close()


def figures(snapshot: Snapshot) -> dict[str, float | int | None]:
    """A snapshot's figures, without names and texts."""
    return {
        "round": snapshot.health.round,
        "eval_loss": snapshot.eval_loss[1] if snapshot.eval_loss else None,
        "train_loss": snapshot.train_loss[1] if snapshot.train_loss else None,
        "tokens": snapshot.tokens,
        "tokens_per_s": snapshot.tokens_per_s,
        "workers": snapshot.health.workers,
        "contributors": snapshot.health.contributors,
        "exchange_s": snapshot.health.last_exchange_s,
        "round_s": snapshot.health.round_s,
        "sent_bytes": snapshot.traffic.up_bytes,
        "received_bytes": snapshot.traffic.down_bytes,
        "ratio_vs_fp32_allreduce": snapshot.traffic.ratio,
    }
