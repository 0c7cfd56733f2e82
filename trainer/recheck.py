"""Now and then a worker checks that another one has trained on the data it was given.

After a round it may ask one of the others for the update that it sent. Under the next exchange it looks at it:

    loss gate       of the losses at theta + mean - update (the sender's alone in place of the average) and at theta:
                    is the first one better on the sender's sequences of that round than on our own?
    re-execution    the sign of the gradient of the sender's first sequences at the round's theta, which is the first
                    step of Adam: is it like the update, where that says something?

The same is asked of our own update, to know what is to be expected (`suspicion.py`). Who is looked at, and on which
sequences, follows from the manifest, the digest of theta after the round, and the two peer ids: nobody knows it
before all updates are sent, and anybody can do a look again. It costs at most `defence.recheck` of the worker's
compute and half that share of its traffic, changes nothing of its training, and never waits for the network. Updates
that are gradients are not looked at, nor those of peers that nobody can call, nor groups of up to four, nor where the
text is not the same for all workers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.compression.screen import MIN_MEMBERS
from dtrain.trainer.assignment import draw
from dtrain.trainer.clock import Clock
from dtrain.trainer.compute import autocast, choose_precision
from dtrain.trainer.data import Data
from dtrain.trainer.delivery import Training
from dtrain.trainer.estimate import free_memory_bytes
from dtrain.trainer.exchange import Exchange, Outcome, can_be_called
from dtrain.trainer.feed import Feed
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import DELTA, evaluating
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.outer_loop import OuterLoop
from dtrain.trainer.reporting import Reporter
from dtrain.trainer.suspicion import WORDS, Look, Suspicions

LOOKED_AT = 16  # sequences of each of the two, for their losses
DONE_AGAIN = 8  # for their gradient
FORWARDS = 3  # that training on a sequence costs
COST = 1.25 * (6 * LOOKED_AT + 2 * FORWARDS * DONE_AGAIN)  # of a look, with what is around the passes
PAYLOADS = 0.9  # a round with a share of 1; a round costs about two, so 0.02 may take 1 % of its bytes
KEPT_ROUNDS = 2  # after which a look has become too old
LIMIT = 4.0  # of a score
PASS_TOKENS = 1024  # at a time: all their logits are there at once
NEEDED = 10  # times theta, of free memory: what a look takes for a moment

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Share:
    """What somebody trained on in a round, as far as it matters: x and y."""

    sample: Batch
    """[LOOKED_AT, T]"""
    first: Batch
    """[DONE_AGAIN, T]"""


@dataclass(frozen=True)
class Case:
    """Somebody's update of a round that is to be looked at, and ours."""

    label: str
    """What the drawing of sequences depends on."""
    peer_id: str
    lane: int | None
    num_steps: int
    training: Training
    payload: bytes
    own_lane: int
    aggregates: Sequence[bytes]


@dataclass(frozen=True)
class Evidence:
    """What a look needs beside the weights."""

    payload: bytes
    theirs: Share
    ours: Share


