"""Hostile bytes into every reader: a named refusal or a harmless result, never anything else.

The default suite offers 2,200 here and 9,000 in test_fuzz_parsers.py; `make fuzz` 20,000 by each of two ways.
"""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from fuzz_codec import CODECS, SOURCES, SPECS, offer
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_tools import checked, reseal

from dtrain.compression import wire

MUTATIONS = {
    "which": st.tuples(st.integers(0, len(SPECS) - 1), st.integers(0, 2)),
    "edits": st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=8),
    "moved": st.none() | st.tuples(st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 40)),
    "cut": st.integers(-40, 40),
    "honest": st.booleans(),
}


def mutated(
    which: tuple[int, int],
    edits: list[tuple[int, int]],
    moved: tuple[int, int, int] | None,
    cut: int,
    honest: bool,
) -> str:
    """Spoil a good payload or aggregate and offer it."""
    source = SOURCES[which[0]][which[1]]
    data = bytearray(source[:cut] if cut < 0 else source + bytes(cut))
    for position, value in edits:
        data[position % len(data)] = value
    if moved:
        to, start, size = moved[0] % len(data), moved[1] % len(data), moved[2]
        piece = data[start : start + size]
        data[to : to + len(piece)] = piece
    return offer(which[0], reseal(bytes(data)) if honest else bytes(data), everywhere=len(edits) == 1)


def many(count: int) -> set[str]:
    """Flip bits and bytes behind the header, honestly resealed; the reasons that came up."""
    generator, reasons = np.random.default_rng(0), set()
    for i in range(count):
        index = i % len(SPECS)
        data = np.frombuffer(SOURCES[index][int(generator.integers(3))], np.uint8).copy()
        for place in generator.integers(wire.HEADER_BYTES if i % 5 else 0, len(data), 1 + i % 3):
            data[place] = generator.integers(256) if i % 2 else data[place] ^ (1 << generator.integers(8))
        reasons.add(offer(index, reseal(data.tobytes()), everywhere=i % 50 == 0))
    return reasons


def test_good_bytes_pass() -> None:
    """What nobody spoiled passes every check."""
    assert not any(
        checked(codec, data) for codec, three in zip(CODECS, SOURCES, strict=True) for data in three
    )


@given(**MUTATIONS)
@settings(max_examples=900, deadline=None, derandomize=True)
def test_mutated_bytes_are_refused_or_harmless(**mutation: object) -> None:
    """Any edit, move and truncation ends in a named refusal or in finite values; no other exception gets out."""
    mutated(**mutation)  # type: ignore[arg-type]


def test_flipped_bytes_are_refused_or_harmless() -> None:
    """The same for a few changed bytes; every part of the format is reached."""
    expected = {
        "",
        "bad-padding",
        "bad-length",
        "index-out-of-range",
        "wrong-codec",
        "bad-contributors",
        "not-finite",
    }
    assert expected <= many(1200)


@given(data=st.binary(max_size=300), kind=st.integers(0, 4), index=st.integers(0, len(SPECS) - 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_noise_is_refused(data: bytes, kind: int, index: int) -> None:
    """Random bytes, alone and behind a right header, are refused by name."""
    head = bytearray(SOURCES[index][0][: wire.HEADER_BYTES])
    head[5] = kind
    assert offer(index, data, everywhere=True)
    assert offer(index, reseal(bytes(head) + data), everywhere=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(**MUTATIONS)
@settings(max_examples=20_000, deadline=None)
def test_20000_mutations_do_no_harm(**mutation: object) -> None:
    """As above, new ones each time."""
    mutated(**mutation)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_20000_flipped_bytes_do_no_harm() -> None:
    """As above, more of them."""
    assert len(many(20_000)) > 8


@pytest.mark.parametrize("index", range(len(SPECS)), ids=lambda index: f"{SPECS[index].kind}-{index}")
def test_claims_cost_nothing(index: int) -> None:
    """Counts and lengths of up to 2**63 are refused before memory is taken for them."""
    payload, union, recompressed = SOURCES[index]
    first_section = wire.HEADER_BYTES + 2 * wire.CONTRIBUTOR_BYTES
    huge = [
        payload[:40] + struct.pack("<Q", 2**40) + payload[48:],
        reseal(payload[:32] + struct.pack("<I", 2**32 - 1) + payload[36:]),
        reseal(payload[:28] + struct.pack("<II", 2**31, 2**31 - 1) + payload[36:]),
        reseal(union[:6] + b"\xff\xff" + union[8:]),
        reseal(union[: first_section + 40] + struct.pack("<Q", 2**63) + union[first_section + 48 :]),
        reseal(recompressed[:6] + b"\xff\xff" + recompressed[8:]),
    ]
    if CODECS[index].spec.kind == "topk":  # its first group claims to be very long
        huge.append(reseal(payload[: wire.HEADER_BYTES] + b"\xff" * 4 + payload[wire.HEADER_BYTES + 4 :]))
    for data in SOURCES[index]:
        offer(index, data, everywhere=False)  # compiles, and fills what is filled once
    for data in huge:
        tracemalloc.start()
        try:
            assert checked(CODECS[index], data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * len(data) + 100_000
