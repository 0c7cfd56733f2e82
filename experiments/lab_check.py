"""The accounting checker: from the workers' signed journals it proves what became of every delta (after Jepsen's way).

It believes no summary and no counter, only what each worker has signed at the moment it happened (`trainer.journal`),
and holds the journals against each other. What it proves of a run, or names the entry that contradicts it:

journal     every entry is signed by its worker, and none was changed, left out or added
once        every chunk of every payload is in exactly one aggregate of the run's history, or back in its worker's error
            feedback (what is in both, after a split, is taken out of the feedback when the worker learns of it); that
            of a worker that died before it knew is in at most one aggregate. Of two payloads that a worker has made for
            one round, of which the first came back, aggregates hold the one that it says, unless they weigh more than
            that one: they tell weights, not payloads
agreed      who applied a round applied the same aggregates, and they give one digest
made        whoever is in an aggregate made that payload, on that base, with that weight
chain       every round continues the theta that its worker stood at
one         the rounds that were applied form one history. Where a scenario splits the swarm they may form several for a
            while; then the one with the most work is the run's, the other rounds are discarded whole, and none of
            their workers goes on with them after the time that the scenario allows
saved       the newest checkpoint that was acknowledged is the one that the worker's next start loads
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.trainer.exchange import ALONE, DONE
from dtrain.trainer.journal import Entry, read_journal

APPLIED = (DONE, ALONE)


@dataclass
class Report:
    """What the checker found. Nothing in `violations`: all is proven."""

    violations: list[str] = field(default_factory=list)
    rounds: int = 0
    """Rounds of the run's history that the journals show."""
    payloads: int = 0
    """Payloads made."""
    delivered: int = 0
    """Of those, whole in the history."""
    returned: int = 0
    """Of those, with a part that went back into the error feedback."""
    discarded: int = 0
    """Of those, applied in a round that is not in the run's history."""
    discarded_rounds: int = 0
    """Rounds that somebody applied and that are not in the run's history."""
    unknown: int = 0
    """Of those, of workers that died before they knew."""

    def blame(self, law: str, who: str, text: str) -> None:
        self.violations.append(f"{law}: {who}: {text}")


@dataclass(frozen=True)
class Applied:
    """A round as one worker applied it."""

    who: str
    entry: Entry

    @property
    def key(self) -> tuple[int, str]:
        """(round, digest of the theta that it began from)."""
        return self.entry["round"], self.entry["base"]

    @property
    def spans(self) -> dict[tuple[int, int], tuple[str, Mapping[str, float]]]:
        """(first chunk, number of chunks) -> (hash, {peer id: weight})."""
        return {(first, count): (blob, weights) for first, count, blob, weights in self.entry["aggregates"]}


def read_all(
    folders: Mapping[str, Path], verify: Callable[[str, bytes, bytes], bool], report: Report
) -> dict[str, list[Entry]]:
    """Journals by worker name; `folders` holds their files."""
    journals = {}
    for who, path in folders.items():
        journals[who], fault = read_journal(path, verify)
        if fault:
            report.blame("journal", who, fault)
    return journals


def check(
    journals: Mapping[str, Sequence[Entry]], report: Report, *, forks_until: float | None = None
) -> Report:
    """Hold the journals against each other. `forks_until`: Unix seconds until which a scenario that splits the swarm
    may have several histories; None = there is one only."""
    applied = [
        Applied(who, entry)
        for who, journal in journals.items()
        for entry in journal
        if entry["kind"] == "settled" and entry["verdict"] in APPLIED
    ]
    history = history_of(applied)
    report.rounds = len(history)
    _check_agreement(applied, report)
    _check_one_history(applied, history, forks_until, report)
    for who, journal in journals.items():
        _check_chain(who, journal, report)
        _check_checkpoints(who, journal, report)
    _check_payloads(journals, applied, history, report)
    return report


# ---------------------------------------------------------------- histories


def history_of(applied: Sequence[Applied]) -> dict[tuple[int, str], str]:
    """{(round, base): after} of the run's own history: the chain of rounds with the most work (tokens) in it."""
    best: dict[
        str, tuple[float, tuple[int, str] | None]
    ] = {}  # digest -> (work behind it, the round that led to it)
    steps = {(*one.key, one.entry["after"]): work_of(one) for one in applied}
    for (number, base, after), work in sorted(steps.items(), key=lambda step: step[0][0]):
        behind = best.get(base, (0.0, None))[0] + work
        if behind > best.get(after, (-1.0, None))[0]:
            best[after] = (behind, (number, base))
    if not best:
        return {}
    # Of equal work the smaller digest is the run's, as among the workers.
    tip = min(best, key=lambda digest: (-best[digest][0], digest))
    history: dict[tuple[int, str], str] = {}
    at = tip
    while at in best and (step := best[at][1]) is not None and step not in history:
        history[step] = at
        at = step[1]
    return history


