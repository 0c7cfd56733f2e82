"""Brings a worker its batches: from its own lane of the data, with a note of how long the training had to wait."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dtrain.trainer.assignment import lane_of, settle_lane
from dtrain.trainer.clock import Clock
from dtrain.trainer.data import Data
from dtrain.trainer.exchange import Exchange
from dtrain.trainer.manifest import Manifest


class Feed:
    """A worker's data, round by round."""

    def __init__(self, manifest: Manifest, data: Data, exchange: Exchange, clock: Clock) -> None:
        self._manifest, self._data, self._exchange, self._clock = manifest, data, exchange, clock
        self.lane = lane_of(exchange.peer_id, data.lanes) if data.lanes else 0
        """What this worker trains on, for those who want to know; see `assignment.py`."""
        self.waited_s = 0.0
        """How long the training has waited for data, all in all."""

    def batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless x and y [B, T] of a round, as `Data.batches` has them."""
        config, exchange, lanes = self._manifest.train, self._exchange, self._data.lanes
        if lanes:
            self.lane = settle_lane(self.lane, exchange.peer_id, exchange.swarm(), lanes)
        batches = self._data.batches(
            seed=config.seed,
            run_id=self._manifest.run_id,
            round=round,
            peer_id=exchange.peer_id,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            lane=self.lane,
        )
        while True:
            began = self._clock.monotonic()
            batch = next(batches, None)
            self.waited_s += self._clock.monotonic() - began
            if batch is None:
                return
            yield batch
