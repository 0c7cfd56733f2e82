"""Laws of audits in the in-memory swarm: cheats lose their spans soon, honest reducers never, and the bytes are few."""

from __future__ import annotations

import pytest
import torch

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.experiments.memory_audit import CHEATS
from dtrain.experiments.memory_round import Contribution, Faults, GroupReducer, Reduced

MEMBERS = 8
NAMES = [f"worker-{i:02}" for i in range(MEMBERS)]
# Sparse enough that what a round sends outweighs what one audit opens.
CODEC = Codec(CodecSpec(chunk=64, k=16, value_bits=2), [("t", (64 * 64 * MEMBERS,))])
RUN = bytes(8)


def train(rounds: int, faults: Faults, *, signal: float = 1.0) -> tuple[GroupReducer, list[Reduced]]:
    """Rounds of members whose updates have a common part that changes slowly, and noise that is each one's own."""
    reducer = GroupReducer(CODEC, RUN, 4, faults, screens=True, audits=True)
    feedbacks = [CODEC.error_feedback() for _ in range(MEMBERS)]
    generator = torch.Generator().manual_seed(0)
    common, ended = torch.randn(CODEC.num_params, generator=generator), []
    for round in range(rounds):
        common = 0.9 * common + 0.4 * torch.randn(CODEC.num_params, generator=generator)
        members = []
        for name, feedback in zip(NAMES, feedbacks, strict=True):
            delta = signal * common + torch.randn(CODEC.num_params, generator=generator)
            payload = CODEC.encode([delta], feedback, decay=0.95, run=RUN, round=round)
            members.append(Contribution(name, bytes(32), payload, 100.0))
        ended.append(reducer.reduce(round, members))
    return reducer, ended


@pytest.mark.parametrize("signal", [1.0, 0.2])
def test_nobody_honest_is_found_guilty_and_audits_cost_little(
    signal: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the updates agree or hardly do; the bytes stay near their share of all that is sent."""
    monkeypatch.setattr(audit, "OPENED_BYTES", 16 * 1024)
    reducer, ended = train(8, Faults(), signal=signal)
    assert reducer.audits is not None
    assert reducer.audits.guilty == {} and reducer.audits.num_audits > 0
    sent = sum(sum(round.bytes_up.values()) for round in ended)
    assert reducer.audits.num_bytes < 2 * audit.BYTES_SHARE * sent


@pytest.mark.parametrize("kind", ["turned", "hundredfold", "random"])
def test_who_is_blatant_loses_its_span_within_rounds(kind: str) -> None:
    """Two of eight, each found by what its sums look like to the others; nobody else is."""
    cheats = {NAMES[3]: kind, NAMES[6]: kind}
    reducer, ended = train(6, Faults(sums=cheats))
    assert reducer.audits is not None
    assert set(reducer.audits.guilty) == set(cheats)
    assert len(ended[0].aggregates) == MEMBERS and len(ended[-1].aggregates) == MEMBERS - 2


def test_what_does_not_show_is_found_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is only a little wrong: no member sees it, an audit does."""
    monkeypatch.setattr(audit, "BYTES_SHARE", 1.0)
    assert "slanted" in CHEATS
    reducer, _ = train(3, Faults(sums={NAMES[5]: "slanted"}))
    assert reducer.audits is not None and set(reducer.audits.guilty) == {NAMES[5]}
