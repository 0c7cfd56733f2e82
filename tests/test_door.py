"""Laws of the door: no forged attempt comes in, each is counted by its reason, and uses are counted across members."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils import get_dht_time

from dtrain.dht.door import LIST, OPEN, TOKEN, Admission, Door
from dtrain.dht.identity import Identity
from dtrain.dht.records import MAX_RECORD_BYTES, SignedRecords
from dtrain.dht.tokens import Revocations, Token, issue

ORGANIZER = Ed25519PrivateKey.generate()
RUN, OTHER_RUN = bytes(range(32)), bytes(32)
NOW = 1.8e9
YEAR_2100 = 4102444800.0


def peer() -> Identity:
    return Identity(Path(), Ed25519PrivateKey.generate())


def token(*, uses: int = 1000, expires: float = 0, run: bytes = RUN, by: Any = ORGANIZER) -> Token:
    return issue(by.sign, run, expires=int(expires), uses=min(uses, 250))


def door(mode: str = TOKEN, ledger: Path | None = None, allowed: tuple[str, ...] = ()) -> Door:
    admission = Admission(mode, RUN, ORGANIZER.public_key().public_bytes_raw(), frozenset(allowed))
    return Door(admission, lambda: NOW, ledger)


def shown(made: Token, who: Identity, run: bytes = RUN) -> bytes:
    return made.bind(run, who.peer_id_bytes).encode()


def passes() -> Iterator[tuple[str, str, object]]:
    """(reason, peer id, what it shows) of attempts that must fail."""
    once = token(uses=1)
    yield "", peer_one.peer_id, shown(once, peer_one)  # the one use that the token has
    for _ in range(100):
        who, victim = peer(), peer()
        good = token()
        yield "no-token", who.peer_id, b""
        yield "expired", who.peer_id, shown(token(expires=NOW - 1), who)
        yield "revoked", who.peer_id, shown(revoked_token, who)
        yield "wrong-run", who.peer_id, shown(token(run=OTHER_RUN), who, OTHER_RUN)
        yield "wrong-peer", who.peer_id, shown(good, victim)  # a copied pass under a peer id of one's own
        yield "bad-signature", who.peer_id, shown(token(by=Ed25519PrivateKey.generate()), who)
        yield "used-up", who.peer_id, shown(once, who)


peer_one, revoked_token = peer(), token()


def records(owner: Identity, other: Identity) -> Iterator[tuple[str, DHTRecord]]:
    """(reason, record) of attempts that must fail; all but the first kind are signed with their owner's key."""
    key = DHTID.generate("run.workers").to_bytes()
    for i in range(100):
        good = DHTRecord(
            key, msgpack.packb(owner.peer_id_bytes), msgpack.packb(bytes([i])), get_dht_time() + 10 + i
        )
        foreign = dataclasses.replace(good, subkey=msgpack.packb(other.peer_id_bytes))
        yield (
            "record-signature",
            dataclasses.replace(foreign, value=foreign.value + signature(owner, foreign)),
        )
        replayed = dataclasses.replace(good, value=good.value + signature(owner, good))
        yield "record-signature", dataclasses.replace(replayed, expiration_time=good.expiration_time + 1)
        for reason, changes in (
            ("record-expiry", {"expiration_time": YEAR_2100}),
            ("record-size", {"value": msgpack.packb(bytes(MAX_RECORD_BYTES))}),
            ("record-schema", {"value": msgpack.packb([i])}),
        ):
            record = dataclasses.replace(good, **changes)
            yield reason, dataclasses.replace(record, value=record.value + signature(owner, record))


def signature(by: Identity, record: DHTRecord) -> bytes:
    message = [b"dtrain-dht-record-1", record.key, record.subkey, record.value, record.expiration_time]
    return by.key.sign(msgpack.packb(message))


def test_1200_forged_attempts_come_to_nothing_and_are_counted() -> None:
    """A hundred of each of twelve kinds: none gets in, and the counts by reason are exact."""
    made, expected = door(), Counter[str]()
    revocations = Revocations.make(ORGANIZER.sign, RUN, 1, [revoked_token.grant.key], [])
    assert made.hear_revocations(revocations.blob)
    for reason, who, blob in passes():
        assert made.admit(who, blob) == reason
        expected[reason] += bool(reason)
        if reason:
            assert made.opinion(who) == "no-token"
    assert made.refusals == +expected
    validator, expected = SignedRecords(peer()), Counter()
    for reason, record in records(peer(), peer()):
        assert not validator.validate(record)
        expected[reason] += 1
    assert validator.refusals == expected
    assert sum(made.refusals.values()) + sum(validator.refusals.values()) == 1200