def work_of(one: Applied) -> float:
    """Tokens that a round adds: as `OuterLoop.step` counts them."""
    return max((sum(weights.values()) for _, weights in one.spans.values()), default=0.0)


def _check_agreement(applied: Sequence[Applied], report: Report) -> None:
    first: dict[tuple[int, str, str], Applied] = {}
    for one in applied:
        seen = first.setdefault((*one.key, one.entry["after"]), one)
        if seen.spans != one.spans:
            report.blame("agreed", one.who, f"round {one.key[0]} has other aggregates than {seen.who}'s")
    for one in applied:
        spans = sorted(one.spans)
        if any(a[0] + a[1] > b[0] for a, b in itertools.pairwise(spans)):
            report.blame("agreed", one.who, f"round {one.key[0]} has aggregates that overlap")


def _check_one_history(
    applied: Sequence[Applied],
    history: Mapping[tuple[int, str], str],
    forks_until: float | None,
    report: Report,
) -> None:
    outside = [one for one in applied if history.get(one.key) != one.entry["after"]]
    report.discarded_rounds = len({(one.key, one.entry["after"]) for one in outside})
    for one in outside:
        if forks_until is None or one.entry["time"] > forks_until:
            report.blame("one", one.who, f"round {one.key[0]} is not in the run's history")


def _check_chain(who: str, journal: Sequence[Entry], report: Report) -> None:
    stands, at = "", -1
    for entry in journal:
        kind = entry["kind"]
        if kind in ("stands", "loaded"):
            stands, at = entry["digest"], entry["round"]
        elif kind in ("saved", "left"):
            if (entry["digest"], entry["round"]) != (stands, at):
                report.blame("chain", who, f"{kind} another theta than it stood at in round {entry['round']}")
        elif kind == "made" and entry["base"] != stands:
            report.blame("chain", who, f"made a payload of round {entry['round']} on a theta it did not have")
        elif kind == "settled" and entry["verdict"] in APPLIED:
            if (entry["base"], entry["round"]) != (stands, at):
                report.blame("chain", who, f"round {entry['round']} does not continue its theta")
            stands, at = entry["after"], entry["round"] + 1


def _check_checkpoints(who: str, journal: Sequence[Entry], report: Report) -> None:
    saved: Entry | None = None
    awaited = False
    for entry in journal:
        kind = entry["kind"]
        if kind == "begin":
            awaited = saved is not None
        elif kind == "loaded":
            # A later one may be on disk, of a worker that was killed before it could acknowledge it.
            is_it = saved is None or (entry["round"], entry["digest"]) == (saved["round"], saved["digest"])
            if saved is not None and not is_it and entry["round"] <= saved["round"]:
                report.blame(
                    "saved", who, f"loaded round {entry['round']}, acknowledged was {saved['round']}"
                )
            awaited = False
        elif awaited:
            assert saved is not None
            report.blame(
                "saved", who, f"the acknowledged checkpoint of round {saved['round']} was not loaded"
            )
            awaited = False
        if kind == "saved":
            saved = entry


# ---------------------------------------------------------------- payloads


def _check_payloads(
    journals: Mapping[str, Sequence[Entry]],
    applied: Sequence[Applied],
    history: Mapping[tuple[int, str], str],
    report: Report,
) -> None:
    inside = _inside(applied, history)
    made: dict[tuple[str, int, str], list[Entry]] = defaultdict(list)
    for who, journal in journals.items():
        begins = [entry for entry in journal if entry["kind"] == "begin"]
        if not begins:
            continue
        peer_id, chunks = begins[0]["peer_id"], begins[0]["chunks"]
        settled = _settled_by_payload(who, journal, report)
        forgot = {
            entry["payload"]: _chunks(entry["ranges"]) for entry in journal if entry["kind"] == "forgot"
        }
        own = [entry for entry in journal if entry["kind"] == "made"]
        for entry in own:
            report.payloads += 1
            made[peer_id, entry["round"], entry["base"]].append(entry)
        for entry in own:
            key = (peer_id, entry["round"], entry["base"])
            held = {
                span: weight
                for span, weight in inside.get(key, {}).items()
                if _whose(made[key], settled, weight) is entry
            }
            end, gone = settled.get(entry["payload"]), forgot.get(entry["payload"], set())
            _check_payload(who, peer_id, chunks, end, held, gone, history, report)
    for (peer_id, number, base), held in inside.items():
        weights = {entry["tokens"] for entry in made.get((peer_id, number, base), [])}
        for weight in {
            weight for weight in held.values() if weight > max(weights, default=0)
        }:  # less: screened
            report.blame("made", peer_id[-8:], f"is in round {number} with {weight:g} tokens it never gave")


