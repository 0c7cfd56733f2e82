"""What a simulated run came to: the workers' events become lines per round, and in the end one row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.experiments.memory_round import Reduced
from dtrain.experiments.results import Row

BYTES_PER_PARAMETER = 4


@dataclass
class _Round:
    """What is known of one round so far."""

    time_s: float = 0.0
    losses: list[tuple[float, int]] = field(default_factory=list)
    """(loss, tokens) of each worker in it."""
    contributors: int = 0
    waits_s: list[float] = field(default_factory=list)
    exchanges_s: list[float] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    tokens: int = 0
    eval_loss: float | None = None
    voices: dict[str, _Voice] = field(default_factory=dict)


@dataclass(frozen=True)
class _Voice:
    """What one worker has reported of all its rounds."""

    bytes_up: int = 0
    bytes_down: int = 0
    compute_share: float = 0.0


class RoundLog:
    """Collects the events of all workers; hands on a round's line when nobody can report on it any more."""

    def __init__(self, num_params: int, step_tokens: int, rounds: int, write: Callable[[Row], None]) -> None:
        """`step_tokens`: tokens of one inner step. `rounds` end the run; a latecomer may go on for one more alone.
        `write` gets every line once, in order.
        """
        self._rounds_in_all = rounds
        self._num_params, self._step_tokens, self._write = num_params, step_tokens, write
        self._rounds: dict[int, _Round] = {}
        self._voices: dict[str, _Voice] = {}
        self._ends: dict[str, tuple[int, int]] = {}
        self._written = -1
        self._lost: dict[int, int] = {}
        self._payloads: list[int] = []
        self._contributors: list[int] = []
        self._allreduce_bytes = 0.0
        self._steps = 0.0
        self._one_theta = True
        self._sentenced: dict[str, tuple[int, str]] = {}
        self._out_rounds: Counter[str] = Counter()
        self._attended: Counter[str] = Counter()
        self.last: Row = {}
        """The line of the newest round."""

    def begins(self, name: str) -> None:
        """A worker is there."""
        self._voices[name] = _Voice()

    def reduced(self, round: int, reduced: Reduced) -> None:
        """The exchange that ends the round numbered `round` from 0."""
        if reduced.num_lost_sections:
            self._lost[round + 1] = self._lost.get(round + 1, 0) + reduced.num_lost_sections
        for sentence in reduced.sentences:
            self._sentenced.setdefault(sentence.peer_id, (round + 1, sentence.reason))
            self._out_rounds[sentence.peer_id] += min(sentence.until, self._rounds_in_all) - round
        self._attended.update(reduced.bytes_up.keys())

    def sentences(self, attackers: Collection[str]) -> Row:
        """Who was put out: of `attackers` how many, by which round the last of them for the first time, and why; and of
        the others, in rounds of one member each.
        """
        found = {name: self._sentenced[name] for name in sorted(attackers) if name in self._sentenced}
        return {
            "attackers_out": len(found),
            "attackers_out_by_round": max((round for round, _ in found.values()), default=None),
            "attackers_out_for": sorted({reason for _, reason in found.values()}),
            "honest_rounds": sum(n for name, n in self._attended.items() if name not in attackers),
            "honest_out_rounds": sum(n for name, n in self._out_rounds.items() if name not in attackers),
        }

    def evaluated(self, now_s: float, round: int, eval_loss: float, tokens: int) -> None:
        """Theta of a round was evaluated."""
        if round <= self._written:
            return
        entry = self._rounds.setdefault(round, _Round())
        entry.eval_loss, entry.tokens = eval_loss, max(entry.tokens, tokens)
        entry.time_s = max(entry.time_s, now_s)

    def lacks_evaluation(self, round: int) -> bool:
        """Whether a round is not written yet and has not been evaluated."""
        return round > self._written and self._rounds.setdefault(round, _Round()).eval_loss is None

    def round_done(self, now_s: float, name: str, event: Mapping[str, Any], all_tokens: int) -> None:
        """A worker has applied a round; `event` is its own report, all_tokens those in its theta's history."""
        number = int(event["round"])
        if event["own_included"]:
            self._payloads.append(event["payload_bytes"])
            num = len(event["contributors"])
            steps = event["round_tokens"] / self._step_tokens
            self._steps += steps
            ring = 2 * (num - 1) / num * BYTES_PER_PARAMETER * self._num_params
            self._allreduce_bytes += ring * steps
        if not self._written < number <= self._rounds_in_all:  # of a worker that came far too late
            return
        entry = self._rounds.setdefault(number, _Round())
        entry.time_s = max(entry.time_s, now_s)
        entry.voices[name] = _Voice(event["bytes_up"], event["bytes_down"], event["compute_share"])
        entry.losses.append((event["loss"], event["round_tokens"]))
        entry.contributors = max(entry.contributors, len(event["contributors"]))
        entry.waits_s.append(event["wait_s"])
        entry.exchanges_s.append(event["exchange_s"])
        entry.digests.add(event["digest"])
        entry.tokens = max(entry.tokens, all_tokens)
        self._flush(up_to=number - 2)  # who reports on a round has met those who were in the one before

    def traffic(self, name: str, up: int, down: int) -> None:
        """A worker's counts at the end."""
        self._ends[name] = up, down

    def _flush(self, up_to: int) -> None:
        for number in sorted(n for n in self._rounds if self._written < n <= up_to):
            self._written = number
            entry = self._rounds.pop(number)
            self._voices.update(entry.voices)
            self.last = self._line(number, entry)
            self._write(self.last)

    def _line(self, number: int, entry: _Round) -> Row:
        line: Row = {"round": number, "time_s": round(entry.time_s, 6), "tokens": entry.tokens}
        if entry.losses:
            self._contributors.append(entry.contributors)
            self._one_theta = self._one_theta and len(entry.digests) == 1
            tokens = sum(tokens for _, tokens in entry.losses)
            loss = math.fsum(loss * tokens for loss, tokens in entry.losses) / max(1, tokens)
            line["loss"] = round(loss, 6)
        line["eval_loss"] = entry.eval_loss
        if entry.losses:
            line |= {
                "bytes_up_per_worker": self._mean("bytes_up", 1),
                "bytes_down_per_worker": self._mean("bytes_down", 1),
                "contributors": entry.contributors,
                "wait_s": _mean(entry.waits_s, 6),
                "exchange_s": _mean(entry.exchanges_s, 6),
                "compute_share": self._mean("compute_share", 4),
                "lost_sections": self._lost.get(number, 0),
                "digest": min(entry.digests),
            }
        return line

    def _mean(self, name: str, digits: int) -> float:
        return _mean([getattr(voice, name) for voice in self._voices.values()], digits)

    def finish(self) -> Row:
        """Write what is left, and return what of the run's row follows from the rounds."""
        self._flush(up_to=max(self._rounds, default=0))
        for name, (up, down) in self._ends.items():
            self._voices[name] = _Voice(up, down, self._voices[name].compute_share)
        sent = sum(voice.bytes_up for voice in self._voices.values())
        ratio = self._allreduce_bytes / sent if sent and self._allreduce_bytes else None
        return {
            "rounds": self.last.get("round", 0),
            "tokens": self.last.get("tokens", 0),
            "eval_loss": self.last.get("eval_loss"),
            "bytes_up_per_worker": self._mean("bytes_up", 1),
            "bytes_down_per_worker": self._mean("bytes_down", 1),
            "payload_bytes": _mean(self._payloads, 1),
            "bytes_per_param_step": float(f"{sent / max(1.0, self._steps) / self._num_params:.4g}"),
            "ratio_vs_fp32_allreduce": None if ratio is None else round(ratio, 3),
            "virtual_time_s": self.last.get("time_s", 0.0),
            "compute_share": self._mean("compute_share", 4),
            "contributors_mean": _mean(self._contributors, 3),
            "lost_sections": sum(self._lost.values()),
            "digest": self.last.get("digest", ""),
            "digests_equal": self._one_theta,
        }


def _mean(values: list[Any], digits: int) -> float:
    return round(math.fsum(values) / len(values), digits) if values else 0.0
