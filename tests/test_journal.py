"""Laws of the journals and of the checker that reads them: what happened is proven, what is doctored is found."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_worker import Threads, quick_manifest, swarm_of

from dtrain.compression.codec import Codec
from dtrain.experiments.lab_check import Report, check, read_all
from dtrain.experiments.memory import Faults
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.journal import FILE, Entry, SignedJournal
from dtrain.trainer.model import GPT

NAMES = ("a", "b", "c")
KEYS = {name: Ed25519PrivateKey.generate() for name in NAMES}
ROUNDS = 6
Journals = dict[str, list[Entry]]


def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    try:
        KEYS[peer_id].public_key().verify(signature, message)
    except InvalidSignature:
        return False
    return True


def open_journal(folder: Path, name: str, manifest: str, chunks: int) -> SignedJournal:
    journal = SignedJournal(folder / name / FILE, name, KEYS[name].sign, time.time)
    journal.write("begin", peer_id=name, manifest=manifest, chunks=chunks)
    return journal


def train(threads: Threads, names: tuple[str, ...], **settings: Any) -> None:
    shapes = FlatParameters(GPT(threads.manifest.model)).shapes
    chunks = Codec(threads.manifest.codec, shapes).num_chunks
    journals = [open_journal(threads.folder, name, threads.manifest.hash.hex(), chunks) for name in names]
    for name, journal in zip(names, journals):
        threads.start(name, journal, checkpoint_every=2, **settings)
    threads.join()
    for journal in journals:
        journal.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Journals of a run in which a section and a span were lost; then a is started again from its checkpoint."""
    base = tmp_path_factory.mktemp("journals")
    lost = Faults(sections=frozenset({(1, "a", "b")}), spans=frozenset({(2, "a")}))
    manifest = quick_manifest(exchange__start_workers=3)
    for names in (NAMES, ("a",)):
        with swarm_of(manifest, base, lost) as threads:
            train(threads, names, max_rounds=ROUNDS)
    return base


def read(folder: Path) -> tuple[Journals, Report]:
    report = Report()
    return read_all({name: folder / name / FILE for name in NAMES}, verify, report), report


def test_an_honest_run_is_proven(folder: Path) -> None:
    """Every payload is accounted for, lost parts as returned ones; a restart loads what was acknowledged."""
    journals, report = read(folder)
    check(journals, report)
    assert report.violations == []
    assert (report.rounds, report.payloads, report.unknown) == (ROUNDS, 3 * ROUNDS, 0)
    assert (report.returned, report.delivered) == (4, 3 * ROUNDS - 4)
    kinds = [entry["kind"] for entry in journals["a"]]
    assert kinds.count("begin") == 2 and kinds.count("loaded") == 1


def test_a_killed_worker_is_accounted_for(folder: Path) -> None:
    """A journal that breaks off, even in the middle of a line, is no fault: its last payload's fate is not known to it.
    What the others have of it was given."""
    journals, _ = read(folder)
    last = next(i for i, e in reversed(list(enumerate(journals["b"]))) if e["kind"] == "made")
    report = check({**journals, "b": journals["b"][: last + 1]}, Report())
    assert report.violations == [] and report.unknown == 1


def of(journal: list[Entry], kind: str, at: int = -1) -> Entry:
    return [entry for entry in journal if entry["kind"] == kind][at]


def lose_a_part(journals: Journals) -> None:
    settled = next(e for e in journals["a"] if e["kind"] == "settled" and e["returned"])
    settled["returned"].clear()


def return_what_was_delivered(journals: Journals) -> None:
    settled = of(journals["a"], "settled")
    settled["returned"].append(settled["aggregates"][0][:2])


def deny_a_round(journals: Journals) -> None:
    """It says that it took nothing from the round, and kept its payload, which the others have applied."""
    settled = of(journals["a"], "settled")
    settled.update(
        verdict="stale", aggregates=[], after="", returned=[[0, of(journals["a"], "begin")["chunks"]]]
    )


def settle_twice(journals: Journals) -> None:
    journals["b"].append(dict(of(journals["b"], "settled")))


def apply_other_bytes(journals: Journals) -> None:
    of(journals["c"], "settled")["aggregates"][0][2] = "0" * 32


def hold_another_theta(journals: Journals) -> None:
    journals["c"] = journals["c"][: journals["c"].index(of(journals["c"], "settled")) + 1]
    of(journals["c"], "settled")["after"] = "0" * 64


