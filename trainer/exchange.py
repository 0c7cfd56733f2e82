"""The seam between a worker and its swarm.

The worker loop knows only the `Exchange` protocol below. `dht/` implements it with hivemind over the internet,
`experiments/memory.py` in one process, and the tests with planned faults: one worker loop serves all of them.

`dht/` sits below `trainer/` and may not import it, so everything that crosses the seam is either a plain value or one
of the structural protocols declared here; mypy checks the match where the parts are wired together (`trainer/cli.py`).

Failures that a swarm brings about every day (nobody there, we are behind, a reducer died) are results, not exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Protocol

from dtrain.compression.belief import stand_of

# How a call of `Exchange.run_round` can end.
DONE = "done"  # a group met; `aggregates` holds what it agreed on
ALONE = "alone"  # nobody else is there; `aggregates` holds our own contribution
NO_GROUP = "no-group"  # others are visible but no group formed in time; nothing was delivered
STALE = "stale"  # the swarm is at another round or another theta; catch up before contributing again


# The state of a peer that trains nothing and keeps the run's state for newcomers (`dtrain bootstrap`).
ARCHIVING = "archiving"
# States in which a peer takes part in no round. A "finished" one still gives state and past rounds to others.
ABSENT = ("joining", "paused", "finished", "leaving", "stopped", ARCHIVING)


class Outcome(Protocol):
    """How a round ended for this worker."""

    @property
    def verdict(self) -> str:
        """One of DONE, ALONE, NO_GROUP, STALE."""

    @property
    def round(self) -> int:
        """The round that the aggregates belong to: they turn theta of `round` into theta of `round + 1`."""

    @property
    def base_digest(self) -> bytes:
        """Digest of the theta of `round` that the aggregates apply to."""

    @property
    def members(self) -> Sequence[str]:
        """Peer ids of the group in canonical order; contributor indices in the aggregates refer to it."""

    @property
    def contributors(self) -> Sequence[str]:
        """Peer ids whose contribution is in at least one aggregate, in canonical order."""

    @property
    def aggregates(self) -> Sequence[bytes]:
        """One encoded aggregate per span. A span that no member could get is absent, for every member alike."""

    @property
    def undelivered(self) -> Sequence[tuple[int, int]]:
        """(first chunk, number of chunks) of our payload that is in no aggregate and goes back to error feedback."""

    @property
    def problem(self) -> str:
        """One line for the user when something was lost or failed, else empty."""

    @property
    def wait_s(self) -> float:
        """Seconds from the call until the group had met."""

    @property
    def exchange_s(self) -> float:
        """Seconds from the group's meeting until the last aggregate was there."""


class PeerView(Protocol):
    """What another peer last said of itself, as its signed heartbeat has it."""

    @property
    def peer_id(self) -> str: ...

    @property
    def status(self) -> Mapping[str, object]:
        """What the peer passed to `announce`."""

    @property
    def age_s(self) -> float:
        """Seconds since the peer said so."""

    @property
    def is_believed(self) -> bool:
        """False of one that has said for long that its history has more work than ours, with few others, and has not
        handed it on."""


def work_of(view: PeerView) -> float:
    """Tokens in the history of a peer's theta; of two histories the one with more work is the run's."""
    return stand_of(view.status)[0]


def is_archive(view: PeerView) -> bool:
    """Whether a peer is no worker, but keeps the run's state."""
    return view.status["state"] == ARCHIVING


def can_give(view: PeerView) -> bool:
    """Whether rounds and state can be had from a peer: it has them, gives them, and can be dialled."""
    says_so = view.status["state"] != "joining" and view.status.get("gives", True) is True
    return says_so and can_be_called(view)


def can_be_called(view: PeerView) -> bool:
    """Whether others can ask it for something: it can be dialled, or reached through a relay."""
    return view.status.get("reach") != "client"


@dataclass(frozen=True)
class Given:
    """What a worker, or an archive, says of the state that it has just written out for newcomers."""

    round: int
    """Outer steps behind it."""
    work: float
    """Tokens trained in the history of this state; of two histories the one with more work is the run's."""
    digest: bytes
    """What heartbeats carry: the SHA-256 of `hashes`, one after another."""
    hashes: Sequence[bytes]
    """SHA-256 of each piece of the state's bytes."""


