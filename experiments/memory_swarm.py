"""Where the workers of an in-memory swarm meet: who is there, who goes into which round, what became of it.

The rules are those of the real exchange: canonical order by peer id, one span per member, the majority's
theta wins, a round begins when everybody who stands at it is there or `matchmaking_s` has passed and a
majority is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dtrain.compression import standing
from dtrain.compression.belief import Belief, stand_of
from dtrain.compression.codec import Codec
from dtrain.experiments.memory_links import INSTANT, Links
from dtrain.experiments.memory_peer import MemoryOutcome, MemoryPeer, fill
from dtrain.experiments.memory_round import (
    Contribution,
    Faults,
    GroupReducer,
    Reduced,
    agree_on_digest,
)
from dtrain.experiments.memory_standing import Judges, Say
from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.exchange import ABSENT, ALONE, DONE, NO_GROUP, STALE
from dtrain.trainer.manifest import Manifest

Tamper = Callable[[int, dict[str, Contribution]], dict[str, Contribution]]
"""(round, members' contributions by peer id, in canonical order) -> what they send instead, of the same members."""

KEPT_ROUNDS = 64
"""Past rounds that each worker can still hand to a straggler."""


@dataclass
class _Meeting:
    """Workers that wait for one round to begin."""

    opened: float
    entries: dict[str, Contribution] = field(default_factory=dict)
    outcomes: dict[str, MemoryOutcome] = field(default_factory=dict)
    begun: bool = False
    finished: bool = False


class Condition(Protocol):
    """What of `threading.Condition` a swarm uses."""

    def __enter__(self) -> object: ...

    def __exit__(self, *args: object) -> object: ...

    def wait(self, timeout: float | None = None) -> object: ...

    def notify_all(self) -> None: ...


class MemorySwarm:
    """The meeting place of the workers of one run in one process."""

    def __init__(
        self,
        manifest: Manifest,
        codec: Codec,
        faults: Faults | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        changed: Condition | None = None,
        links: Links = INSTANT,
        kept_rounds: int = KEPT_ROUNDS,
        observe: Callable[[int, Reduced], None] = lambda round, reduced: None,
        tamper: Tamper = lambda round, entries: entries,
        audits: bool = False,
        network_of: Callable[[str], bytes] = str.encode,
        say: Say = lambda name, said: said,
    ) -> None:
        """`changed` is what the workers wait on and must belong to `clock`; `links` say how long bytes take;
        `observe` sees what every round came to; `tamper` is what hostile members make of their contributions; with
        `audits` the members audit each other's sums; `network_of` and `say` as in `memory_standing.Judges`.
        """
        self.terms, self.clock, self.links = manifest.exchange, clock, links
        self.changed = changed or threading.Condition()
        self._kept_rounds, self._observe, self._tamper = kept_rounds, observe, tamper
        self._beliefs: dict[str, Belief] = {}
        self._newest = -1  # round that was reduced
        self._out: dict[str, int] = {}  # put out, up to and including that round
        self._peers: dict[str, MemoryPeer] = {}
        self._meetings: dict[int, _Meeting] = {}
        self._codec = codec
        self._reducer = GroupReducer(
            codec,
            manifest.run_tag,
            self.terms.exact_up_to,
            faults or Faults(),
            links,
            self.terms.sender_timeout_s,
            self.terms.screens,
            audits,
        )
        self._judges = Judges(manifest, network_of, say)
        self._reducing = threading.Lock()
        self._started = False

    def enter(self, peer_id: str) -> None:
        """Register a worker; one that comes back under its old id begins anew."""
        with self.changed:
            self._peers[peer_id] = MemoryPeer()

    def kill(self, peer_id: str) -> None:
        """Plan a sudden death: from now on the worker's heartbeat is not renewed, and nobody says goodbye."""
        with self.changed:
            self._peers[peer_id].died_at = self.clock.monotonic()
            self.changed.notify_all()

    def leave(self, peer_id: str) -> None:
        """Forget a worker."""
        with self.changed:
            self._peers.pop(peer_id, None)
            self.changed.notify_all()

    def peer(self, peer_id: str) -> MemoryPeer:
        """The record of a worker; callers hold `changed`."""
        return self._peers[peer_id]

    def count_transfer(self, donor: str, receiver: str, num_bytes: int) -> None:
        """A state or a past round goes from one worker to another; callers hold `changed`."""
        for name, up, down in ((donor, num_bytes, 0), (receiver, 0, num_bytes)):
            if name in self._peers:
                self._peers[name].bytes_up += up
                self._peers[name].bytes_down += down

    def others(self, peer_id: str) -> dict[str, MemoryPeer]:
        """Other workers with a fresh heartbeat, in canonical order; callers hold `changed`."""
        return {
            other: peer
            for other, peer in sorted(self._peers.items())
            if other != peer_id
            and peer.announced
            and self.age_s(peer) < self.terms.heartbeat_ttl_s
            and not self._is_out(other)
        }

    def believed(self, peer_id: str) -> set[str]:
        """Others whose word on where they stand this worker believes; callers hold `changed`."""
        others, own = self.others(peer_id), stand_of(self._peers[peer_id].status)
        stands = {name: stand_of(peer.status) for name, peer in others.items() if peer.state != "joining"}
        num_active = sum(peer.state not in ABSENT for peer in others.values())
        belief = self._beliefs.setdefault(peer_id, Belief())
        ahead = belief.ahead(stands, own, num_active, self.clock.monotonic())
        return {name for name, peer in others.items() if peer.work <= own[0] or name in ahead}

    def _is_out(self, peer_id: str) -> bool:
        return self._out.get(peer_id, -1) > self._newest

    def age_s(self, peer: MemoryPeer) -> float:
        """Seconds since the last heartbeat; a living worker's is always new."""
        return 0.0 if peer.died_at is None else self.clock.monotonic() - peer.died_at

    # ------------------------------------------------------------------ meeting

    def run_round(self, round: int, contribution: Contribution) -> MemoryOutcome:
        """See `Exchange.run_round`."""
        name, now = contribution.peer_id, self.clock.monotonic
        self._pass(self.links.codec_s(name))
        started = now()
        if self._is_out(name):
            self._pass(self.terms.matchmaking_s)
            return MemoryOutcome(NO_GROUP, round, problem="the others do not let this machine take part")
        with self.changed:
            meeting = self._meetings.setdefault(round, _Meeting(started))
            meeting.entries[name] = contribution
            try:
                verdicts = self._meet(meeting, name, round)
            except BaseException:  # a planned death while it waited
                self._withdraw(meeting, name, round)
                raise
        if meeting.begun:
            self._pass(self.links.meet_s(list(meeting.entries)))
        met = now()
        if verdicts is not None:
            self._run(meeting, round, verdicts)
        elif not meeting.begun:
            return MemoryOutcome(STALE, round, wait_s=met - started)
        elif not self._ends_in_time(meeting):
            return MemoryOutcome(NO_GROUP, round, problem="the round did not end in time")
        outcome = meeting.outcomes[name]
        self._pass(outcome.exchange_s)
        return replace(outcome, wait_s=met - started, exchange_s=now() - met)

    def _meet(self, meeting: _Meeting, name: str, round: int) -> dict[str, str] | None:
        """Wait until the meeting begins; everybody's verdict for the one that began it. One that is behind leaves."""
        while not meeting.begun:
            missing_s = meeting.opened + self.terms.matchmaking_s - self.clock.monotonic()
            if self._is_behind(name, round):
                self._withdraw(meeting, name, round)
                return None
            if self._is_complete(meeting, round) or missing_s <= 0:
                meeting.begun = True
                del self._meetings[round]
                self.changed.notify_all()
                return self._verdicts(meeting, round)
            # A heartbeat that runs out notifies nobody, so look again now and then.
            self.changed.wait(min(missing_s, self.terms.heartbeat_s))
        return None

    def _ends_in_time(self, meeting: _Meeting) -> bool:
        until = self.clock.monotonic() + self.terms.round_timeout_s
        with self.changed:
            while not meeting.finished and (left_s := until - self.clock.monotonic()) > 0:
                self.changed.wait(left_s)
        return meeting.finished

    def _pass(self, seconds: float) -> None:
        if seconds > 0:
            self.clock.sleep(seconds)

    def release_residual(self, name: str, *, all: bool) -> list[tuple[int, int, bytes]]:
        """See `Exchange.release_residual`."""
        with self._reducing:
            return self._reducer.release_residual(name, all=all)

    def _withdraw(self, meeting: _Meeting, name: str, round: int) -> None:
        meeting.entries.pop(name, None)
        if not meeting.entries and self._meetings.get(round) is meeting:
            del self._meetings[round]

    def _is_behind(self, name: str, round: int) -> bool:
        """Others are in a later round, or have finished with more work than this worker has."""
        others, own, believed = self.others(name), self._peers[name].work, self.believed(name)
        return any(
            peer.position > round
            if peer.state not in ABSENT
            else peer.state == "finished" and peer.work > own
            for other, peer in others.items()
            if other in believed
        )

    def _standing(self, round: int) -> set[str]:
        """Live workers that will come to this round."""
        alive = self.others("")
        return {name for name, peer in alive.items() if peer.position == round and peer.state not in ABSENT}

    def _is_complete(self, meeting: _Meeting, round: int) -> bool:
        return self._may_start(round) and self._standing(round) <= meeting.entries.keys()

    def _may_start(self, round: int) -> bool:
        """Round 0 waits until enough workers have been there at once; whoever leaves later ends nothing."""
        self._started = self._started or len(self._standing(0)) >= self.terms.start_workers
        return round > 0 or self._started

    def _verdicts(self, meeting: _Meeting, round: int) -> dict[str, str]:
        """Every entrant's verdict, now that the meeting is over."""
        names = meeting.entries.keys()
        expected = len(self._standing(round) | names)
        too_few = len(names) < expected // 2 + 1  # two halves of a swarm must never both go on
        if too_few or not self._may_start(round):
            return dict.fromkeys(names, NO_GROUP)
        agreed = agree_on_digest(list(meeting.entries.values()))
        verdict = DONE if len(names) > 1 else ALONE
        stands = {name: entry.base_digest == agreed for name, entry in meeting.entries.items()}
        return {name: verdict if agrees else STALE for name, agrees in stands.items()}

    # ------------------------------------------------------------------ reducing

    def _run(self, meeting: _Meeting, round: int, verdicts: Mapping[str, str]) -> None:
        """Reduce for all members, in the thread of the one that completed the meeting."""
        names = sorted(name for name, verdict in verdicts.items() if verdict in (DONE, ALONE))
        failed = MemoryOutcome(NO_GROUP, round, problem="the round failed in another member")
        meeting.outcomes = dict.fromkeys(verdicts, failed)
        try:
            with self._reducing:
                entries = self._tamper(round, {name: meeting.entries[name] for name in names})
                with self.changed:
                    seen = {name: peer.observations for name, peer in self._peers.items()}
                    num_out = sum(map(self._is_out, self._out))
                    counted, accused = self._judges.judge(round, entries, seen, num_out)
                reduced = self._reducer.reduce(round, list(counted.values()))
                reduced.sentences += self._reducer.put_out(round, accused)
                self._newest = max(self._newest, round)
                self._out.update((sentence.peer_id, sentence.until) for sentence in reduced.sentences)
                self._observe(round, reduced)
            outcomes = {
                name: MemoryOutcome(STALE, round, problem="the others have found its work to be bad")
                if name in accused
                else MemoryOutcome(verdict, round, meeting.entries[name].base_digest)
                for name, verdict in verdicts.items()
            }
            names = list(counted)
            meeting.outcomes = outcomes | {name: fill(outcomes[name], name, names, reduced) for name in names}
            self._remember(meeting, round, names, reduced, entries)
        finally:
            with self.changed:
                meeting.finished = True
                self.changed.notify_all()

    def _remember(
        self,
        meeting: _Meeting,
        round: int,
        names: Sequence[str],
        reduced: Reduced,
        entries: Mapping[str, Contribution],
    ) -> None:
        seen = standing.counted(self._codec, names, reduced.aggregates)
        with self.changed:
            for name in names:
                peer = self._peers.get(name)
                if peer is None:  # left while the round ran
                    continue
                peer.next_round = round + 1
                peer.contributed(round, entries[name].payload)
                peer.observations.note(round, seen)
                peer.bytes_up += reduced.bytes_up[name]
                peer.bytes_down += reduced.bytes_down[name]
                peer.history[round] = meeting.outcomes[name]
                while len(peer.history) > self._kept_rounds:
                    peer.history.popitem(last=False)
            self.changed.notify_all()
