"""A worker's signed journal: what became of every payload that it made (`dtrain worker --journal`).

One line of JSON per entry in `journal.jsonl`. Each carries the hash of the line before it and the worker's signature:
no entry can be changed, left out or added afterwards without that being seen. A worker that is started again goes on
where it stopped. `dtrain lab` reads the journals of all workers and proves that nothing was lost or counted twice.

begin     a start of the worker: peer_id, manifest (hash), chunks of a payload
loaded    a checkpoint was loaded: round, digest
stands    theta was taken over from others, or is the run's first: round, digest
made      a payload was made: round, base (digest of theta), payload (hash), tokens
settled   its round is over for this worker: round, base, payload, verdict, after (digest of the theta that it led to),
          aggregates [[first chunk, number of chunks, hash, {peer id: tokens}]], returned [[first chunk, number of
          chunks]] that went back into the error feedback
forgot    these ranges of an earlier payload, which had come back, are in theta as it was taken over from others, and so
          taken out of the error feedback: round, payload, ranges
saved     a checkpoint is on disk, whole: round, digest
left      the worker ended by itself: round, digest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dtrain.compression.codec import Codec
from dtrain.trainer.errors import UsageError
from dtrain.trainer.exchange import ALONE, DONE, Outcome
from dtrain.trainer.outer_loop import OuterLoop

FILE = "journal.jsonl"
DOMAIN = b"dtrain journal 1\n"
"""Signed before each line, so that the signature means nothing anywhere else."""
FIRST = ""
"""What the first line has for the hash of the line before it."""

Entry = dict[str, Any]


class Journal(Protocol):
    """Where entries go."""

    def write(self, kind: str, **fields: Any) -> None: ...


class SignedJournal:
    """Appends to a file. `sign` gives the signature of the owner of `peer_id`.

    On a full disk the entries wait, and are written as soon as there is room again.
    """

    def __init__(self, path: Path, peer_id: str, sign: Callable[[bytes], bytes], now: Callable[[], float]):
        self.peer_id, self._sign, self._now, self._waiting = peer_id, sign, now, b""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what is in the file is what `_end` says, also after a write that failed.
            self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115 (closed by close)
            whole = self._file.read()
            self._end = whole.rfind(b"\n") + 1  # after it comes the half line of a worker that was killed
        except OSError as error:
            raise UsageError(
                f"cannot keep the journal in {path}: {error.strerror}; type --folder with a folder you own"
            ) from None
        lines = whole[: self._end].splitlines()
        self._previous = hash_of(lines[-1]) if lines else FIRST

    def write(self, kind: str, **fields: Any) -> None:
        entry = {"kind": kind, "time": round(self._now(), 3), "previous": self._previous, **fields}
        entry["signature"] = self._sign(DOMAIN + canonical(entry)).hex()
        line = canonical(entry)
        self._previous = hash_of(line)
        self._waiting += line + b"\n"
        try:
            self._file.seek(self._end)
            self._file.truncate()
            written = self._file.write(self._waiting)
        except OSError:
            return
        whole = self._waiting[:written].rfind(b"\n") + 1
        self._end += whole
        self._waiting = self._waiting[whole:]

    def close(self) -> None:
        self._file.close()


class Books:
    """What a worker's loop tells its journal; without one, nothing is written down."""

    def __init__(self, journal: Journal | None, outer: OuterLoop, codec: Codec):
        self._journal, self._outer, self._codec = journal, outer, codec

    def note(self, kind: str) -> None:
        """An entry that says where the worker stands: loaded, stands, saved or left."""
        if self._journal is not None:
            self._journal.write(kind, round=self._outer.round, digest=self._outer.digest.hex())

    def made(self, payload: bytes, round: int, base: bytes, tokens: int) -> None:
        if self._journal is not None:
            self._journal.write("made", round=round, base=base.hex(), payload=hash_of(payload), tokens=tokens)

    def settled(self, outcome: Outcome, payload: bytes, returned: Sequence[tuple[int, int]]) -> None:
        """The outer step, if there is one, is taken."""
        if self._journal is None:
            return
        is_applied = outcome.verdict in (DONE, ALONE)
        self._journal.write(
            "settled",
            round=outcome.round,
            verdict=outcome.verdict,
            base=outcome.base_digest.hex(),
            payload=hash_of(payload),
            after=self._outer.digest.hex() if is_applied else "",
            aggregates=[self._of(outcome, blob) for blob in outcome.aggregates] if is_applied else [],
            returned=[list(part) for part in returned],
        )

    def forgot(self, round: int, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        if self._journal is not None:
            parts = [list(part) for part in ranges]
            self._journal.write("forgot", round=round, payload=hash_of(payload), ranges=parts)

    def _of(self, outcome: Outcome, aggregate: bytes) -> list[Any]:
        weights = {outcome.members[index]: weight for index, weight in self._codec.contributors(aggregate)}
        return [*self._codec.span_of(aggregate), hash_of(aggregate), weights]


def read_journal(path: Path, verify: Callable[[str, bytes, bytes], bool]) -> tuple[list[Entry], str]:
    """A journal's entries up to the first that is not as it was written, and what is wrong with that one, else "".

    `verify(peer id, message, signature)` says whether the peer made that signature. A torn last line is no fault: a
    killed worker leaves one.
    """
    entries: list[Entry] = []
    previous, peer_id = FIRST, ""
    blob = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(blob[: blob.rfind(b"\n") + 1].splitlines(), 1):
        try:
            entry = json.loads(line)
            signature = bytes.fromhex(entry["signature"])
            peer_id = peer_id or entry["peer_id"]
            unsigned = {key: value for key, value in entry.items() if key != "signature"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return entries, f"line {number} is no entry"
        if entry["previous"] != previous:
            return entries, f"line {number} does not follow the line before it"
        if not verify(peer_id, DOMAIN + canonical(unsigned), signature):
            return entries, f"line {number} is not signed by {peer_id[-8:]}"
        entries.append(entry)
        previous = hash_of(line)
    return entries, ""


def canonical(entry: Entry) -> bytes:
    """What is signed and hashed: sorted compact JSON."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def hash_of(blob: bytes) -> str:
    """SHA-256, the first 16 bytes of it, in hex."""
    return hashlib.sha256(blob).hexdigest()[:32]