class Recheck:
    """One worker's looks at the others' updates."""

    def __init__(
        self,
        manifest: Manifest,
        model: nn.Module,
        local: FlatParameters,
        outer: OuterLoop,
        data: Data,
        feed: Feed,
        exchange: Exchange,
        report: Reporter,
        clock: Clock,
    ) -> None:
        fits = manifest.exchange.screens and data.is_common and outer.strategy.collects == DELTA
        self._share = manifest.defence.recheck if fits else 0.0
        self._manifest, self._model, self._local, self._outer = manifest, model, local, outer
        self._data, self._feed, self._exchange, self._report = data, feed, exchange, report
        self._step_tokens = manifest.train.batch_size * manifest.train.seq_len
        self._suspicions = Suspicions()
        self._courier = clock.courier()
        self._pending: tuple[Case, Future[Evidence | None]] | None = None

    # ------------------------------------------------------------------ whom to look at

    def ask(self, outcome: Outcome, training: Training, payload: bytes) -> None:
        """A round is applied, with our own part in it: perhaps ask one of the others for its update, in another
        thread."""
        if self._share == 0 or self._pending is not None or len(outcome.members) < MIN_MEMBERS:
            return
        if free_memory_bytes() < NEEDED * self._outer.state.theta_flat.nbytes:
            return
        train = self._manifest.train
        place = f"{self._manifest.hash.hex()}\n{training.round}\n{self._outer.digest.hex()}"
        label = f"recheck\n{place}\n{self._exchange.peer_id}"
        affordable = FORWARDS * (training.tokens / train.seq_len) / COST
        chance = self._share * min(affordable, PAYLOADS)
        if training.tokens < LOOKED_AT * train.seq_len or draw(label) >= chance * 2.0**64:
            return
        steps = self._steps(outcome)
        views = {view.peer_id: view for view in self._exchange.swarm() if can_be_called(view)}
        others = sorted(steps.keys() & views.keys())
        if not others:
            return
        peer_id = self._choose(label, others)
        lane = views[peer_id].status.get("lane")
        case = Case(
            label=f"{label}\n{peer_id}",
            peer_id=peer_id,
            lane=lane if isinstance(lane, int) and 0 <= lane < self._data.lanes else None,
            num_steps=steps[peer_id],
            training=training,
            payload=payload,
            own_lane=self._feed.lane,
            aggregates=outcome.aggregates,
        )
        self._pending = case, self._courier.submit(self._gather, case)

    def _steps(self, outcome: Outcome) -> dict[str, int]:
        """Inner steps of all whose weight is that of enough sequences; a reducer may let a weight count less."""
        weights: dict[str, float] = {}
        for aggregate in outcome.aggregates:
            for index, weight in self._outer.codec.contributors(aggregate):
                peer_id = outcome.members[index]
                weights[peer_id] = max(weight, weights.get(peer_id, 0.0))
        steps = {peer_id: int(weight // self._step_tokens) for peer_id, weight in weights.items()}
        least = math.ceil(LOOKED_AT / self._manifest.train.batch_size)
        return {peer_id: number for peer_id, number in steps.items() if number >= least}

    def _choose(self, label: str, others: Sequence[str]) -> str:
        """Every other time the one that we or others doubt most, else anybody."""
        named = Counter(str(view.status.get("accuses", "")) for view in self._exchange.swarm())
        doubts = {peer_id: self._suspicions.doubt(peer_id) + named[peer_id] for peer_id in others}
        worst = max(others, key=lambda peer_id: doubts[peer_id])
        if doubts[worst] > 0 and draw(f"{label}\nagain") % 2:
            return worst
        return others[draw(f"{label}\nwhom") % len(others)]

    def _gather(self, case: Case) -> Evidence | None:
        """In the courier's thread: the update, and what the two trained on; None if it cannot be had."""
        payload = self._exchange.fetch_contribution(case.peer_id, case.training.round)
        if payload is None:
            return None
        own_steps = case.training.tokens // self._step_tokens
        theirs = self._trained_on(case, case.peer_id, case.lane, case.num_steps)
        ours = self._trained_on(case, self._exchange.peer_id, case.own_lane, own_steps)
        return Evidence(payload, theirs, ours)

    def _trained_on(self, case: Case, peer_id: str, lane: int | None, num_steps: int) -> Share:
        train, size = self._manifest.train, self._manifest.train.batch_size
        places = range(num_steps * size)
        sample = sorted(places, key=lambda place: draw(f"{case.label}\n{peer_id}\n{place}"))[:LOOKED_AT]
        wanted = {*sample, *places[:DONE_AGAIN]}
        batches = self._data.batches(
            seed=train.seed,
            run_id=self._manifest.run_id,
            round=case.training.round,
            peer_id=peer_id,
            batch_size=size,
            seq_len=train.seq_len,
            lane=lane,
            ahead=False,
        )
        found: dict[int, Batch] = {}
        for step, (x, y) in zip(range(max(wanted) // size + 1), batches):
            rows = ((step * size + row, row) for row in range(size))
            found.update((place, (x[row], y[row])) for place, row in rows if place in wanted)

        def stacked(chosen: Sequence[int]) -> Batch:
            xs, ys = zip(*(found[place] for place in chosen))
            return torch.stack(xs), torch.stack(ys)

        return Share(stacked(sample), stacked(places[:DONE_AGAIN]))

    # ------------------------------------------------------------------ looking

    def look(self) -> None:
        """Judge what has come meanwhile. The local weights are used for it, and put back."""
        if self._pending is None or not self._pending[1].done():
            return
        (case, gathered), self._pending = self._pending, None
        if self._outer.round > case.training.round + KEPT_ROUNDS:
            return
        evidence, peer_id = gathered.result(), case.peer_id
        if evidence is None:
            reason, found = self._suspicions.missed(peer_id), {"missed": 1.0}
        else:
            try:
                look = self._look(case, evidence)
            except torch.OutOfMemoryError:
                self._share = 0.0
                return self._report.say("This machine has too little memory to try out others' updates.")
            reason, found = self._suspicions.note(peer_id, look), look.rounded()
        self._report.metrics.write(
            "recheck", round=case.training.round, peer=peer_id, **found, accused=reason
        )
        if reason:
            self._exchange.accuse(peer_id, reason)
            self._report.accused(peer_id, WORDS[reason])
            self._report.accuses = peer_id
        elif self._report.accuses == peer_id:
            self._report.accuses = ""

    def _look(self, case: Case, evidence: Evidence) -> Look:
        """The scores of the peer's update and of ours."""
        theta, mean = self._outer.state.theta_flat, _flat(self._outer.codec.decode(case.aggregates))
        update, own = (self._update(made, case.training.round) for made in (evidence.payload, case.payload))
        theirs, ours = evidence.theirs, evidence.ours
        kept = self._local.flat.clone()
        try:
            with evaluating(self._model):
                sequences = (
                    torch.cat((theirs.sample[0], ours.sample[0])),
                    torch.cat((theirs.sample[1], ours.sample[1])),
                )
                now = self._losses(theta, sequences)
                gain = now - self._losses(theta + mean - update, sequences)
                own_gain = now - self._losses(theta + mean - own, sequences)
                likeness = self._likeness(theta + mean, theirs.first, update)
                own_likeness = self._likeness(theta + mean, ours.first, own)
        finally:
            self._local.flat.copy_(kept)
        return Look(
            score=score(gain[:LOOKED_AT], gain[LOOKED_AT:]),
            own_score=score(own_gain[LOOKED_AT:], own_gain[:LOOKED_AT]),
            likeness=likeness,
            own_likeness=own_likeness,
        )

    def _update(self, payload: bytes, round: int) -> Tensor:
        """What a payload holds, [num_params]."""
        codec, run = self._outer.codec, self._manifest.run_tag
        alone = codec.reduce(
            [(0, 1.0, payload)], run=run, round=round, first_chunk=0, num_chunks=codec.num_chunks
        )
        return _flat(codec.decode([alone]))

    @torch.no_grad()
    def _losses(self, theta: Tensor, sequences: Batch) -> Tensor:
        """[sequences] of theta [num_params]."""
        self._local.flat.copy_(theta)
        return torch.cat([self._each(x, y).double().cpu() for x, y in _passes(sequences)])

    def _likeness(self, theta: Tensor, sequences: Batch, update: Tensor) -> float:
        """Cosine of an update [num_params] with Adam's first step from theta, where the update is not 0."""
        self._local.flat.copy_(theta)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        total = torch.zeros_like(update)
        for x, y in _passes(sequences):
            gradients = torch.autograd.grad(self._each(x, y).sum(), parameters, allow_unused=True)
            known = (
                torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)
            )
            total += _flat([gradient.float().cpu() for gradient in known])
        step = total.sign() * (update != 0)
        return float(step @ update / (step.norm() * update.norm()).clamp(min=1e-30))

    def _each(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of each sequence [B] of x and y [B, T]."""
        device = self._local.flat.device
        precision = choose_precision("auto", device)  # without a scaler, small gradients vanish in fp16
        with autocast(device, "fp32" if precision == "fp16" else precision):
            logits = self._model(x.to(device))
        losses = functional.cross_entropy(logits.float().transpose(1, 2), y.to(device), reduction="none")
        return losses.mean(dim=1)

    def close(self) -> None:
        """Ask no more."""
        self._courier.shutdown(wait=False, cancel_futures=True)


def score(given: Tensor, other: Tensor) -> float:
    """By how many standard errors the mean of `given` [n] is above that of `other` [m]; of what is not finite, the
    worst that counts."""
    error = torch.sqrt(given.var() / len(given) + other.var() / len(other))
    found = float((given.mean() - other.mean()) / error.clamp(min=1e-30))
    return max(-LIMIT, min(LIMIT, found)) if math.isfinite(found) else -LIMIT


def _passes(sequences: Batch) -> Iterator[Batch]:
    """Some sequences at a time."""
    x, y = sequences
    size = max(1, PASS_TOKENS // x.shape[1])
    return zip(torch.split(x, size), torch.split(y, size))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
