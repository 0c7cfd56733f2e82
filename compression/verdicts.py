"""Who is put out of a run for what reducers say of it.

Each recompressed aggregate names the members that its reducer has left out, and why. All members have the same
aggregates, so all count the same verdicts, whoever they are and wherever they run; a reducer that judges wrongly can be
convicted by an audit (`audit.py`), and one alone decides nothing.

    condemned in a round: refused by more than half of its reducers, of MIN_REDUCERS at least
    put out: condemned in BLATANT of the last WINDOW rounds for what it sent, or in TARDY of them for coming late too
    for OUT_ROUNDS rounds, and never more than a third of all at once
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.compression.codec import Codec

MIN_REDUCERS = 3
WINDOW, BLATANT, TARDY = 10, 3, 6  # rounds
OUT_ROUNDS = 30
LATE = "late"
ACCUSED = "accused"
"""Why a member is put out, beside those of wire.REFUSALS."""


@dataclass(frozen=True)
class Sentence:
    """A member is put out up to and including a round."""

    peer_id: str
    until: int
    reason: str
    """ACCUSED, or one of wire.REFUSALS: the one that was given most often."""


class Verdicts:
    """The verdicts of the last rounds of one run."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self._condemned: OrderedDict[int, dict[str, Counter[str]]] = OrderedDict()
        self._until: dict[str, int] = {}

    def note(self, round: int, members: Sequence[str], aggregates: Sequence[bytes]) -> list[Sentence]:
        """A round counts, with these checked aggregates; who is put out because of it."""
        if round in self._condemned:
            return []
        self._condemned[round] = self._condemn(members, aggregates)
        for number in [number for number in self._condemned if number <= round - WINDOW]:
            del self._condemned[number]
        self._until = {peer: until for peer, until in self._until.items() if until > round}
        out = set(self._until)
        most = len(out.union(members)) // 3
        sentences = []
        for peer in sorted(self._condemned[round].keys() - out):
            if len(out) < most and self._is_enough(peer):
                out.add(peer)
                self._until[peer] = round + OUT_ROUNDS
                sentences.append(Sentence(peer, round + OUT_ROUNDS, self._reason(peer)))
        return sentences

    def accused(self, round: int, peers: Sequence[str]) -> list[Sentence]:
        """These are put out before a round because of what its members say (`standing.py`); who is out already is not
        told again."""
        new = [peer for peer in peers if self._until.get(peer, -1) <= round]
        self._until.update(dict.fromkeys(new, round + OUT_ROUNDS))
        return [Sentence(peer, round + OUT_ROUNDS, ACCUSED) for peer in new]

    def _condemn(self, members: Sequence[str], aggregates: Sequence[bytes]) -> dict[str, Counter[str]]:
        """By peer id: reasons that reducers gave, of those that most of them refused."""
        given: dict[str, Counter[str]] = {}
        judged = [aggregate for aggregate in aggregates if not self._codec.union(aggregate)]
        for aggregate in judged:
            for index, reason in self._codec.refused(aggregate).items():
                given.setdefault(members[index], Counter())[reason] += 1
        if len(judged) < MIN_REDUCERS:
            return {}
        return {peer: reasons for peer, reasons in given.items() if 2 * reasons.total() > len(judged)}

    def _is_enough(self, peer: str) -> bool:
        rounds = [given[peer] for given in self._condemned.values() if peer in given]
        blatant = [reasons for reasons in rounds if reasons.total() > 2 * reasons[LATE]]
        return len(blatant) >= BLATANT or len(rounds) >= TARDY

    def _reason(self, peer: str) -> str:
        total: Counter[str] = Counter()
        for given in self._condemned.values():
            total.update(given.get(peer, {}))
        return max(sorted(total), key=lambda reason: total[reason])