def test_a_token_lets_in_as_many_as_it_says() -> None:
    """Who is bound stays bound; who comes after the last use is refused, and a late one after the expiry."""
    made, good = door(), token(uses=2, expires=NOW + 10)
    first, second, third = peer(), peer(), peer()
    assert made.admit(first.peer_id, shown(good, first)) == ""
    assert made.admit(second.peer_id, shown(good, second)) == ""
    assert made.admit(third.peer_id, shown(good, third)) == "used-up"
    made._now = lambda: NOW + 20
    assert made.admit(first.peer_id, shown(good, first)) == ""
    assert made.refuses(second.peer_id) == ""
    late = peer()
    assert made.admit(late.peer_id, shown(token(expires=NOW + 10), late)) == "expired"


def test_uses_that_others_saw_count() -> None:
    """A member that comes later takes over who came before; what others say beyond the token's uses counts not."""
    old, new, good = door(), door(), token(uses=2)
    users = [peer() for _ in range(3)]
    for user in users[:2]:
        old.admit(user.peer_id, shown(good, user))
    new.learn(
        [*old.uses_of(good.grant.key), (users[2].peer_id, shown(good, users[2])), (peer().peer_id, b"x")]
    )
    assert new.uses_of(good.grant.key) == old.uses_of(good.grant.key)
    assert new.admit(users[2].peer_id, shown(good, users[2])) == "used-up"
    assert new.refuses(users[0].peer_id) == "no-token"  # it has to come and show its pass
    assert new.admit(users[0].peer_id, shown(good, users[0])) == ""


def test_uses_and_revocations_outlive_a_restart(tmp_path: Path) -> None:
    """The ledger brings both back; a damaged one is begun anew and hurts nobody."""
    path, good, user, later = tmp_path / "ledger", token(uses=1, expires=NOW + 10), peer(), peer()
    made = door(ledger=path)
    made.admit(user.peer_id, shown(good, user))
    made.hear_revocations(Revocations.make(ORGANIZER.sign, RUN, 5, [], [later.peer_id_bytes]).blob)
    again = door(ledger=path)
    again._now = lambda: NOW + 20
    assert again.admit(user.peer_id, shown(good, user)) == ""
    assert again.admit(peer().peer_id, shown(good, peer())) != ""
    assert again.refuses(later.peer_id) == "revoked"
    path.write_bytes(path.read_bytes()[:-5])
    assert door(ledger=path).admit(later.peer_id, shown(good, later)) == ""


def test_revocation_shuts_out_who_is_in() -> None:
    """A revoked token takes everybody with it, a revoked peer only itself; an older list undoes nothing."""
    made, one, two = door(), token(), token()
    a, b, c = peer(), peer(), peer()
    for user, through in ((a, one), (b, two), (c, two)):
        assert made.admit(user.peer_id, shown(through, user)) == ""
    newest = Revocations.make(ORGANIZER.sign, RUN, 7, [one.grant.key], [b.peer_id_bytes])
    assert made.hear_revocations(newest.blob)
    assert not made.hear_revocations(Revocations.make(ORGANIZER.sign, RUN, 6, [], []).blob)
    assert not made.hear_revocations(b"nonsense")
    assert [made.refuses(user.peer_id) for user in (a, b, c)] == ["revoked", "revoked", ""]
    assert made.admit(a.peer_id, shown(one, a)) == "revoked"
    assert made.admit(a.peer_id, shown(two, a)) == ""  # the organizer has invited it anew


def test_a_list_admits_whom_it_names() -> None:
    """No pass is asked for, and an open run admits everybody but who is revoked."""
    listed, stranger = peer(), peer()
    made = door(LIST, allowed=(listed.peer_id,))
    assert made.admit(listed.peer_id, b"") == made.refuses(listed.peer_id) == ""
    assert made.admit(stranger.peer_id, b"") == made.refuses(stranger.peer_id) == "not-listed"
    made = door(OPEN)
    assert made.admit(stranger.peer_id, b"") == made.refuses(stranger.peer_id) == ""
    made.hear_revocations(Revocations.make(ORGANIZER.sign, RUN, 1, [], [stranger.peer_id_bytes]).blob)
    assert made.admit(stranger.peer_id, b"") == made.refuses(stranger.peer_id) == "revoked"


@pytest.mark.parametrize("blob", [None, 7, "text", b"x" * 180, b"x" * 10_000])
def test_whatever_is_shown_is_judged(blob: object) -> None:
    """No type and no length gets past the door, or out of it as an exception."""
    assert door().admit(peer().peer_id, blob)
    assert door().admit("no peer id", blob)
