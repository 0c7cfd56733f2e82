"""The peers of one implementation in the exchange benchmark: started, told what to do, and none left behind."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from dtrain.experiments.bench_exchange_report import PeerRound
from dtrain.trainer.errors import RunError

START_TIMEOUT_S = 300.0  # many processes import torch and hivemind at once
ROUND_TIMEOUT_S = 180.0
CLOSE_S = 15.0
GONE_S = 5.0
LOG_LINES = 15


@dataclass(frozen=True)
class Terms:
    """What all implementations of one comparison have in common."""

    peers: int
    params: int
    k: int
    exact_up_to: int


class PeerProcess:
    """One `bench_exchange_peer.py` and the lines to and from it."""

    def __init__(self, implementation: str, rank: int, terms: Terms, base: Path, join: Sequence[str]):
        self.name = f"{implementation}-{terms.peers}-{rank}"
        folder, self._log = base / self.name, base / f"{self.name}.log"
        folder.mkdir()
        command = [sys.executable, "-m", "dtrain.experiments.bench_exchange_peer", implementation]
        command += ["--rank", str(rank), "--peers", str(terms.peers), "--params", str(terms.params)]
        command += ["--k", str(terms.k), "--exact-up-to", str(terms.exact_up_to)]
        command += ["--folder", str(folder), "--join", *join]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DTRAIN_RUNTIME_DIR": str(base / "runtime")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
                start_new_session=True,  # a Ctrl-C in the terminal is the benchmark's to handle
            )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True, name=self.name)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def tell(self, do: str, **details: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._failure("has ended") from None

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line from the peer. Raises RunError with the end of its log if none comes."""
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise self._failure(f"said nothing within {timeout_s:.0f} s") from None
        if line is None:
            raise self._failure("has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> RunError:
        said = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return RunError("\n".join([f"the peer {self.name} {what}; the last it said:", *said]))

    def hang_up(self) -> None:
        """Ask it to end: there will be no more commands."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except OSError:
            pass  # it has ended

    def bury(self) -> None:
        """End it, however it is."""
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Nobody who could write to us is left: wait until the pipe is read to its end."""
        self._listener.join(GONE_S)


class Swarm:
    """All peers of one implementation. A context manager: ends them, with all their children.

    Made with its first peer; `join` brings the others, so that several swarms can start side by side.
    """

    def __init__(self, implementation: str, terms: Terms, base: Path):
        self.implementation, self.terms, self._base = implementation, terms, base
        self._peers: list[PeerProcess] = []
        self._hellos: list[dict[str, Any]] = []
        self._add([])

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _add(self, join: Sequence[str]) -> None:
        rank = len(self._peers)
        self._peers.append(PeerProcess(self.implementation, rank, self.terms, self._base, join))

    def join(self) -> None:
        """Wait for the first peer and start the others, which join through it."""
        self._hellos.append(self._peers[0].answer(START_TIMEOUT_S))
        while len(self._peers) < self.terms.peers:
            self._add(self._hellos[0]["addresses"])

    def meet(self) -> None:
        """Wait until all peers are up and see each other."""
        self._hellos += [peer.answer(START_TIMEOUT_S) for peer in self._peers[1:]]
        self._all("meet", START_TIMEOUT_S, peer_ids=[hello["peer_id"] for hello in self._hellos])

    def _all(self, do: str, timeout_s: float, **details: object) -> list[dict[str, Any]]:
        for peer in self._peers:
            peer.tell(do, **details)
        return [peer.answer(timeout_s) for peer in self._peers]

    def round(self, number: int) -> list[PeerRound]:
        """Have all peers take part in a round, and wait until it is over for all of them."""
        return [PeerRound(**answer) for answer in self._all("round", ROUND_TIMEOUT_S, round=number)]

    def sent(self) -> list[int]:
        """Bytes that each peer has sent so far."""
        return [answer["traffic"][0] for answer in self._all("traffic", ROUND_TIMEOUT_S)]

    def _stop(self) -> None:
        family = [relative for peer in self._peers for relative in _descendants(peer)]
        for peer in self._peers:
            peer.hang_up()
        until = time.monotonic() + CLOSE_S
        try:
            for peer in self._peers:
                peer.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # it is ended below
        finally:
            for peer in self._peers:
                family += _descendants(peer)
                peer.bury()
            _, left = psutil.wait_procs(family, timeout=GONE_S)
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            for peer in self._peers:
                peer.forget()


def background(swarms: Sequence[Swarm], seconds: float) -> list[float]:
    """Bytes per second that a peer of each swarm sends (median) while nobody exchanges anything."""
    before = [swarm.sent() for swarm in swarms]
    began = time.monotonic()
    time.sleep(seconds)
    after = [swarm.sent() for swarm in swarms]
    passed = time.monotonic() - began
    return [median(b - a for a, b in zip(old, new)) / passed for old, new in zip(before, after)]


def _descendants(peer: PeerProcess) -> list[psutil.Process]:
    if peer.process.poll() is not None:
        return []
    try:
        return list(psutil.Process(peer.process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
