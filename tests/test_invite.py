"""Laws of invites: one line of text carries everything unharmed, or is refused with a reason."""

from __future__ import annotations

import base64
import hashlib
import re
import textwrap

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.dht.invite import MAX_ADDRESSES, SCHEME, Invite, InviteError, decode

ADDRESS = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooWQ7xYTC5TvvXAbk1ZyxYXaZJbEt2PnVxM1Yt4GzvJGuRG"
INVITE = Invite("my-run", bytes(range(32)), bytes(range(32, 64)), (ADDRESS, "/dns4/host.example/tcp/1"))


def sealed(fields: object) -> str:
    """Any fields in an invite's clothes, checksum included."""
    body = msgpack.packb(fields)
    return SCHEME + base64.urlsafe_b64encode(body + hashlib.sha256(body).digest()[:4]).decode().rstrip("=")


@given(
    run_id=st.text(max_size=64),
    manifest_hash=st.binary(min_size=32, max_size=32),
    organizer=st.binary(min_size=32, max_size=32),
    addresses=st.lists(st.text(max_size=120), min_size=1, max_size=MAX_ADDRESSES),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_an_invite_comes_back_as_it_was(
    run_id: str, manifest_hash: bytes, organizer: bytes, addresses: list[str]
) -> None:
    """decode(encode) is the same invite, whatever it holds; its text is safe in a URL and in a shell."""
    invite = Invite(run_id, manifest_hash, organizer, tuple(addresses))
    text = invite.encode()
    assert re.fullmatch(r"dtrain://[A-Za-z0-9_-]+", text)
    assert decode(text) == invite


def test_what_mail_and_chat_do_to_a_line_does_no_harm() -> None:
    """Line breaks, spaces around it, padding, or a lost scheme change nothing."""
    text = INVITE.encode()
    for variant in (
        f"  {text}\n",
        "\r\n".join(textwrap.wrap(text, 30)),
        text.removeprefix(SCHEME),
        text + "=" * (-len(text.removeprefix(SCHEME)) % 4),
    ):
        assert decode(variant) == INVITE


@given(data=st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_damage_is_noticed(data: st.DataObject) -> None:
    """A changed, missing or added character is refused with one line, or decodes to the very same invite."""
    text = INVITE.encode()
    at = data.draw(st.integers(len(SCHEME), len(text) - 1))
    kind = data.draw(st.sampled_from(["change", "cut", "drop", "insert"]))
    letter = data.draw(st.characters(exclude_categories=["Cs"]))
    middle = {"change": letter, "cut": "", "drop": "", "insert": letter + text[at]}[kind]
    damaged = text[:at] + middle + ("" if kind == "cut" else text[at + 1 :])
    try:
        assert decode(damaged) == INVITE  # e.g. a space put in, or unused bits of the last character
    except InviteError as error:
        assert "\n" not in str(error)


@given(
    st.one_of(
        st.text(max_size=200),
        st.binary(max_size=200).map(lambda blob: SCHEME + base64.urlsafe_b64encode(blob).decode()),
    )
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_garbage_is_refused(text: str) -> None:
    """What is not an invite raises InviteError and nothing else."""
    with pytest.raises(InviteError):
        decode(text)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        7,
        [],
        {},
        [1],
        [1, "run", bytes(32), bytes(32)],
        [1, "run", bytes(31), bytes(32), ["a"]],
        [1, "run", bytes(32), "x" * 32, ["a"]],
        [1, b"run", bytes(32), bytes(32), ["a"]],
        [1, "run", bytes(32), bytes(32), []],
        [1, "run", bytes(32), bytes(32), ["a"] * (MAX_ADDRESSES + 1)],
        [1, "run", bytes(32), bytes(32), [7]],
        [1, "run", bytes(32), bytes(32), "a"],
    ],
)
def test_a_wrong_form_is_refused(fields: object) -> None:
    """Well-sealed fields of the wrong kind, size or number are refused: the receiver checks, not only the maker."""
    with pytest.raises(InviteError, match="cannot be read"):
        decode(sealed(fields))


@pytest.mark.parametrize("rest", [["run", bytes(32), bytes(32), ["a"]], [], [{"all": "new"}]])
def test_a_newer_version_says_so(rest: list[object]) -> None:
    """An invite of another version, whatever its fields are by then, tells the user to upgrade."""
    with pytest.raises(InviteError, match=r"has version 2.*upgrade"):
        decode(sealed([2, *rest]))
