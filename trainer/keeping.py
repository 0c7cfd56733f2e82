"""What a worker keeps on its disk, and how it goes on from there: theta, error feedback, the inner optimizer's state,
what it owes as a reducer, and what its payloads have delivered since.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.trainer.checkpoint import CheckpointStore
from dtrain.trainer.errors import RunError
from dtrain.trainer.exchange import Exchange
from dtrain.trainer.feedback import Feedback
from dtrain.trainer.inner import Inner
from dtrain.trainer.journal import Books
from dtrain.trainer.mirror import Mirror
from dtrain.trainer.outer_loop import OuterLoop, named, part
from dtrain.trainer.owed import Owed
from dtrain.trainer.reporting import Reporter
from dtrain.trainer.sent import Ranges, Sent, SentLog, common, delivered
from dtrain.trainer.settings import MachineSettings

HANDED = "residual_handed"
MAX_BACK = 4


@dataclass(frozen=True)
class Back:
    """A round of which a part of our payload came back. `origin` is `OuterLoop.origin` at its end."""

    round: int
    payload: bytes
    returned: Ranges
    aggregates: Sequence[bytes]
    origin: bytes


class Keeper:
    """Saves and restores one worker."""

    def __init__(
        self,
        settings: MachineSettings,
        exchange: Exchange,
        outer: OuterLoop,
        feedback: Feedback,
        inner: Inner,
        report: Reporter,
        books: Books,
        codec: Codec,
    ):
        self._every = settings.checkpoint_every
        self._exchange, self._outer, self._feedback, self._inner = exchange, outer, feedback, inner
        self._report, self._books, self._codec = report, books, codec
        self._sent = SentLog(settings.folder / "sent")
        self._newest = b""  # our payload
        self._back = deque[Back](maxlen=MAX_BACK)
        self._unclear: list[Sent] = []  # payloads of an earlier start, not yet taken out of the feedback
        self._store = CheckpointStore(settings.folder / "checkpoints", settings.keep_checkpoints)
        url = settings.checkpoint_to
        self._mirror = Mirror(url, settings.keep_checkpoints, report.say) if url else None
        self._owed = Owed(codec, feedback)
        self._num_handed = 0  # of the residual's hand-overs that we have taken over

    def restore(self, manifest_hash: bytes) -> bool:
        """Go on from the newest checkpoint; False if there is none. UsageError if they are another run's."""
        checkpoint = self._store.newest(manifest_hash)
        if checkpoint is None and self._mirror is not None and self._mirror.fetch_newest(self._store.folder):
            checkpoint = self._store.newest(manifest_hash)
        if checkpoint is not None:
            self._outer.replace(checkpoint)
            self._feedback.load_state_dict(part(checkpoint.tensors, "feedback"))
            self._inner.load_state_dict(part(checkpoint.tensors, "inner"))
            self._owed.load_state_dict(part(checkpoint.tensors, "owed"))
            self._report.tokens = int(checkpoint.extra.get("own_tokens", 0))
            self._num_handed = int(checkpoint.extra.get(HANDED, 0))
            self._unclear = self._sent.since(checkpoint.round)
            self._books.note("loaded")
        self._exchange.residual_saved(self._num_handed)
        return checkpoint is not None

    def forget_delivered(self) -> None:
        """Take out of the loaded feedback what was delivered since, now that theta is the others'.

        What went into rounds that theta does not have (everybody died, and went on from older checkpoints) stays.
        """
        for sent in self._unclear:
            returned = self._ask(sent.round) if sent.returned is None else sent.returned
            try:
                if sent.round < self._outer.round:
                    self._feedback.age()  # what was added for that payload is lost with the process
                    self._feedback.forget(sent.payload, delivered(self._codec.num_chunks, returned))
            except PayloadError as error:  # a spoiled file
                logging.warning("the payload of round %d cannot be read again: %s", sent.round, error)
        self._unclear = []
        self._sent.trim(0, self._outer.round)

    def forget_what_others_have(self) -> None:
        """Theta is the others' now. If they were on the other side of a split network, a round that was under way then
        had two ends: what came back to us of our payload may be in theirs."""
        for back in [back for back in self._back if back.origin != self._outer.origin]:
            self._back.remove(back)
            there = delivered(self._codec.num_chunks, self._ask(back.round, back.aggregates))
            if both := common(there, back.returned):
                self._feedback.forget(back.payload, both)
                self._books.forgot(back.round, back.payload, both)

    def _ask(self, round: int, unlike: Sequence[bytes] = ()) -> Ranges:
        """What of a round's payload reached nobody, as those know who were in it; all of it, if nobody was. `unlike`:
        see `Exchange.fetch_round`."""
        outcome, own = self._exchange.fetch_round(round, unlike), self._exchange.peer_id
        if outcome is None or own not in outcome.contributors:
            return [(0, self._codec.num_chunks)]
        index = list(outcome.members).index(own)
        inside = [
            self._codec.span_of(a) for a in outcome.aggregates if index in dict(self._codec.contributors(a))
        ]
        return delivered(self._codec.num_chunks, inside)

    def made(self, payload: bytes, round: int) -> None:
        """A payload is about to leave."""
        self._newest = payload
        if self._every:
            self._sent.made(payload, round)

    def settled(self, round: int, returned: Ranges, aggregates: Sequence[bytes] = ()) -> None:
        """The round of our newest payload is over, with these aggregates, and this of it is back in the feedback."""
        if aggregates and returned:
            self._back.append(Back(round, self._newest, returned, aggregates, self._outer.origin))
        if self._every:
            self._sent.settled(round, returned)

    def pay(self, contribution: Sequence[Tensor], tokens: int) -> None:
        """What we owe as a reducer goes with our payloads, a part with the one that these tokens have made."""
        self._owed.pay(contribution, float(tokens))

    def take_over_residual(self) -> None:
        """A round is through: what we kept as a reducer for places that others reduce now is ours to deliver."""
        self._num_handed = self._owed.take_over(self._exchange)
        if not self._every:  # there will be no checkpoint
            self._exchange.residual_saved(self._num_handed)

    def save_if_due(self) -> None:
        """A checkpoint every so many rounds."""
        if self._every and self._outer.round % self._every == 0:
            self.save()

    def save(self, *, leaving: bool = False) -> None:
        """A checkpoint now, unless the user wants none. Who leaves owes nothing as a reducer any more."""
        if not self._every:
            return
        if leaving:
            self._num_handed = self._owed.take_over(self._exchange, all=True)
        tensors = {
            **self._outer.shared_tensors(),
            **named("feedback", self._feedback.state_dict()),
            **named("inner", self._inner.state_dict()),
            **named("owed", self._owed.state_dict()),
        }
        extra = {"own_tokens": self._report.tokens, HANDED: self._num_handed}
        try:
            path = self._store.save(self._outer.checkpoint(tensors, extra))
        except RunError as error:  # a full disk must not end the training
            self._report.alarm(
                "training goes on without a new checkpoint, the one before is intact", str(error)
            )
        else:
            self._books.note("saved")
            self._exchange.residual_saved(self._num_handed)
            self._sent.trim(self._outer.round)
            if self._mirror is not None:
                self._mirror.put(path)

    def close(self) -> None:
        """Wait until the last checkpoint is where it is wanted."""
        if self._mirror is not None:
            self._mirror.close()
