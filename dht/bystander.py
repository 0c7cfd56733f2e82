"""What a peer can do for a run, and learn about its network, without taking part in the run."""

from __future__ import annotations

from dtrain.dht.exchange import DhtExchange


def keep_reachable(exchange: DhtExchange, *, run_id: str, manifest: bytes) -> None:
    """Keep a run's manifest in the DHT from now on, also over restarts of the network process."""

    def publish() -> None:
        exchange.process.command("publish", run_id=run_id, manifest=manifest)

    def come_back() -> None:
        exchange.connect()
        publish()

    publish()
    exchange.process.set_up = come_back


def distance(exchange: DhtExchange) -> dict[str, float] | None:
    """The fields of `dht.distance.Distance` to a peer that we joined through; None when none answers."""
    found: dict[str, float] | None = exchange.process.command("distance")
    return found