def _whose(made: Sequence[Entry], settled: Mapping[str, Entry], weight: float) -> Entry:
    """Which of the payloads that a worker made for one round an aggregate holds with that weight: a reducer lets count
    less than was given, never more. Of several one that its worker has applied, or does not know the fate of."""
    able = [entry for entry in made if entry["tokens"] >= weight] or made
    ends = [settled.get(entry["payload"]) for entry in able]
    applied = [entry for entry, end in zip(able, ends) if end is not None and end["verdict"] in APPLIED]
    open_ended = [entry for entry, end in zip(able, ends) if end is None]
    return (applied or open_ended or able)[-1]


def _inside(
    applied: Sequence[Applied], history: Mapping[tuple[int, str], str]
) -> dict[tuple[str, int, str], dict[tuple[int, int], float]]:
    """(peer id, round, base) -> {span of the history that holds its payload: weight}."""
    found: dict[tuple[str, int, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for one in applied:
        if history.get(one.key) == one.entry["after"]:
            for span, (_, weights) in one.spans.items():
                for peer_id, weight in weights.items():
                    found[peer_id, one.key[0], one.key[1]][span] = weight
    return found


def _settled_by_payload(who: str, journal: Sequence[Entry], report: Report) -> dict[str, Entry]:
    settled: dict[str, Entry] = {}
    for entry in journal:
        if entry["kind"] == "settled":
            if entry["payload"] in settled:
                report.blame("once", who, f"the payload of round {entry['round']} was settled twice")
            settled[entry["payload"]] = entry
    return settled


def _check_payload(
    who: str,
    peer_id: str,
    chunks: int,
    settled: Entry | None,
    held: Mapping[tuple[int, int], float],
    forgot: set[int],
    history: Mapping[tuple[int, str], str],
    report: Report,
) -> None:
    """One payload's fate: `held` are the spans of the history that hold it, `forgot` the chunks that were in the error
    feedback first and then not any more."""
    if settled is None:
        report.unknown += 1
        return
    number = settled["round"]
    returned = [(first, count) for first, count in settled["returned"]]
    own = {(first, count) for first, count, _, weights in settled["aggregates"] if peer_id in weights}
    if gap := _not_once([*own, *returned], chunks):
        report.blame("once", who, f"the payload of round {number}: {gap}")
    inside = _chunks(held)
    if twice := (_chunks(returned) - forgot) & inside:
        text = f"the payload of round {number}: chunks from {min(twice)} are applied and returned"
        report.blame("once", who, text)
    if lost := forgot - (_chunks(returned) & inside):
        report.blame("once", who, f"the payload of round {number}: chunks from {min(lost)} are forgotten")
    is_ours = settled["verdict"] in APPLIED and history.get((number, settled["base"])) == settled["after"]
    if is_ours and own != set(held):
        report.blame("once", who, f"round {number} was applied with other parts of it than it knows of")
    report.returned += bool(returned)
    report.delivered += is_ours and not returned
    report.discarded += settled["verdict"] in APPLIED and not is_ours


def _chunks(parts: Iterable[Sequence[int]]) -> set[int]:
    return {chunk for first, count in parts for chunk in range(first, first + count)}


def _not_once(parts: Sequence[tuple[int, int]], chunks: int) -> str:
    """What is wrong with spans that should cover all chunks once, else ""."""
    at = 0
    for first, count in sorted(part for part in parts if part[1]):
        if first > at:
            return f"chunks {at} to {first - 1} are neither delivered nor returned"
        if first < at:
            return f"chunks {first} to {at - 1} are accounted for twice"
        at = first + count
    return "" if at == chunks else f"chunks {at} to {chunks - 1} are neither delivered nor returned"
