"""Who does what in the demo, and when: decided by the rounds that the swarm has completed, never by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtrain.experiments.demo_process import DemoProcess
from dtrain.experiments.demo_watch import SwarmView, WorkerView
from dtrain.trainer.errors import RunError

START_SLOWDOWN = 2.0  # starting beside workers that train takes longer than starting before them
MIN_CAST = 4  # one leaves, one is killed, and two must be left to compare
ORIGINS = {
    "peers": "with the weights of its peers",
    "fresh": "from the run's first weights",
    "checkpoint": "from its checkpoint",
}
ALIVE, LEFT, KILLED, FINISHED, FAILED = "alive", "left", "killed", "finished", "failed"


@dataclass(frozen=True)
class Script:
    """When things happen, in rounds of the run."""

    rounds: int
    join: int  # the latecomers are started so as to be in about this round
    leave: int  # worker-1 gets Ctrl-C once this many rounds are done
    kill: int  # worker-2 gets SIGKILL once this many rounds are done

    @classmethod
    def of(cls, rounds: int) -> Script:
        """The script of a run: 20 rounds join at 5, leave after 12, kill after 15."""
        return cls(
            rounds, join=min(5, max(2, rounds // 4)), leave=round(0.6 * rounds), kill=round(0.75 * rounds)
        )


@dataclass
class Member:
    """A worker of the cast: its part, its process once it is started, and what can be seen of it."""

    view: WorkerView
    late: bool = False
    process: DemoProcess | None = None
    fate: str = ALIVE
    ready_s: float = 0.0  # from the command until it stood in the run

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.exit_code is None


@dataclass
class Cast:
    """The demo's workers. After each refresh of its swarm, `play` does whatever is due."""

    members: list[Member]
    script: Script
    start: Callable[[Member], DemoProcess]
    tell: Callable[[str], None]
    training_since: float = 0.0

    @classmethod
    def of(
        cls,
        num_first: int,
        rounds: int,
        base: Path,
        start: Callable[[Member], DemoProcess],
        tell: Callable[[str], None],
    ) -> Cast:
        """`num_first` workers begin and one comes late; more come late when fewer than three begin."""
        names = [f"worker-{n + 1}" for n in range(max(num_first + 1, MIN_CAST))]
        views = [WorkerView(name, base / name / "metrics.jsonl") for name in names]
        members = [Member(view, late=n >= num_first) for n, view in enumerate(views)]
        return cls(members, Script.of(rounds), start, tell)

    @property
    def swarm(self) -> SwarmView:
        return SwarmView([member.view for member in self.members])

    @property
    def leaver(self) -> Member:
        return self.members[0]  # the one that began the run: nobody is indispensable

    @property
    def victim(self) -> Member:
        return self.members[1]

    def play(self) -> None:
        """Start, stop and kill what is due, as far as the views are refreshed."""
        self._notice()
        self._begin()
        if not self.training_since and any(m.view.state == "training" for m in self.members):
            self.training_since = time.monotonic()
        done = self.swarm.rounds_done
        self._bring_in_latecomers(done)
        last_call = self.script.rounds - done
        if self._is_due(self.leaver, self.script.leave, 2, self._latecomers_are_in()):
            self.tell(f"{self.leaver.name}, which began the run, leaves: Ctrl-C during round {done + 1}")
            self._end(self.leaver, LEFT)
        elif last_call > 0 and self._is_due(self.victim, self.script.kill, 1, not self.leaver.running):
            self.tell(f"{self.victim.name} is killed with SIGKILL during round {done + 1}")
            self._end(self.victim, KILLED)

    @property
    def over(self) -> bool:
        """Everybody has been on stage and nobody is any more."""
        return all(member.process is not None and not member.running for member in self.members)

    @property
    def failed(self) -> list[Member]:
        return [member for member in self.members if member.fate == FAILED]

    def _begin(self) -> None:
        """The first worker begins the run; the other first ones find it as soon as it is there."""
        if self.members[0].process is None:
            self._bring_in(self.members[0])
        elif self.members[0].view.peer_id:
            for member in self.members:
                if member.process is None and not member.late:
                    self._bring_in(member)

    def _bring_in_latecomers(self, done: int) -> None:
        """Start them early enough to be in the round that the script says, as fast as rounds go here.

        Not before round 1 is done: until then there is nothing to get from peers.
        """
        if not done:
            return
        round_s = (time.monotonic() - self.training_since) / done
        start_s = START_SLOWDOWN * max(member.ready_s for member in self.members)
        in_at = done + start_s / round_s + 1
        for member in self.members:
            if member.late and member.process is None and in_at >= self.script.join:
                self.tell(f"{member.name} is started while round {done + 1} is under way")
                self._bring_in(member)

    def _bring_in(self, member: Member) -> None:
        member.process = self.start(member)

    def _latecomers_are_in(self) -> bool:
        return all(member.view.contributed for member in self.members if member.late)

    def _is_due(self, member: Member, after: int, spare: int, ready: bool) -> bool:
        """At `after` rounds if the stage is `ready`, at the latest `spare` rounds before the end."""
        done = self.swarm.rounds_done
        if member.fate != ALIVE or not member.running or member.view.state != "training":
            return False
        return (done >= after and ready) or done >= self.script.rounds - spare

    def _end(self, member: Member, fate: str) -> None:
        assert member.process is not None
        member.fate = fate
        if fate == KILLED:
            member.process.kill()
        else:
            member.process.interrupt()

    def _notice(self) -> None:
        """Who has arrived, and who has ended how."""
        for member in self.members:
            process, view = member.process, member.view
            if process is None:
                continue
            if view.joined_from and not member.ready_s:
                member.ready_s = time.monotonic() - process.started
                if member.late:
                    origin = ORIGINS[view.joined_from]
                    self.tell(f"{member.name} is in {origin}, {member.ready_s:.0f} s after its start")
            code = process.exit_code
            if member.fate == ALIVE and code is not None:
                member.fate = FINISHED if code == 0 else FAILED
            elif member.fate == LEFT and code not in (None, 0):
                member.fate = FAILED
        first_ones_ended = all(m.process and not m.running for m in self.members if not m.late)
        if first_ones_ended and not self.failed and not all(m.view.joined_from for m in self.members):
            raise RunError("the run was over before the latecomer was in: type a larger --rounds")
