"""What a round means to this worker: whether there is anybody to meet, and how the meeting ended.

The verdicts are those of `dtrain.trainer.exchange`: done, alone, no-group, stale.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.compression.belief import MIN_PEERS, enough
from dtrain.compression.errors import PayloadError
from dtrain.dht.averager import SwarmAverager
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.history import RoundRecord, is_same, signers
from dtrain.dht.membership import Contribution
from dtrain.dht.passed_rounds import PassedRounds
from dtrain.dht.reachability import DIRECT

LOOK_AGAIN_S = 0.25
NO_LEADER = (
    "nobody can dial this machine, nor any other worker that is here now: "
    "waiting for one that can be dialled; the round's work is kept"
)
NOBODY = (
    "0 other workers of this run are visible; is this machine online, and is a peer up that others can dial? "
    "Waiting; the round's work is kept"
)

Reply = dict[str, Any]


class Rounds:
    """Takes a worker through rounds, with what the heartbeats say of the others."""

    def __init__(
        self,
        averager: SwarmAverager,
        heartbeats: Heartbeats,
        *,
        is_client: bool,
        may_be_cut_off: Callable[[], bool],
        passed_folder: Path,
    ):
        """`may_be_cut_off()` tells whether others may be there though nobody is seen: then we do not go on alone."""
        self._averager, self._heartbeats = averager, heartbeats
        self.passed = PassedRounds(passed_folder, self._newest, self._past)
        self._is_client, self._may_be_cut_off = is_client, may_be_cut_off
        self._tried = b""  # the newest payload that went into a group

    async def run(self, contribution: Contribution) -> Reply:
        """Take part in a round. Bounded by the manifest's times."""
        started = time.monotonic()
        self.passed.clear()
        while True:
            if self._heartbeats.ahead():
                return await self._as_it_went(contribution)
            problem = self._why_wait()
            if problem:
                waited = time.monotonic() - started
                if waited > self._averager.terms.matchmaking_s:
                    return {"verdict": "no-group", "problem": f"no group within {waited:.0f} s: {problem}"}
                await asyncio.sleep(LOOK_AGAIN_S)
                continue
            await self._averager.judge_residual(contribution.round, self._past)
            if not self._heartbeats.active():
                await self._heartbeats.refresh()  # heard of nobody: we may have been asleep
                if self._heartbeats.active() or self._heartbeats.ahead():
                    continue
                return _reply("alone", await self._averager.run_alone(contribution))
            record = await self._averager.run_round(contribution, self._expected)
            if record is not None:
                self._tried = contribution.payload
            if record is not None and not record.aggregates and not record.stale:
                return {
                    "verdict": "no-group",
                    "problem": f"no span reached anybody: {'; '.join(record.problems)}",
                }
            if record is not None:
                return _reply("stale" if record.stale else "done", record)
            others = self._heartbeats.active()
            if others and not self._heartbeats.ahead():
                waited = time.monotonic() - started
                problem = (
                    f"no group within {waited:.0f} s: {len(others)} other workers are visible; trying again"
                )
                return {"verdict": "no-group", "problem": problem}

    async def _as_it_went(self, contribution: Contribution) -> Reply:
        """The reply for a round that the others have ended. They may have what we sent before our network process died,
        or before we were frozen in the middle of it: then it must not go a second time."""
        was_sent = contribution.was_sent or contribution.payload == self._tried
        past = await self._past(contribution.round) if was_sent else None
        own = str(self._averager.peer_id)
        if past is None or past.base_digest != contribution.base_digest or own not in past.contributors:
            return {"verdict": "stale"}
        return _reply("done", replace(past, undelivered=past.without(own, self._averager.codec)))

    def _why_wait(self) -> str:
        """Why there is nobody to meet, nor a reason to go on alone: that would be a run of our own. Else ""."""
        if self._heartbeats.active():
            return NO_LEADER if self._lacks_a_leader() else ""
        if self._heartbeats.sees_an_archive():
            return ""  # through it others would be seen too
        return NOBODY if self._may_be_cut_off() else ""

    def _expected(self) -> int:
        """How many peers may come to our round, ourselves included; 0 once there is nothing to meet for."""
        if self._heartbeats.ahead() or self._lacks_a_leader():
            return 0
        return len(self._heartbeats.active()) + 1

    def _lacks_a_leader(self) -> bool:
        """Whether nobody here can be dialled, us included: such peers cannot meet. Alone we would leave the run."""
        return self._is_client and not any(record.can_be_dialled for record in self._heartbeats.active())

    async def fetch(self, round: int, unlike: Sequence[bytes] = ()) -> Reply | None:
        """A past round from our disk or from any peer that has it; everything in it checked. See
        `trainer.exchange.Exchange`."""
        past = (None if unlike else self.passed.get(round)) or await self._past(round, unlike)
        return None if past is None else _reply("done", past)

    def _newest(self) -> int:
        return max((int(record.status["round"]) for record in self._heartbeats.donors()), default=0)

    async def _past(self, round: int, unlike: Sequence[bytes] = ()) -> RoundRecord | None:
        """One that most of the reducers that we see have signed, or that enough peers have alike: a liar could lead us
        anywhere by a past round of its own making. Where few are there, nobody can tell."""
        donors = self._heartbeats.donors()
        found: list[RoundRecord] = []
        for record in donors:
            try:
                past = await self._averager.fetch_round(record.peer_id, round)
            except PayloadError as error:
                logging.warning("%s gave a bad past round: %s", record.peer_id, error)
            except Exception as error:  # unreachable, or has it no more
                logging.info("%s cannot give round %d: %r", record.peer_id, round, error)
            else:
                if past.aggregates == list(unlike):
                    continue
                found.append(past)
                alike = sum(is_same(other, past) for other in found)
                if self._is_borne_out(past) or alike >= enough(len(donors)):
                    return past
        return found[0] if found and len(donors) < MIN_PEERS else None

    def _is_borne_out(self, past: RoundRecord) -> bool:
        active = self._heartbeats.active()
        reducers = [r for r in active if r.status.get("reach") == DIRECT] or active
        signed = set(signers(past, self._averager.terms.run_tag))
        return 2 * sum(record.peer_id in signed for record in reducers) > len(reducers)


def _reply(verdict: str, record: RoundRecord) -> Reply:
    fields = record.as_dict()
    fields["problem"] = "; ".join(fields.pop("problems"))
    del fields["stale"], fields["proof"]
    return {"verdict": verdict, **fields}