def weigh_more(journals: Journals) -> None:
    for journal in journals.values():
        for _, _, _, weights in of(journal, "settled")["aggregates"]:
            weights["a"] *= 2


def invent_a_contributor(journals: Journals) -> None:
    for journal in journals.values():
        for _, _, _, weights in of(journal, "settled")["aggregates"]:
            weights["nobody"] = 192.0


def jump(journals: Journals) -> None:
    of(journals["b"], "settled", 2)["base"] = "1" * 64


def overlap(journals: Journals) -> None:
    for journal in journals.values():
        of(journal, "settled")["aggregates"][0][1] += 1


def load_an_older_checkpoint(journals: Journals) -> None:
    older = of(journals["a"], "saved", 0)
    of(journals["a"], "loaded").update(round=older["round"], digest=older["digest"])


def load_nothing(journals: Journals) -> None:
    journals["a"].remove(of(journals["a"], "loaded"))


def make_twice(journals: Journals) -> None:
    """The network was lost under a payload, all of which came back; a smaller one went into that round later."""
    journal = journals["a"]
    last, chunks = of(journal, "made"), of(journal, "begin")["chunks"]
    first = {**last, "payload": "0" * 32, "tokens": 2 * last["tokens"]}
    came_back = {**of(journal, "settled"), "payload": "0" * 32, "verdict": "stale", "after": "", "base": ""}
    came_back.update(aggregates=[], returned=[[0, chunks]])
    at = journal.index(last)
    journal[at:at] = [first, came_back]


def make_twice_and_apply_the_first(journals: Journals) -> None:
    make_twice(journals)
    weigh_more(journals)


def forget_what_came_back(journals: Journals) -> None:
    """It takes a part out of its error feedback that is in no aggregate."""
    settled = next(e for e in journals["a"] if e["kind"] == "settled" and e["returned"])
    journals["a"].append({**settled, "kind": "forgot", "ranges": settled["returned"]})


def test_who_makes_two_payloads_for_a_round_may_keep_the_first(folder: Path) -> None:
    """Aggregates tell by their weights that they hold the second."""
    journals, report = read(folder)
    make_twice(journals)
    check(journals, report)
    assert report.violations == [] and (report.payloads, report.returned) == (3 * ROUNDS + 1, 5)


@pytest.mark.parametrize(
    "law, doctor",
    [
        ("once", lose_a_part),
        ("once", return_what_was_delivered),
        ("once", deny_a_round),
        ("once", settle_twice),
        ("once", forget_what_came_back),
        ("once", make_twice_and_apply_the_first),
        ("agreed", apply_other_bytes),
        ("one", hold_another_theta),
        ("made", weigh_more),
        ("made", invent_a_contributor),
        ("chain", jump),
        ("agreed", overlap),
        ("saved", load_an_older_checkpoint),
        ("saved", load_nothing),
    ],
)
def test_doctored_journals_are_found(
    law: str, doctor: Callable[[Journals], None], folder: Path, tmp_path: Path
) -> None:
    """Workers that sign something false themselves contradict themselves or the others; the law is named."""
    journals, _ = read(folder)
    changed = copy.deepcopy(journals)
    doctor(changed)
    for name, journal in changed.items():
        signed = SignedJournal(tmp_path / name / FILE, name, KEYS[name].sign, time.time)
        for entry in journal:
            fields = {k: v for k, v in entry.items() if k not in ("kind", "time", "previous", "signature")}
            signed.write(entry["kind"], **fields)
        signed.close()
    journals, report = read(tmp_path)
    assert report.violations == []
    check(journals, report)
    assert law in {violation.partition(":")[0] for violation in report.violations}, report.violations


def change_a_digit(lines: list[bytes]) -> None:
    lines[2] = lines[2].replace(b'"tokens":192', b'"tokens":193')


def leave_out(lines: list[bytes]) -> None:
    del lines[3]


def swap(lines: list[bytes]) -> None:
    lines[3], lines[4] = lines[4], lines[3]


def sign_for_another(lines: list[bytes]) -> None:
    entry = json.loads(lines[0])
    entry["peer_id"] = "b"
    lines[0] = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("doctor", [change_a_digit, leave_out, swap, sign_for_another])