Provider = Callable[[Callable[[memoryview], object]], Given]
"""`provider(write)` hands the bytes of this worker's state to `write`, in order, and says what they are."""


class State(Protocol):
    """Everything a newcomer needs to stand where its donors stand."""

    @property
    def round(self) -> int: ...

    @property
    def work(self) -> float:
        """See `Given`."""

    @property
    def digest(self) -> bytes:
        """See `Given`; every piece of `blob` has been checked against it."""

    @property
    def blob(self) -> bytes | memoryview | mmap:
        """The bytes that the donors' providers wrote; opaque to the exchange."""


class Watch(Protocol):
    """Who is told how a download goes on. Called from other threads."""

    def progress(self, have: int, total: int) -> None:
        """So many bytes of all are here and checked."""

    def left(self, donor: str, reason: str) -> None:
        """A donor (peer id) gave bad data and is asked for nothing more."""

    def trouble(self, reason: str) -> None:
        """This machine cannot take the state, as when its disk is full; `reason` is for the user."""


class Exchange(Protocol):
    """What a worker needs from the swarm. Every call is bounded in time."""

    @property
    def peer_id(self) -> str:
        """This worker's own id, stable across restarts."""

    def announce(self, status: Mapping[str, object]) -> None:
        """Say where this worker stands (never blocks; repeated in the background until the next call).

        Keys that the exchange itself reads: `round` (int), `digest` (hex), `work` (float, tokens in theta's history),
        `gives` (False: others are not to ask for rounds and state) and `state` (str; peers in one of the `ABSENT`
        states are not waited for). All values must be str, int, float or bool.
        """

    def post(self, topic: str, note: bytes) -> None:
        """Leave a longer note for those who watch the run (never blocks, may get lost); the next one replaces it."""

    def swarm(self) -> Sequence[PeerView]:
        """Other workers of the run whose heartbeat is fresh."""

    def run_round(self, *, round: int, base_digest: bytes, payload: bytes, weight: float) -> Outcome:
        """Join `round` with `payload` (weight in tokens) and return when the round is over for this worker."""

    def release_residual(self, *, all: bool) -> tuple[int, Sequence[tuple[int, int, bytes]]]:
        """What this worker, as a reducer, still keeps for everybody in places where it reduces no more (or anywhere).

        Returns the number of hand-overs so far, and (first chunk, number of chunks, weight * value of their elements
        in chunk order, fp32) of those that are new; the weight is in tokens. From now on it is the caller's to deliver.
        """

    def residual_saved(self, number: int) -> None:
        """That many hand-overs are in this worker's newest checkpoint.

        Said first when the worker begins: what was handed over later went with the process that got it, and is this
        worker's to deliver as a reducer again.
        """

    def accuse(self, peer_id: str, reason: str) -> None:
        """Tell the other members that we have found a peer's work to be bad (never blocks); it lasts 30 rounds.

        `reason` is one short word. Of how many it takes to put a member out: `compression/standing.py`.
        """

    def fetch_contribution(self, peer_id: str, round: int) -> bytes | None:
        """The whole payload that another member of `round` sent in it, handed over by itself, checked as any payload
        and signed by it as what it sent.

        It is there for the newest two rounds, and to each member once. None when it cannot be had: it is gone, cannot
        be dialled, or shows what it has not signed. One that has signed something else for us is accused of it.
        """

    def fetch_round(self, round: int, unlike: Sequence[bytes] = ()) -> Outcome | None:
        """Get the aggregates of a past round from any peer that still has them, to catch up without a download; with
        `unlike`, as it ended for those for whom it did not end with these aggregates."""

    def fetch_state(self, watch: Watch) -> State | None:
        """Download the state that the donors agree on, of several the one with the most work behind it.

        None when nobody can give one, or the download broke off; the next call then goes on where it stopped.
        """

    def serve_state(self, provider: Provider) -> None:
        """Register where newcomers' requests for state are answered from (called from another thread)."""

    def refusals(self) -> Mapping[str, int]:
        """How often this worker has refused a peer or what it sent, by reason, so far."""

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far, all messages of ours counted."""

    def wire_bytes(self) -> int:
        """What that took on the wire, both ways together, headers and encryption included, as nearly as is known."""

    def close(self) -> None:
        """Leave the swarm and free every process, socket and file."""
