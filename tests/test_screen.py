"""Laws of the reducer's screen: hostile sections hardly move the sum, honest ones are all in it in full."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from dtrain.compression import screen as module
from dtrain.compression.codec import Codec
from dtrain.compression.screen import screen
from dtrain.compression.spec import CodecSpec

RUN, MEMBERS = b"8 bytes.", 16
CODEC = Codec(CodecSpec(k=512, value_bits=2), [("a", (128, 256)), ("b", (64, 64)), ("norm", (300,))])
WHOLE = 0, CODEC.num_chunks
Attack = Callable[[list[torch.Tensor], int], torch.Tensor]


def encoded(values: torch.Tensor) -> bytes:
    """A payload that holds the largest of these values, in chunk order."""
    nothing = [torch.zeros(shape) for _, shape in CODEC.shapes]
    return CODEC.encode(nothing, values.clone(), decay=1.0, run=RUN, round=3)


def updates(seed: int = 0, common: float = 0.6) -> list[torch.Tensor]:
    """What honest workers have to say: one direction, and noise of their own. Real ones: cosines 0.2 to 0.6."""
    draw = torch.Generator().manual_seed(seed)
    size = CODEC.feedback_numel
    direction = torch.randn(size, generator=draw)
    return [common * direction + torch.randn(size, generator=draw) for _ in range(MEMBERS)]


def noise(seed: int) -> torch.Tensor:
    return torch.randn(CODEC.feedback_numel, generator=torch.Generator().manual_seed(1000 + seed))


ATTACKS: dict[str, Attack] = {
    "sign flip": lambda honest, i: -honest[i],
    "x100": lambda honest, i: 100 * honest[i],
    "x100 flipped": lambda honest, i: -100 * honest[i],
    "random": lambda honest, i: noise(i) * honest[i].norm() / noise(i).norm(),
    "the same random from all": lambda honest, i: 1.5 * noise(0),
    "zero": lambda honest, i: torch.zeros_like(honest[i]),
    "copy": lambda honest, i: honest[-1],
}


@functools.cache
def honest_payloads() -> list[bytes]:
    return [encoded(values) for values in updates()]


def with_attackers(name: str, attackers: int) -> list[bytes]:
    """The payloads of a swarm whose first members attack."""
    honest = updates()
    return [encoded(ATTACKS[name](honest, i)) for i in range(attackers)] + honest_payloads()[attackers:]


def mean_of(sections: list[tuple[int, float, bytes]]) -> torch.Tensor:
    total = torch.zeros(CODEC.feedback_numel)
    for _, weight, section in sections:
        total += weight * CODEC.values(section)
    return total / sum(weight for _, weight, _ in sections)


@pytest.mark.parametrize("seed", range(3))
def test_honest_sections_are_all_in_the_sum_in_full(seed: int) -> None:
    """Unequal weights and norms as they occur among unlike machines change nothing."""
    sections = [
        (i, 100.0 * (1 + i % 4), encoded(values * (0.7 + 0.1 * (i % 6))))
        for i, values in enumerate(updates(seed, common=0.4))
    ]
    result = screen(CODEC, sections, *WHOLE)
    assert result.sections == sections and not result.refused


@pytest.mark.parametrize("attackers", [3, 5])
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_sections_hardly_move_the_sum(name: str, attackers: int) -> None:
    """The screened mean is near the honest one, in direction and length; unscreened attacks move it far more."""
    sections = [(i, 100.0, payload) for i, payload in enumerate(with_attackers(name, attackers))]
    result = screen(CODEC, sections, *WHOLE)
    good, plain, screened = mean_of(sections[attackers:]), mean_of(sections), mean_of(result.sections)
    off = float((screened - good).norm() / good.norm())
    assert off < 0.35, off
    assert off <= float((plain - good).norm() / good.norm()) + 0.05
    kept = {index: weight for index, weight, _ in result.sections}
    assert all(kept.get(i, 0.0) > 60.0 for i in range(attackers, MEMBERS - 1))
    assert all(index < attackers for index in result.refused)


@pytest.mark.parametrize(("name", "reason"), [("sign flip", "against"), ("x100", "norm"), ("zero", "empty")])
def test_the_blatant_are_refused_by_name(name: str, reason: str) -> None:
    """They are in no sum from their first round on."""
    sections = [(i, 1.0, payload) for i, payload in enumerate(with_attackers(name, 5))]
    result = screen(CODEC, sections, *WHOLE)
    assert result.refused == dict.fromkeys(range(5), reason)


def test_claimed_tokens_buy_little() -> None:
    """Whoever claims 64 times the others' tokens counts four times."""
    sections = [(i, 6400.0 if i < 3 else 100.0, payload) for i, payload in enumerate(honest_payloads())]
    kept = {index: weight for index, weight, _ in screen(CODEC, sections, *WHOLE).sections}
    assert [kept[i] for i in range(5)] == [400.0, 400.0, 400.0, 100.0, 100.0]


def test_where_nothing_can_be_seen_nothing_is_judged() -> None:
    """Updates without a common direction, and groups of four, pass as they are."""
    unlike = [(i, 1.0, encoded(noise(i))) for i in range(MEMBERS)]
    assert screen(CODEC, unlike, *WHOLE).sections == unlike
    few = [(i, 1.0, encoded(-values if i == 0 else values)) for i, values in enumerate(updates()[:4])]
    assert screen(CODEC, few, *WHOLE).sections == few


def test_a_long_span_is_judged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is that of the whole, however little is decoded at a time."""
    honest = updates()
    sections = [(i, 1.0, encoded(-values if i < 4 else values)) for i, values in enumerate(honest)]
    whole = screen(CODEC, sections, *WHOLE)
    monkeypatch.setattr(module, "BLOCK", 5000)
    assert len(module._blocks(CODEC, *WHOLE)) > 3
    pieces = screen(CODEC, sections, *WHOLE)
    assert (pieces.sections, pieces.refused) == (whole.sections, whole.refused)
