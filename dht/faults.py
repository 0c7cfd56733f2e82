"""Planned faults, for tests: at a named point of a named round something goes wrong, on purpose and reproducibly.

The plan comes as JSON in the environment variable DTRAIN_FAULTS, a list of `{"point", "round", "kind"}`:

point            where in the round                                  kinds
update           what we contribute                                  sign-flip, hundredfold
matchmaking      before the group is sought                          kill, stop, weight, stale-round, wrong-digest
first-part-sent  after the first piece of our section to a reducer   kill, stop, close
half-sent        when half of it is sent                             kill, stop, close
section          what we send to reducers                            garbage, nan, wrong-shape, stale-round
sum              what we make of our span's sections                 wrong-sum, leave-out
reduced          when our own span is reduced                        kill, stop
half-delivered   when half of an aggregate is sent to a member       kill, stop, close
aggregate        what we send to members                             garbage, wrong-shape, weight
audit            whom we audit once the round counts                 all
before-report    when the round is done, before the worker hears     kill, stop

A round of -1 means every round, and as often as the point is reached.
Without the variable every hook is a look into an empty list.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dtrain.compression.codec import Codec
from dtrain.dht.membership import Contribution

STOPPED_S = 20.0
# Run by a process of its own. Who kills the frozen worker ends the freeze: its network process sees that it is gone.
THAW = """
import os, signal, sys, time
freeze_s, group, worker = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def reach(send, target, number):
    try:
        send(target, number)
    except ProcessLookupError:
        return False
    return True

until = time.monotonic() + freeze_s
while time.monotonic() < until and reach(os.kill, worker, 0):
    time.sleep(0.1)
reach(os.killpg, group, signal.SIGCONT)
reach(os.kill, worker, signal.SIGCONT)
"""
PIECE_BYTES = 2048  # with a plan, messages are cut smaller, so that there is a middle to fail in
VARIABLE = "DTRAIN_FAULTS"
EVERY = -1  # round
FACTORS = {"sign-flip": -1.0, "hundredfold": 100.0}


@dataclass(frozen=True)
class Fault:
    """One planned fault."""

    point: str
    round: int
    kind: str


class FaultPlan:
    """The faults that this process is to have, each once but for those of every round."""

    def __init__(self, faults: Sequence[Fault] = (), worker_pid: int = 0):
        self._faults = list(faults)
        self._worker_pid = worker_pid

    def __bool__(self) -> bool:
        return bool(self._faults)

    @classmethod
    def from_environment(cls, worker_pid: int) -> FaultPlan:
        """The plan in DTRAIN_FAULTS, else an empty one."""
        return cls([Fault(**fault) for fault in json.loads(os.environ.get(VARIABLE, "[]"))], worker_pid)

    def take(self, point: str, round: int) -> str:
        """The kind of fault planned for here and now, or "" (as nearly always)."""
        for fault in self._faults:
            if fault.point == point and fault.round in (round, EVERY):
                if fault.round != EVERY:
                    self._faults.remove(fault)
                print(f"planned fault: {fault.kind} at {point} of round {round}", file=sys.stderr, flush=True)
                return fault.kind
        return ""

    def happen(self, point: str, round: int) -> str:
        """Carry out a fault that concerns this process itself; other kinds are returned for the caller to act on."""
        kind = self.take(point, round)
        if kind == "kill":
            os.kill(self._worker_pid, signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)
        elif kind == "stop":
            self._stop()
        return kind

    def _stop(self) -> None:
        """Freeze worker, network process and daemon, as closing a laptop does, and thaw them after a while."""
        group, worker = os.getpgid(0), self._worker_pid
        command = [sys.executable, "-c", THAW, str(STOPPED_S), str(group), str(worker)]
        subprocess.Popen(command, start_new_session=True)
        os.kill(worker, signal.SIGSTOP)
        os.killpg(group, signal.SIGSTOP)

    def update(self, codec: Codec, ours: Contribution, run: bytes) -> Contribution:
        """What is contributed instead of ours, where that is planned: a payload as anybody's."""
        kind = self.take("update", ours.round)
        if not kind:
            return ours
        tensors = [torch.zeros(shape) for _, shape in codec.shapes]
        values = FACTORS[kind] * codec.values(ours.payload)
        return replace(ours, payload=codec.encode(tensors, values, decay=1.0, run=run, round=ours.round))

    def missum(
        self, round: int, sections: Sequence[tuple[int, float, bytes]], own_index: int
    ) -> Sequence[tuple[int, float, bytes]]:
        """What is summed instead of `sections`, where that is planned: well-formed, as a cheat would do it."""
        kind = self.take("sum", round)
        if kind == "wrong-sum":  # everybody counts, but all with the first one's section
            return [(index, weight, sections[0][2]) for index, weight, _ in sections]
        if kind == "leave-out":
            victim = next((index for index, _, _ in sections if index != own_index), own_index)
            return [section for section in sections if section[0] != victim]
        return sections

    def spoil(self, point: str, round: int, blob: bytes) -> bytes:
        """What goes out instead of `blob`, where that is planned."""
        kind = self.take(point, round)
        if not kind:
            return blob
        noise = random.Random(round).randbytes(len(blob))
        if kind == "wrong-shape":
            return blob[: len(blob) // 2]
        if kind == "garbage":
            return noise
        return _SPOILERS[kind](blob)


def _nan(blob: bytes) -> bytes:
    """All bytes after the header become ones (NaN in every float format); the checksum is made to fit again."""
    return _resealed(blob[:48] + b"\xff" * (len(blob) - 48))


def _other_round(blob: bytes) -> bytes:
    """The round in the header is one less; the checksum is made to fit again."""
    round = int.from_bytes(blob[24:28], "little")
    return _resealed(blob[:24] + max(0, round - 1).to_bytes(4, "little") + blob[28:])


def _heavy(blob: bytes) -> bytes:
    """The first contributor's weight in an aggregate becomes 1e9."""
    return _resealed(blob[:50] + struct.pack("<d", 1e9) + blob[58:])


def _resealed(blob: bytes) -> bytes:
    head = bytearray(blob)
    head[36:40] = bytes(4)
    head[36:40] = zlib.crc32(bytes(head)).to_bytes(4, "little")
    return bytes(head)


def spoil_hello(contribution: Contribution, kind: str) -> Contribution:
    """The contribution as a peer with that fault would announce it."""
    if kind == "weight":
        return replace(contribution, weight=1e9)
    if kind == "stale-round":
        return replace(contribution, round=max(0, contribution.round - 1))
    if kind == "wrong-digest":
        return replace(contribution, base_digest=bytes(32))
    return contribution


_SPOILERS = {"nan": _nan, "stale-round": _other_round, "weight": _heavy}
