"""What the members of an in-memory swarm say of each other, and what they make of it: as over the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from dtrain.compression import standing
from dtrain.compression.screen import MIN_MEMBERS
from dtrain.compression.standing import Candidate, Observations, Said, Statement
from dtrain.experiments.memory_round import Contribution
from dtrain.trainer.manifest import Manifest

Say = Callable[[str, dict[str, Said]], dict[str, Said]]
"""(peer id, what it has to say of each other member) -> what it says."""


class Judges:
    """All members of a swarm. `network_of(peer id)` is where each is; `say` what hostile ones make of their words."""

    def __init__(self, manifest: Manifest, network_of: Callable[[str], bytes], say: Say):
        terms = manifest.exchange
        self._least = max(MIN_MEMBERS, terms.exact_up_to + 1) if terms.screens else math.inf
        self._max_share = manifest.admission.max_share
        self._network_of, self._say = network_of, say

    def judge(
        self,
        round: int,
        entries: Mapping[str, Contribution],
        seen: Mapping[str, Observations],
        num_out: int,
    ) -> tuple[dict[str, Contribution], list[str]]:
        """What counts of the members' contributions, and whom they put out, beside those that are out already."""
        if len(entries) < self._least:
            return dict(entries), []
        networks = {name: self._network_of(name) for name in entries}
        candidates = []
        for name, entry in entries.items():
            others = [other for other in entries if other != name]
            said = seen[name].of(others, round, networks) if name in seen else {}
            candidates.append(Candidate(name, entry.weight, Statement(self._say(name, said), num_out)))
        accused = standing.accused(candidates)
        candidates = [candidate for candidate in candidates if candidate.peer_id not in accused]
        shares = dict.fromkeys(entries, 1.0)
        if len(candidates) >= self._least:
            shares = standing.shares(candidates, self._max_share)
        kept = {name: entries[name] for name in entries if name not in accused}
        return {name: replace(e, weight=e.weight * shares[name]) for name, e in kept.items()}, accused
