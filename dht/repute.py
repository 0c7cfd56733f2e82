"""A member's part in what its group makes of everybody: what it says of the others, whom it has nothing to do with any
more because of what all say (`compression/standing.py`) or of the reducers' verdicts (`compression/verdicts.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from hivemind.p2p import P2P

from dtrain.compression.codec import Codec
from dtrain.compression.screen import MIN_MEMBERS
from dtrain.compression.standing import Observations, counted
from dtrain.compression.verdicts import ACCUSED, Sentence, Verdicts
from dtrain.dht.door import OPEN
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.history import RoundRecord
from dtrain.dht.membership import Agreed, Judging
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.statements import networks
from dtrain.dht.terms import RunTerms
from dtrain.dht.tokens import reason_text


class Repute:
    """Of one member in a run."""

    def __init__(self, codec: Codec, terms: RunTerms, own_id: str, heartbeats: Heartbeats):
        self._codec, self._own_id, self._heartbeats = codec, own_id, heartbeats
        self.observations = Observations()
        self._verdicts = Verdicts(codec)
        least = max(MIN_MEMBERS, terms.exact_up_to + 1) if terms.screens else math.inf
        self.judging = Judging(least, terms.max_share, self._origin)

    def _origin(self, peer_id: str, shown: object) -> bytes:
        admissions = self._heartbeats.admissions
        return b"" if admissions is None else admissions.door.origin(peer_id, shown)

    # ------------------------------------------------------------------ saying

    async def words(self, p2p: P2P, round: int) -> dict[str, Any]:
        """What `pack_hello` is to say of the others that come to this round; nothing where too few are there."""
        peers = [record.peer_id for record in self._heartbeats.active()]
        if len(peers) + 1 < self.judging.least:
            return {}
        said = self.observations.of(peers, round, await self._networks(p2p))
        return {"said": said, "num_out": self._heartbeats.outcasts.num_out}

    async def _networks(self, p2p: P2P) -> dict[str, bytes]:
        admissions = self._heartbeats.admissions
        if self.judging.max_share >= 1 or (admissions is not None and admissions.door.admission.mode != OPEN):
            return {}
        try:
            return await networks(p2p)
        except Exception as error:  # the daemon's client raises many types
            logging.info("it is not known from where others are connected: %r", error)
            return {}

    def accuse(self, peer_id: str, reason: str) -> None:
        """We have found its work to be bad, just now."""
        self._heartbeats.count(reason)
        self.observations.accuse(peer_id, int(self._heartbeats.status["round"]))

    # ------------------------------------------------------------------ hearing

    def hear(self, round: int, agreed: Agreed) -> list[str]:
        """What a group has agreed on before a round; lines for those who watch, if they are ours to tell."""
        less = [f"{member.peer_id} for {member.share:.3f}" for member in agreed.members if member.share < 1]
        if less:
            logging.info("in round %d these count for a part of their weight: %s", round, ", ".join(less))
        members = [member.peer_id for member in agreed.members]
        told = self._carry_out(self._verdicts.accused(round, agreed.accused), members)
        return [reason_text(f"put-out-{ACCUSED}")] if self._own_id in agreed.accused else told

    def note(self, record: RoundRecord) -> None:
        """A round counts: who is in most of its sums."""
        self.observations.note(record.round, counted(self._codec, record.members, record.aggregates))

    def judge(self, runner: RoundRunner, record: RoundRecord) -> None:
        """A round counts in which sums were compressed again: what its reducers say of the members."""
        members = [member.peer_id for member in runner.members]
        sentences = self._verdicts.note(runner.setting.round, members, runner.aggregates)
        record.problems.extend(self._carry_out(sentences, members))

    def _carry_out(self, sentences: Sequence[Sentence], members: Sequence[str]) -> list[str]:
        for sentence in sentences:
            peer_id, reason = sentence.peer_id, f"put-out-{sentence.reason}"
            self._heartbeats.count(reason)
            if peer_id != self._own_id:
                self._heartbeats.outcasts.put_out(peer_id, sentence.until, reason)
            logging.warning("%s is put out up to round %d: %s", peer_id, sentence.until, sentence.reason)
        if self._own_id != min(set(members) - {s.peer_id for s in sentences}, default=""):
            return []  # once for all who watch
        return [
            f"{s.peer_id} is put out up to round {s.until}: {reason_text(f'put-out-{s.reason}')}"
            for s in sentences
        ]
