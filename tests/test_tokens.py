"""Laws of tokens and passes: only the organizer grants, only for one run, and a pass serves one peer only."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtrain.dht.identity import Identity
from dtrain.dht.tokens import (
    MAX_REVOKED,
    MAX_USES,
    PASS_BYTES,
    TOKEN_BYTES,
    Revocations,
    TokenError,
    decode_pass,
    decode_token,
    issue,
)

ORGANIZER, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC = ORGANIZER.public_key().public_bytes_raw()
RUN, OTHER_RUN = bytes(range(32)), bytes(32)
PEER = Identity(Path(), Ed25519PrivateKey.generate()).peer_id_bytes
TOKEN = issue(ORGANIZER.sign, RUN, expires=2**31, uses=3)
PASS = TOKEN.bind(RUN, PEER)
LIST = Revocations.make(ORGANIZER.sign, RUN, 1, [TOKEN.grant.key], [PEER])


def reason_of(blob: bytes, run: bytes = RUN, organizer: bytes = PUBLIC, peer: bytes = PEER) -> str:
    try:
        decode_pass(blob).check(run, organizer, peer)
    except TokenError as error:
        return error.reason
    return ""


def test_tokens_and_passes_come_back() -> None:
    """decode(encode) is the same, of the length that is announced, and a true pass is good."""
    assert decode_token(TOKEN.encode()) == TOKEN
    assert decode_pass(PASS.encode()) == PASS
    assert (len(TOKEN.encode()), len(PASS.encode())) == (TOKEN_BYTES, PASS_BYTES)
    assert reason_of(PASS.encode()) == ""
    assert Revocations.decode(LIST.blob, RUN, PUBLIC) == LIST


def test_a_pass_serves_one_peer_of_one_run_by_one_organizer() -> None:
    """Shown by another peer, at another run, or granted by somebody else it is refused by name."""
    other = Identity(Path(), Ed25519PrivateKey.generate()).peer_id_bytes
    assert reason_of(PASS.encode(), peer=other) == "wrong-peer"
    assert reason_of(PASS.encode(), run=OTHER_RUN) == "wrong-run"
    forged = issue(STRANGER.sign, RUN, expires=0, uses=1)
    assert reason_of(forged.bind(RUN, PEER).encode()) == "bad-signature"
    assert reason_of(b"") == "no-token"


@given(place=st.integers(0, PASS_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_no_bit_of_a_pass_can_be_changed(place: int, bit: int) -> None:
    """More uses, a later end, another key: every change breaks a signature."""
    changed = bytearray(PASS.encode())
    changed[place] ^= 1 << bit
    assert reason_of(bytes(changed))


@given(blob=st.binary(max_size=2 * PASS_BYTES))
@example(blob=bytes(PASS_BYTES))
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_garbage_is_refused_by_name(blob: bytes) -> None:
    """Whatever comes, it is a TokenError; nothing else gets out."""
    assert reason_of(blob)
    for read in (lambda: decode_token(blob), lambda: Revocations.decode(blob, RUN, PUBLIC)):
        with pytest.raises(TokenError):
            read()


def test_a_token_says_what_its_organizer_could_say() -> None:
    """Terms that no pass could hold are refused when the token is made."""
    for uses in (0, MAX_USES + 1):
        with pytest.raises(ValueError, match="uses"):
            issue(ORGANIZER.sign, RUN, expires=0, uses=uses)


def test_only_the_organizer_revokes_for_its_own_run() -> None:
    """Lists by others, of another run, changed or too long ones are refused."""
    forged = Revocations.make(STRANGER.sign, RUN, 9, [TOKEN.grant.key], [])
    foreign = Revocations.make(ORGANIZER.sign, OTHER_RUN, 9, [TOKEN.grant.key], [])
    changed = LIST.blob[:1] + bytes([LIST.blob[1] ^ 1]) + LIST.blob[2:]
    for blob in (forged.blob, foreign.blob, changed):
        with pytest.raises(TokenError, match="did not sign"):
            Revocations.decode(blob, RUN, PUBLIC)
    with pytest.raises(ValueError, match="begin a new run"):
        Revocations.make(
            ORGANIZER.sign, RUN, 1, [bytes([i // 256, i % 256]) * 16 for i in range(MAX_REVOKED + 1)], []
        )
