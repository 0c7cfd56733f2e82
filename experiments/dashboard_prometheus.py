"""The run's figures in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = (
    ("dtrain_round", "Rounds that the swarm has completed", lambda s: s["health"]["round"]),
    ("dtrain_workers", "Workers that take part", lambda s: s["health"]["workers"]),
    (
        "dtrain_contributors",
        "Workers whose delta is in the last round",
        lambda s: s["health"]["contributors"],
    ),
    ("dtrain_healthy", "1 if the run is in good health", lambda s: int(s["health"]["level"] == "good")),
    (
        "dtrain_digests_differ",
        "1 if workers of one round differ",
        lambda s: int(s["health"]["digests"] == "differ"),
    ),
    ("dtrain_round_seconds", "Median seconds of the last rounds", lambda s: s["health"]["round_s"]),
    (
        "dtrain_exchange_seconds",
        "The last exchange, of the slowest",
        lambda s: s["health"]["last_exchange_s"],
    ),
    ("dtrain_eval_loss", "Evaluation loss, nats per token", lambda s: s["eval_loss"] and s["eval_loss"][1]),
    ("dtrain_train_loss", "Training loss, nats per token", lambda s: s["train_loss"] and s["train_loss"][1]),
    ("dtrain_tokens", "Tokens in theta's history", lambda s: s["tokens"]),
    ("dtrain_tokens_per_second", "Tokens per second of the swarm", lambda s: s["tokens_per_s"]),
    ("dtrain_sent_bytes", "Bytes that all workers have sent", lambda s: s["traffic"]["up_bytes"]),
    ("dtrain_received_bytes", "Bytes that all workers have received", lambda s: s["traffic"]["down_bytes"]),
)
OF_WORKERS = (
    ("dtrain_worker_tokens", "Tokens that a worker has trained", "tokens"),
    ("dtrain_worker_tokens_per_second", "Tokens per second of a worker", "tokens_per_s"),
    ("dtrain_worker_round_lag", "Rounds that a worker is behind", "lag"),
    ("dtrain_worker_sent_bytes", "Bytes that a worker has sent since its start", "up_bytes"),
    ("dtrain_worker_received_bytes", "Bytes that a worker has received since its start", "down_bytes"),
)

REFUSED = "dtrain_refused_total", "What a worker has refused of others since its start, by reason"


def exposition(snapshot: dict[str, Any] | None, clients: int) -> str:
    """All metrics, one a line. `snapshot` is None until the run is found."""
    lines = [*_metric("dtrain_dashboard_clients", "Clients of the live stream", [("", clients)])]
    if snapshot is not None:
        run = f'run="{_escaped(snapshot["about"]["run_id"])}"'
        for name, text, value in GAUGES:
            lines += _metric(name, text, [(run, value(snapshot))])
        for name, text, key in OF_WORKERS:
            samples = [
                (f'{run},worker="{_escaped(w["name"])}",peer="{_escaped(w["id"])}"', w[key])
                for w in snapshot["workers"]
            ]
            lines += _metric(name, text, samples)
        lines += _metric(*REFUSED, list(_refused(run, snapshot["workers"])), kind="counter")
    return "\n".join(lines) + "\n"


def _refused(run: str, workers: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    for worker in workers:
        of = f'{run},worker="{_escaped(worker["name"])}",peer="{_escaped(worker["id"])}"'
        for reason, count in sorted(worker["refused"].items()):
            yield f'{of},reason="{_escaped(reason)}"', count


def _metric(name: str, text: str, samples: list[tuple[str, Any]], kind: str = "gauge") -> Iterator[str]:
    known = [(labels, value) for labels, value in samples if value is not None]
    if known:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {kind}"
        yield from (f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in known)


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