def test_entries_cannot_be_changed_by_others(
    doctor: Callable[[list[bytes]], None], folder: Path, tmp_path: Path
) -> None:
    """A line that is changed, left out, moved or put under another name is found by its signature or its place."""
    lines = (folder / "a" / FILE).read_bytes().splitlines()
    before = list(lines)
    doctor(lines)
    assert lines != before
    path = tmp_path / "a" / FILE
    path.parent.mkdir()
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    report = Report()
    read_all({"a": path}, verify, report)
    assert [violation.partition(":")[0] for violation in report.violations] == ["journal"]


def test_a_split_swarm_may_have_two_histories_for_a_while(folder: Path) -> None:
    """The one with more work is the run's; the other's rounds are counted as discarded, until the time that is allowed
    and no longer."""
    journals, _ = read(folder)
    forked = copy.deepcopy(journals)
    last = of(forked["c"], "settled")
    now = last["time"]
    forked["c"] = forked["c"][: forked["c"].index(last) + 1]
    last["after"] = "f" * 64  # c went on alone
    last["aggregates"] = [[0, of(forked["c"], "begin")["chunks"], "0" * 32, {"c": 1.0}]]
    for name in ("a", "b"):
        for part in of(forked[name], "settled")["aggregates"]:
            del part[3]["c"]
    of(forked["c"], "made")["tokens"] = 1
    report = check(forked, Report(), forks_until=now + 1)
    assert report.violations == [] and report.discarded == 1
    assert any("one:" in line for line in check(forked, Report(), forks_until=now - 1).violations)
    assert any("one:" in line for line in check(forked, Report()).violations)


def test_what_came_back_in_one_half_and_is_in_the_others_theta_goes_once(tmp_path: Path) -> None:
    """The network is split while a round is exchanged: a loses a span, which the others have, its own part in it. Once
    it stands on their theta that part is no more in its error feedback."""
    manifest = quick_manifest(exchange__start_workers=3)
    with swarm_of(manifest, tmp_path) as threads:
        chunks = threads.swarm._codec.num_chunks
        journals = {name: open_journal(tmp_path, name, threads.manifest.hash.hex(), chunks) for name in NAMES}
        a = threads.prepare("a", journals["a"], max_rounds=ROUNDS)
        run_round, lost = a.exchange.run_round, []

        def run(**contribution: Any) -> Any:
            outcome: Any = run_round(**contribution)
            if contribution["round"] != 2 or lost:
                return outcome
            lost.append(a.codec.span_of(outcome.aggregates[1]))
            return replace(
                outcome, aggregates=outcome.aggregates[:1] + outcome.aggregates[2:], undelivered=tuple(lost)
            )

        a.exchange.run_round = run  # type: ignore[method-assign]
        for name in ("b", "c"):
            threads.start(name, journals[name], max_rounds=ROUNDS)
        threads.begin("a")
        threads.join()
        for journal in journals.values():
            journal.close()
    found, report = read(tmp_path)
    check(found, report, forks_until=time.time())
    assert report.violations == [] and report.discarded_rounds == 1
    [forgot] = [entry for entry in found["a"] if entry["kind"] == "forgot"]
    assert (forgot["round"], [tuple(part) for part in forgot["ranges"]]) == (2, lost)
    found["a"].remove(forgot)
    [violation] = check(found, Report(), forks_until=time.time()).violations
    assert violation.startswith("once: a: the payload of round 2") and "applied and returned" in violation


def test_a_full_disk_loses_no_entry(tmp_path: Path) -> None:
    """What cannot be written waits and is written with the next entry; a torn half line leaves no trace."""
    journal = open_journal(tmp_path, "a", "", 1)

    class Full:
        """A disk with room for ten bytes."""

        def __init__(self, file: Any):
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, blob: bytes) -> int:
            return int(self.file.write(blob[:10]))

    disk = journal._file
    journal._file = Full(disk)  # type: ignore[assignment]
    journal.write("stands", round=1, digest="aa")
    journal._file = disk
    journal.write("stands", round=2, digest="bb")
    journal.close()
    with open(tmp_path / "a" / FILE, "ab") as file:
        file.write(b'{"half')
    journal = SignedJournal(tmp_path / "a" / FILE, "a", KEYS["a"].sign, time.time)
    journal.write("left", round=3, digest="cc")
    journal.close()
    report = Report()
    entries = read_all({"a": tmp_path / "a" / FILE}, verify, report)["a"]
    assert report.violations == []
    assert [entry["kind"] for entry in entries] == ["begin", "stands", "stands", "left"]
