"""What the demo knows of its workers: everything comes from the metrics files that they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BYTES_PER_PARAMETER = 4  # an all-reduce of fp32 gradients, the traffic that the swarm is compared with


@dataclass
class Round:
    """A completed round as one worker saw it."""

    number: int
    contributors: tuple[str, ...]  # peer ids
    own_included: bool
    loss: float | None
    digest: str
    bytes_up: int  # this worker's, all its rounds together
    waited_s: float  # from giving the payload until the last aggregate was there


@dataclass
class WorkerView:
    """One worker, as far as its metrics file tells. `state` is the last that it said it is in."""

    name: str
    path: Path
    state: str = "starting"
    peer_id: str = ""
    device: str = ""
    num_params: int = 0
    joined_from: str = ""
    step: int = 0
    inner_steps: int = 0
    tokens_per_s: float = 0.0
    round_ends_in_s: float = 0.0
    loss: float | None = None
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    first_step_s: float | None = None
    first_contribution_s: float | None = None
    rounds: dict[int, Round] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    last_digest: str = ""
    last_round: int = 0
    _read_bytes: int = 0

    def refresh(self) -> None:
        """Take in what the worker has written since the last call; a line still being written waits."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                fresh = file.read()
        except FileNotFoundError:
            return
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # what a killed worker left of its last line
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self.peer_id, self.device = event["peer_id"], event["device"]
            self.num_params = event["num_params"]
        elif kind == "state":
            self.state = event["state"]
        elif kind == "joined":
            self.joined_from, self.last_round = event["source"], event["round"]
        elif kind == "step":
            self.step, self.inner_steps, self.loss = event["step"], event["inner_steps"], event["loss"]
            self.round_ends_in_s = event.get("round_ends_in_s", 0.0)
            self.tokens_per_s, self.tokens = event["tokens_per_s"], event["tokens"]
            self.last_round = event["round"]
        elif kind == "round":
            self._take_round(event)
        elif kind == "eval":
            if event["eval_loss"] is not None:  # null stands for a loss that is not finite
                self.evaluations[event["round"]] = event["eval_loss"]
        elif kind == "first_step":
            self.first_step_s = event["seconds"]
        elif kind == "first_contribution":
            self.first_contribution_s = event["seconds"]
        elif kind == "stop":
            self.last_round, self.last_digest = event["round"], event["digest"]
            self.tokens = event["tokens"]
        # Later versions of the worker may report traffic in other events too.
        self.bytes_up = max(self.bytes_up, event.get("bytes_up", 0))
        self.bytes_down = max(self.bytes_down, event.get("bytes_down", 0))

    def _take_round(self, event: dict[str, Any]) -> None:
        number = event["round"]
        self.rounds[number] = Round(
            number=number,
            contributors=tuple(event["contributors"]),
            own_included=event["own_included"],
            loss=event["loss"],
            digest=event["digest"],
            bytes_up=event["bytes_up"],
            waited_s=event["wait_s"] + event["exchange_s"],
        )
        self.last_round, self.last_digest = number, event["digest"]
        self.tokens = event["tokens"]

    @property
    def contributed(self) -> bool:
        """Whether anything of this worker is in theta."""
        return any(done.own_included for done in self.rounds.values())

    def allreduce_bytes(self) -> float:
        """Bytes that a ring all-reduce of fp32 gradients after every inner step would have had this worker send.

        In a ring of N each worker sends 2 (N - 1) / N of the tensor. Rounds alone need no traffic either way.
        """
        sent = 0.0
        for done in self.rounds.values():
            num = len(done.contributors)
            if done.own_included and num > 1:
                sent += 2 * (num - 1) / num * BYTES_PER_PARAMETER * self.num_params * self.inner_steps
        return sent


@dataclass
class SwarmView:
    """All workers of the demo together."""

    workers: Sequence[WorkerView]

    def refresh(self) -> None:
        for worker in self.workers:
            worker.refresh()

    @property
    def rounds_done(self) -> int:
        """Rounds that at least one worker has completed."""
        return max((number for worker in self.workers for number in worker.rounds), default=0)

    def loss(self, number: int) -> float | None:
        """Mean training loss of the workers that completed a round; None if nobody has."""
        losses = [w.rounds[number].loss for w in self.workers if number in w.rounds]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None

    def evaluations(self) -> dict[int, float]:
        """Evaluation loss of theta by number of rounds completed, ascending."""
        merged: dict[int, float] = {}
        for worker in self.workers:
            for number, loss in worker.evaluations.items():
                merged.setdefault(number, loss)
        return dict(sorted(merged.items()))

    def contributors(self, number: int) -> tuple[str, ...]:
        """Names of the workers that are in a round, in the cast's order. Those that saw it agree, as theta does."""
        ids = {i for w in self.workers if number in w.rounds for i in w.rounds[number].contributors}
        return tuple(worker.name for worker in self.workers if worker.peer_id in ids)

    def digests(self, number: int) -> set[str]:
        """The digests that workers hold after a round: one, if all is well."""
        return {worker.rounds[number].digest for worker in self.workers if number in worker.rounds}

    def ratio(self) -> float | None:
        """How many times less the workers sent than fp32 ring all-reduces would have; None before the first round."""
        sent = sum(worker.bytes_up for worker in self.workers)
        return sum(worker.allreduce_bytes() for worker in self.workers) / sent if sent else None
