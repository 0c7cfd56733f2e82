"""What counts of the members of a group, by what they say of each other.

Each member tells its group a little of every other one: in how many of the last rounds it has seen its contribution
counted, from which network it is connected with it, and whether it has found its work to be bad. All get the same
statements, so all come to the same answer, whoever they are:

    accused by more than a third of the members: not in the round     (never more than a third of all are out)
    new here: counts for FIRST_SHARE of its weight at first, for all of it after PROBATION rounds
    several that have one origin, a token or a network: count for a limited share of all weights together

Nobody's word on itself counts, and no third of the members can make, move or unmake another's standing. Groups of up
to four say too little about each other.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dtrain.compression.belief import enough
from dtrain.compression.screen import MIN_MEMBERS
from dtrain.compression.verdicts import OUT_ROUNDS

PROBATION = 5  # rounds
FIRST_SHARE = 0.25
REMEMBERED = 30  # rounds that are looked back: who was away for longer is new again
MAX_PEERS = 4096
MIN_GROUPS = 3  # of origins: of two, nobody can say which one is too many
ACCUSED = "accused"
"""Why a member is put out, beside those of wire.REFUSALS."""


@dataclass(frozen=True)
class Said:
    """What one member says of another."""

    rounds: int = 0
    """In which it saw its contribution counted, up to PROBATION."""
    network: bytes = b""
    """The first bytes of its address, as this connection has it; b"" where it is not known."""
    accuses: bool = False


NOTHING = Said()


@dataclass(frozen=True)
class Testimony:
    """What one member says."""

    of: Mapping[str, Said] = field(default_factory=dict)
    """By peer id."""
    num_out: int = 0
    """Peers that are put out for it."""


@dataclass(frozen=True)
class Candidate:
    """Who has come to a round."""

    peer_id: str
    weight: float
    """Tokens."""
    testimony: Testimony = Testimony()
    origin: bytes = b""
    """Of its right to be here, as nobody can doubt it (a token); b"" where the others say which network it is of."""


class Observations:
    """What one member has seen of the others in the last rounds."""

    def __init__(self) -> None:
        self._counted: OrderedDict[int, frozenset[str]] = OrderedDict()
        self._accused: OrderedDict[str, int] = OrderedDict()  # until which round

    def note(self, round: int, contributors: Iterable[str]) -> None:
        """Whose contributions count in a round, by its checked aggregates."""
        self._counted[round] = frozenset(contributors)
        while len(self._counted) > REMEMBERED:
            del self._counted[min(self._counted)]

    def accuse(self, peer_id: str, round: int) -> None:
        """In that round a peer's work was found to be bad."""
        self._accused[peer_id] = max(self._accused.get(peer_id, 0), round + OUT_ROUNDS)
        while len(self._accused) > MAX_PEERS:
            self._accused.popitem(last=False)

    def of(self, peers: Collection[str], round: int, networks: Mapping[str, bytes]) -> dict[str, Said]:
        """What there is to say of these peers before a round."""
        recent = [seen for number, seen in self._counted.items() if round - REMEMBERED <= number < round]
        said = {
            peer: Said(
                min(PROBATION, sum(peer in seen for seen in recent)),
                networks.get(peer, b""),
                self._accused.get(peer, -1) >= round,
            )
            for peer in peers
        }
        return {peer: words for peer, words in said.items() if words != NOTHING}


# ---------------------------------------------------------------------- what a group makes of it


def accused(candidates: Sequence[Candidate]) -> set[str]:
    """Who is put out of the round, those with the most accusers first; ties go to the smaller peer id."""
    if len(candidates) < MIN_MEMBERS:
        return set()
    out = _middle([candidate.testimony.num_out for candidate in candidates])
    most = max(0, (len(candidates) + out) // 3 - out)
    accusers = {c.peer_id: sum(said.accuses for said in _said_of(c, candidates)) for c in candidates}
    guilty = [peer for peer, number in accusers.items() if number >= enough(len(candidates))]
    return set(sorted(guilty, key=lambda peer: (-accusers[peer], peer))[:most])


def counts(candidates: Sequence[Candidate], max_share: float) -> dict[str, float]:
    """By peer id, what counts of everybody's weight; all of it where all are alike.

    max_share: of all that counts, at most for members of one origin; 1 = there is no limit.
    """
    weights = {candidate.peer_id: candidate.weight for candidate in candidates}
    if len(candidates) < MIN_MEMBERS:
        return weights
    known = {c.peer_id: _middle([said.rounds for said in _said_of(c, candidates)]) for c in candidates}
    factors = {peer: FIRST_SHARE + (1 - FIRST_SHARE) * rounds / PROBATION for peer, rounds in known.items()}
    most = max(factors.values())
    found = {peer: weight * (factors[peer] / most) for peer, weight in weights.items()}
    return _limited(found, _origins(candidates), max_share)


def _said_of(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Said]:
    """By the others, of whom some may say nothing."""
    peer = candidate.peer_id
    return [other.testimony.of.get(peer, NOTHING) for other in candidates if other.peer_id != peer]


def _middle(values: Sequence[int]) -> int:
    """The median, of an even number the lower one."""
    return sorted(values)[(len(values) - 1) // 2]


def _origins(candidates: Sequence[Candidate]) -> list[list[str]]:
    """Peer ids of the members of each origin; whose origin is not known has one of its own.

    A network that a third of the members or less says may be the word of liars.
    """
    groups: dict[bytes, list[str]] = {}
    for candidate in candidates:
        origin = candidate.origin
        if not origin:
            said = Counter(said.network for said in _said_of(candidate, candidates) if said.network)
            ranked = sorted(said, key=lambda network: (-said[network], network))
            is_known = bool(ranked) and said[ranked[0]] >= enough(len(candidates))
            origin = b"network " + ranked[0] if is_known else b"peer " + candidate.peer_id.encode()
        groups.setdefault(origin, []).append(candidate.peer_id)
    return list(groups.values())


def _limited(weights: dict[str, float], groups: Sequence[list[str]], max_share: float) -> dict[str, float]:
    """The same weights, with those of each group made smaller until it has at most that share of all.

    A single peer is no crowd: how much it may count is the screen's to say. A group of more than half of the members
    is the swarm itself, as in one house or with one invite for all: to limit it would hand the run to the few others.
    """
    sums = [math.fsum(weights[peer] for peer in group) for group in groups]
    may_be_limited = [1 < len(group) <= len(weights) / 2 for group in groups]
    share = max(max_share, 1 / len(groups))
    if len(groups) < MIN_GROUPS or share >= 1:
        return weights
    limit = _level(
        [total for total, limited in zip(sums, may_be_limited, strict=True) if limited],
        math.fsum(sums),
        share,
    )
    result = dict(weights)
    for group, total, limited in zip(groups, sums, may_be_limited, strict=True):
        if limited and total > limit:
            result.update((peer, weights[peer] * (limit / total)) for peer in group)
    return result


def _level(sums: Sequence[float], total: float, share: float) -> float:
    """To what the largest of `sums`, parts of `total`, must be cut for none to be more than `share` of what is left."""
    level, left = math.inf, total
    for number, largest in enumerate(sorted(sums, reverse=True)):
        if share * number >= 1 or largest <= share * left / (1 - share * number):
            break
        left -= largest
        level = share * left / (1 - share * (number + 1))
    return level
