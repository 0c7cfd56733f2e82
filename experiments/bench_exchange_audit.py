"""What signatures and audits cost a round: bytes, and time on one core. Members and their updates are made up.

python -m dtrain.experiments.bench_exchange_audit --params 25e6 --members 16 --k 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.dht import evidence
from dtrain.dht.evidence import AnsweredAudit, ReducedSpan
from dtrain.dht.identity import Identity
from dtrain.dht.kept_residual import Commitment
from dtrain.dht.membership import Member
from dtrain.dht.seals import Setting, is_section_of, sign_aggregate, sign_section

RUN, ROUND, WEIGHT = b"benchrun", 3, 10_000.0
ROW = 4096
REPEATS = 5
T = TypeVar("T")


@dataclass(frozen=True)
class Costs:
    """Of one round. A share is one of all bytes that the members send for sections and aggregates."""

    payload_bytes: int
    section_bytes: int
    aggregates_bytes: int
    answer_bytes: int
    audits_per_round: float
    audits_share: float
    signatures_share: float
    sign_ms: float
    verify_ms: float
    reduce_ms: float
    commit_ms: float  # the reducer: hashing its residual
    look_ms: float  # every member: comparing what it has with what it sent
    answer_ms: float
    judge_ms: float  # one audit, without the screen
    screen_ms: float  # and with it, that much more


def measure(num_params: int, num_members: int, k: int) -> Costs:
    """Medians of REPEATS runs."""
    rows = num_params // ROW
    codec = Codec(CodecSpec(k=k, value_bits=2), [("w", (rows, ROW))])
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(num_members)]
    members = [Identity(Path(), key) for key in keys]
    listed = [Member(member.peer_id, WEIGHT, True) for member in members]
    setting = Setting.of(RUN, ROUND, bytes(32), bytes(20), listed)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(rows, ROW, generator=generator)
    place = {"run": RUN, "round": ROUND}
    payloads = [
        codec.encode(
            [common + torch.randn(rows, ROW, generator=generator)],
            codec.error_feedback(),
            decay=1.0,
            **place,  # type: ignore[arg-type]
        )
        for _ in members
    ]

    def reduce(span: tuple[int, int]) -> tuple[bytes, torch.Tensor]:
        left_over = codec.residual(*span)
        sections = [(i, WEIGHT, codec.cut(payload, *span)) for i, payload in enumerate(payloads)]
        first, count = span
        aggregate = codec.reduce(
            sections, residual=left_over, run=RUN, round=ROUND, first_chunk=first, num_chunks=count
        )
        return aggregate, left_over * (WEIGHT * num_members)

    spans = [span for span in codec.spans([1.0] * num_members) if span[1]]
    span, aggregates = spans[0], {j: reduce(span)[0] for j, span in enumerate(spans)}
    sections = [codec.cut(payload, *span) for payload in payloads]
    signature, sign_ms = timed(lambda: sign_section(members[0], setting, span, sections[0]))
    _, verify_ms = timed(lambda: is_section_of(members[0].peer_id, setting, span, sections[0], signature))
    (aggregate, after), reduce_ms = timed(lambda: reduce(span))
    leaves, commit_ms = timed(lambda: audit.leaves(codec, *span, after))
    seal = sign_aggregate(members[0], setting, span, aggregate, root=audit.root(leaves))
    signed = [(i, s, sign_section(members[i], setting, span, s)) for i, s in enumerate(sections)]
    kept = ReducedSpan(
        setting, span, signed, aggregate, Commitment(seal, leaves), codec.residual(*span), None
    )
    (header, blob), answer_ms = timed(lambda: evidence.answer(codec, kept, 0, members[0]))
    found = AnsweredAudit(setting, aggregate, seal, None, 0, blob, header["signature"])
    fault, judge_ms = timed(lambda: found.fault(codec, RUN, screens=False))
    assert fault == "", fault
    weighted = [(i, WEIGHT, section) for i, section in enumerate(sections)]
    _, screen_ms = timed(lambda: audit.miscounted(codec, aggregate, weighted, span, screens=True))
    _, look_ms = timed(lambda: audit.draw(codec, payloads[0], aggregates, 0, num_members, bytes(32)))
    payload_bytes, aggregates_bytes = len(payloads[0]), sum(map(len, aggregates.values()))
    opened_bytes = 4 * len(codec.residual(*audit.opened(codec, span, 0)))
    likely = audit.rate(num_members, payload_bytes, aggregates_bytes, opened_bytes)
    per_round = num_members * (len(spans) - 1) * likely
    round_bytes = (num_members - 1) * (payload_bytes + aggregates_bytes)
    return Costs(
        payload_bytes,
        len(sections[0]),
        aggregates_bytes,
        len(blob),
        per_round,
        per_round * len(blob) / round_bytes,
        (num_members - 1) * len(spans) * (64 + 128) / round_bytes,
        sign_ms,
        verify_ms,
        reduce_ms,
        commit_ms,
        look_ms,
        answer_ms,
        judge_ms,
        screen_ms,
    )


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the median of its times in ms."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = work()
        times.append(1e3 * (time.perf_counter() - began))
    return result, median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--params", type=float, default=25e6)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--k", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in asdict(measure(int(args.params), args.members, args.k)).items():
        print(f"{name:>20}  {value:,.4g}" if isinstance(value, float) else f"{name:>20}  {value:,}")


if __name__ == "__main__":
    main()
