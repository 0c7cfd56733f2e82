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
import statistics
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dtrain.compression.belief import enough
from dtrain.compression.codec import Codec
from dtrain.compression.screen import MIN_MEMBERS, WEIGHT_LIMIT
from dtrain.compression.verdicts import OUT_ROUNDS

PROBATION = 5  # rounds
FIRST_SHARE = 0.25
REMEMBERED = 30  # rounds that are looked back: who was away for longer is new again
MAX_PEERS = 4096
MIN_GROUPS = 3  # of origins: of two, nobody can say which one is too many
ROUNDING = 1e-9


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
class Statement:
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
    statement: Statement = Statement()
    origin: bytes = b""
    """Of its right to be here, as nobody can doubt it (a token); b"" where the others say which network it is of."""


class Observations:
    """What one member has seen of the others in the last rounds."""

    def __init__(self) -> None:
        self._counted: dict[int, list[str]] = {}
        self._rounds: Counter[str] = Counter()  # in those, by peer id
        self._accused: OrderedDict[str, int] = OrderedDict()  # until which round

    def note(self, round: int, counted: Iterable[str]) -> None:
        """Whose contributions count in a round; see `counted`."""
        if round not in self._counted:
            self._counted[round] = list(counted)
            self._rounds.update(self._counted[round])

    def accuse(self, peer_id: str, round: int) -> None:
        """In that round a peer's work was found to be bad."""
        self._accused[peer_id] = max(self._accused.get(peer_id, 0), round + OUT_ROUNDS)
        while len(self._accused) > MAX_PEERS:
            self._accused.popitem(last=False)

    def of(self, peers: Iterable[str], round: int, networks: Mapping[str, bytes]) -> dict[str, Said]:
        """What there is to say of these peers before a round."""
        for number in [number for number in self._counted if not round - REMEMBERED <= number < round]:
            self._rounds.subtract(self._counted.pop(number))
        said = {
            peer: Said(
                min(PROBATION, self._rounds[peer]),
                networks.get(peer, b""),
                self._accused.get(peer, -1) >= round,
            )
            for peer in peers
        }
        return {peer: words for peer, words in said.items() if words != NOTHING}


def counted(codec: Codec, members: Sequence[str], aggregates: Sequence[bytes]) -> list[str]:
    """Members whose contributions are in most of a round's checked aggregates."""
    inside = Counter(members[index] for aggregate in aggregates for index, _ in codec.contributors(aggregate))
    return [peer for peer, number in inside.items() if 2 * number > len(aggregates)]


# ---------------------------------------------------------------------- what a group makes of it


def accused(candidates: Sequence[Candidate]) -> list[str]:
    """Who is put out of the round, those with the most accusers first; of equal ones the smaller peer ids."""
    if len(candidates) < MIN_MEMBERS:
        return []
    out = _middle([candidate.statement.num_out for candidate in candidates])
    most = max(0, (len(candidates) + out) // 3 - out)
    accusers = {c.peer_id: sum(said.accuses for said in _said_of(c, candidates)) for c in candidates}
    guilty = [peer for peer, number in accusers.items() if number >= enough(len(candidates))]
    return sorted(guilty, key=lambda peer: (-accusers[peer], peer))[:most]


def shares(candidates: Sequence[Candidate], max_share: float) -> dict[str, float]:
    """By peer id, for how much of its weight everybody counts; 1 where all are alike.

    A weight is looked at up to WEIGHT_LIMIT times the median, as the screen does. max_share: of all that counts, at
    most for the members of one origin; 1 = there is no limit.
    """
    if len(candidates) < MIN_MEMBERS:
        return {candidate.peer_id: 1.0 for candidate in candidates}
    weights = {candidate.peer_id: candidate.weight for candidate in candidates}
    most_weight = WEIGHT_LIMIT * statistics.median(weights.values())
    rounds = {c.peer_id: _middle([said.rounds for said in _said_of(c, candidates)]) for c in candidates}
    trust = {peer: FIRST_SHARE + (1 - FIRST_SHARE) * number / PROBATION for peer, number in rounds.items()}
    most_trust = max(trust.values())
    found = {
        peer: min(1.0, most_weight / weight) * (trust[peer] / most_trust) for peer, weight in weights.items()
    }
    for group, factor in _limits(
        {peer: weights[peer] * found[peer] for peer in weights}, _origins(candidates), max_share
    ):
        found.update((peer, found[peer] * factor) for peer in group)
    return found


def _said_of(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Said]:
    """By the others, of whom some may say nothing."""
    peer = candidate.peer_id
    return [other.statement.of.get(peer, NOTHING) for other in candidates if other.peer_id != peer]


def _middle(values: Sequence[int]) -> int:
    """The median, of an even number the lower one."""
    return sorted(values)[(len(values) - 1) // 2]


def _origins(candidates: Sequence[Candidate]) -> list[list[str]]:
    """Peer ids of the members of each origin; whose origin is not known has one of its own.

    A network that a third of the members or less name may be the word of liars.
    """
    groups: dict[bytes, list[str]] = {}
    for candidate in candidates:
        origin = b"token" + candidate.origin
        if not candidate.origin:
            said = Counter(said.network for said in _said_of(candidate, candidates) if said.network)
            named = sorted(said, key=lambda network: (-said[network], network))
            is_known = bool(named) and said[named[0]] >= enough(len(candidates))
            origin = b"network" + named[0] if is_known else b"peer" + candidate.peer_id.encode()
        groups.setdefault(origin, []).append(candidate.peer_id)
    return list(groups.values())


def _limits(
    weights: Mapping[str, float], groups: Sequence[Sequence[str]], max_share: float
) -> list[tuple[Sequence[str], float]]:
    """Groups that have more than that share of all weights, and the factor that leaves them just that.

    One peer alone is no crowd: how much it may count is the screen's to say. A group of more than half of the members
    is the swarm itself, as in one house or with one invite for all: to limit it would hand the run to the few others.
    Of two groups nobody can say which one is too many.
    """
    share = max(max_share, 1 / len(groups))
    if len(groups) < MIN_GROUPS or share >= 1:
        return []
    crowds = [group for group in groups if 1 < len(group) <= len(weights) / 2]
    sums = {id(group): math.fsum(weights[peer] for peer in group) for group in crowds}
    crowds.sort(key=lambda group: (-sums[id(group)], group[0]))
    rest = math.fsum(weights.values())
    level = math.inf
    for number, group in enumerate(crowds):
        largest = sums[id(group)]
        if largest <= (1 + ROUNDING) * share * rest / (1 - share * number):
            break
        inside = {peer for crowd in crowds[: number + 1] for peer in crowd}
        rest = math.fsum(weight for peer, weight in weights.items() if peer not in inside)
        level = share * rest / (1 - share * (number + 1))
    return [(group, level / sums[id(group)]) for group in crowds if sums[id(group)] > level]
