"""Every parser of what others send, as the fuzzers use it: honest samples, trees to spoil, and how the bytes are read.

`read(data)` gives the name of the refusal, or "" where the bytes were taken and what they say holds. Anything that it
raises is a bug of the parser. `tests/test_fuzz_parsers.py` and `scripts/fuzz_atheris.py` offer bytes to it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzz_codec import SOURCES, read_payload
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils import get_dht_time

from dtrain.compression.standing import Said
from dtrain.dht import invite
from dtrain.dht.admissions import _unpack_uses
from dtrain.dht.greetings import Greeting, pack_greeting, unpack_greeting
from dtrain.dht.history import parse_round
from dtrain.dht.identity import Identity
from dtrain.dht.membership import Contribution, Judging, agree_on_members, pack_hello
from dtrain.dht.reachability import DIRECT
from dtrain.dht.records import SignedRecords, pack_status, unpack_status
from dtrain.dht.state_donor import StateDonor, Written
from dtrain.dht.state_fetch import Malformed, StateFetch
from dtrain.dht.streams import StreamError, messages, parse_header
from dtrain.dht.tokens import Revocations, TokenError, decode_pass, decode_token, issue
from dtrain.dht.upload import UploadBudget
from dtrain.trainer import control_pb2
from dtrain.trainer.bulletin import Bulletin, EvalLine, RoundLine, Sample, unpack_bulletin, unpack_sample
from dtrain.trainer.control import Control
from dtrain.trainer.control_server import watch_pause_s
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.signing import OrganizerKey, SignedManifest

Tree = Any
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RUN = hashlib.sha256(b"run").digest()


@dataclass(frozen=True)
class Parser:
    """One kind of message. `trees` are (what an honest message says, how it is encoded)."""

    read: Callable[[bytes], str]
    samples: Callable[[], Sequence[bytes]]
    trees: Callable[[], Sequence[tuple[Tree, Callable[[Tree], bytes]]]]


# ---------------------------------------------------------------------- manifests


def read_manifest(data: bytes) -> str:
    """Signed, and the settings alone, as a hostile organizer could sign any."""
    reason = ""
    try:
        SignedManifest.from_json(data)
    except UsageError:
        reason = "refused"
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return "refused"
    settings = tree.get("manifest") if isinstance(tree, dict) else None
    if isinstance(settings, dict):
        try:
            manifest = Manifest.from_dict(settings)
        except UsageError:
            return "refused"
        assert Manifest.from_dict(json.loads(manifest.canonical_bytes())) == manifest
        assert math.isfinite(manifest.max_weight) and manifest.round_tokens_each > 0
    return reason


@lru_cache
def _manifests() -> tuple[SignedManifest, ...]:
    key = OrganizerKey(KEY)
    choices: list[dict[str, object]] = [
        {},
        {"strategy.name": "diloco", "admission.mode": "token"},
        {"strategy.name": "demo", "exchange.round_tokens": 4096},
    ]
    return tuple(key.sign(preset_manifest("fuzz", "tiny", choice)) for choice in choices)


def _manifest_trees() -> list[tuple[Tree, Callable[[Tree], bytes]]]:
    return [(json.loads(signed.to_json()), _to_json) for signed in _manifests()]


# ---------------------------------------------------------------------- invites


def read_invite(data: bytes) -> str:
    """As text, and as the body of one whose check sum is right."""
    reasons = [_decoded_invite(data.decode("latin-1"))]
    sealed = base64.urlsafe_b64encode(data + hashlib.sha256(data).digest()[:4]).decode()
    reasons.append(_decoded_invite(invite.SCHEME + sealed))
    for decode in (decode_token, decode_pass):
        try:
            decode(data)
        except TokenError as error:
            assert error.reason
    return "" if "" in reasons else reasons[1]


def _decoded_invite(text: str) -> str:
    try:
        found = invite.decode(text)
    except invite.InviteError as error:
        assert len(str(error)) < 400
        return "refused"
    assert invite.decode(found.encode()) == found
    return ""


@lru_cache
def _invites() -> tuple[invite.Invite, ...]:
    public, addresses = KEY.public_key().public_bytes_raw(), ("/ip4/127.0.0.1/tcp/31337/p2p/12D3KooW",)
    token = issue(KEY.sign, RUN, expires=0, uses=3)
    return invite.Invite("r", RUN, public, addresses), invite.Invite("r", RUN, public, addresses * 3, token)


def _invite_body(made: invite.Invite) -> bytes:
    text = made.encode().removeprefix(invite.SCHEME)
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:-4]


# ---------------------------------------------------------------------- records

RECORD_KEY = DHTID.generate("fuzz.workers").to_bytes()
OWNER = Identity(Path(), KEY)
VALIDATOR = SignedRecords(OWNER)


def read_record(data: bytes) -> str:
    """The DHT's validator, then whoever reads the record's value; and what peers say of themselves directly."""
    subkey, expires = msgpack.packb(OWNER.peer_id_bytes), get_dht_time() + 60
    for foreign in (
        DHTRecord(data[:20], data[20:], data, expires),
        DHTRecord(RECORD_KEY, subkey, data, expires),
    ):
        assert not VALIDATOR.validate(foreign)
    record = DHTRecord(RECORD_KEY, subkey, msgpack.packb(data), expires)
    signed = DHTRecord(RECORD_KEY, subkey, VALIDATOR.sign_value(record), expires)
    assert VALIDATOR.validate(signed) == (len(signed.value) <= 64 * 1024)
    taken = [
        unpack_status(data) is not None,
        unpack_bulletin(data) is not None,
        unpack_sample(data) is not None,
        bool(_unpack_uses(data)),
        bool(agree_on_members(["a"], [data], 3, judging=Judging(least=1)).members),
    ]
    for read in (unpack_greeting, lambda blob: Revocations.decode(blob, RUN, None)):
        try:
            read(data)
            taken.append(True)
        except (ValueError, TokenError):
            pass
    return "" if any(taken) else "refused"


STATUS = {"round": 3, "digest": "ab" * 32, "state": "training", "work": 1e6, "name": "ada", "gpu": True}


def _bulletin() -> Bulletin:
    made = Bulletin()
    made.rounds.append(RoundLine(3, 1.0, 0.5, 0.25, 0.1, 3, True, 2.5, 1024))
    made.evals.append(EvalLine(3, 2.0))
    made.event(1e9, "problem", "text")
    made.refused = {"no-token": 3}
    return made


def _record_samples() -> list[bytes]:
    shown = issue(KEY.sign, RUN, expires=0, uses=3).bind(RUN, OWNER.peer_id_bytes).encode()
    return [
        pack_status(STATUS),
        _bulletin().pack(1e9, (5, 7)),
        Sample(3, "def", "text").pack(),
        msgpack.packb([[OWNER.peer_id, shown]]),
        pack_hello(
            Contribution(3, bytes(32), b"", 7.0), reach=DIRECT, mbps=3.0, shown=shown, said={"b": Said(3)}
        ),
        pack_greeting(Greeting(1.0, 2.0, STATUS, ("g", 3.0), shown, "no-token")),
        Revocations.make(KEY.sign, RUN, 3, [bytes(32)], [OWNER.peer_id_bytes]).blob,
    ]


def _record_trees() -> list[tuple[Tree, Callable[[Tree], bytes]]]:
    status, bulletin, sample, uses, hello, greeting, revoked = _record_samples()
    packed = [(msgpack.unpackb(blob), _to_msgpack) for blob in (status, uses, hello, greeting)]
    told = [(json.loads(blob), _to_json) for blob in (bulletin, sample)]
    return [*packed, *told, (msgpack.unpackb(revoked[:-64]), lambda tree: _to_msgpack(tree) + bytes(64))]


# ---------------------------------------------------------------------- state chunks

PIECES = (b"p" * 64, b"q" * 10)
HASHES = b"".join(hashlib.sha256(piece).digest() for piece in PIECES)
DIGEST = hashlib.sha256(HASHES).digest()
OFFER: dict[str, Any] = {"states": [[3, 5.0, DIGEST]]}
PAST = {"base": bytes(32), "members": ["a", "b"], "contributors": ["a"], "spans": [[0, 2, 4], [2, 1, 3]]}
PAST_BLOB = b"aggrega"
OFFERED, HASHED, PIECE, ROUND, ASKED = range(
    5
)  # which message is spoiled: three answers, a past round, a request


def read_state(data: bytes) -> str:
    """A download with one spoiled answer, a spoiled past round, or a donor that is asked: data[0] says which, and the
    messages follow, each behind two bytes of length."""
    which, received = data[0] % 5 if data else OFFERED, list(_unframed(data[1:]))
    if which == ASKED:
        return _loop().run_until_complete(_ask_donor(received))
    if which == ROUND:
        try:
            header = parse_header(received[0] if received else b"", 1 << 20)
            blob = b"".join(received[1:])
            past = parse_round(3, header, blob)
        except StreamError:
            return "refused"
        assert b"".join(past.aggregates) == blob and len(past.base_digest) == 32
        return ""
    answers = [list(_answer(OFFER)), list(_answer({}, HASHES)), list(_answer({}, PIECES[0]))]
    answers[which] = received
    return _loop().run_until_complete(_download(answers))


async def _download(answers: list[list[bytes]]) -> str:
    async def call(requests: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
        return _stream(answers.pop(0))

    partial: Any = SimpleNamespace(standing=None, total_bytes=74, missing=lambda hashes: [0, 1])
    fetch = StateFetch(
        lambda: ["donor"],
        lambda donor, name: call,
        partial,
        [len(piece) for piece in PIECES],
        active=lambda: [],
        passed=SimpleNamespace(),  # type: ignore[arg-type]
        least_work=1.0,
        own=b"",
        where=bytes,
        on_progress=lambda have, total: None,
        on_left=lambda donor, reason: None,
    )
    try:
        offers = await fetch._ask_offers("donor", b"")
        await fetch._get_hashes("donor", DIGEST)
        piece = await fetch._piece("donor", DIGEST, 0)
    except (StreamError, Malformed):
        return "refused"
    assert piece == PIECES[0] and all(len(offer.digest) == 32 and offer.work >= 1.0 for offer in offers)
    return ""


async def _ask_donor(received: list[bytes]) -> str:
    donor = StateDonor([len(piece) for piece in PIECES], _written, lambda: (3, DIGEST), UploadBudget())
    donor._snapshots.append(
        SimpleNamespace(round=3, work=5.0, digest=DIGEST, hashes=HASHES, data=b"".join(PIECES), used=math.inf)  # type: ignore[arg-type]
    )
    requests = _stream(received)

    async def read_header() -> dict[str, Any]:
        async for message in requests:
            return parse_header(message.value, 0)
        raise StreamError("the stream ended early")

    told = [message.value async for message in donor.serve(requests, read_header)]
    header = msgpack.unpackb(told[0])
    assert "refused" in header or header["size"] == sum(map(len, told[1:]))
    assert header.get("refused") != "internal error", header
    return "refused" if "refused" in header else ""


async def _written() -> Written | None:
    return None


async def _stream(blobs: Sequence[bytes]) -> AsyncIterator[BytesValue]:
    for blob in blobs:
        yield BytesValue(value=blob)


def _answer(header: Mapping[str, Any], blob: bytes = b"") -> Iterator[bytes]:
    return (message.value for message in messages(header, blob))


def _framed(which: int, blobs: Sequence[bytes]) -> bytes:
    return bytes([which]) + b"".join(struct.pack(">H", len(blob)) + blob for blob in blobs)


def _unframed(data: bytes) -> Iterator[bytes]:
    while data:
        size = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + size]
        data = data[2 + size :]


@lru_cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _state_samples() -> list[bytes]:
    asked = [{"want": "offer", "digest": b"", "work": 1.0}, {"want": "hashes", "digest": DIGEST}]
    asked.append({"want": "piece", "digest": DIGEST, "piece": 1})
    return [
        _framed(OFFERED, list(_answer(OFFER))),
        _framed(HASHED, list(_answer({}, HASHES))),
        _framed(PIECE, list(_answer({}, PIECES[0]))),
        _framed(ROUND, list(_answer(PAST, PAST_BLOB))),
        *(_framed(ASKED, list(_answer(header))) for header in asked),
    ]


def _state_trees() -> list[tuple[Tree, Callable[[Tree], bytes]]]:
    def sent(which: int, blob: bytes) -> Callable[[Tree], bytes]:
        blobs = [blob] if blob else []
        return lambda tree: _framed(which, [_to_msgpack(tree), *blobs])

    told = [
        (OFFERED, OFFER, b""),
        (HASHED, {}, HASHES),
        (PIECE, {}, PIECES[0]),
        (ROUND, PAST, PAST_BLOB),
        (ASKED, {"want": "piece", "digest": DIGEST, "piece": 1}, b""),
        (ASKED, {"want": "offer", "digest": DIGEST, "work": 1.0}, b""),
    ]
    return [({**tree, "size": len(blob)}, sent(which, blob)) for which, tree, blob in told]


# ---------------------------------------------------------------------- control messages

REQUESTS = (control_pb2.Limits, control_pb2.WatchRequest, control_pb2.LogRequest, control_pb2.StatusRequest)


def read_control(data: bytes) -> str:
    """A request to a running worker, of the kind that data[0] says, from somebody who has its token."""
    kind = REQUESTS[data[0] % len(REQUESTS)] if data else REQUESTS[0]
    try:
        request = kind.FromString(data[1:])
    except DecodeError:
        return "refused"
    if isinstance(request, control_pb2.WatchRequest):
        assert 0.05 <= watch_pause_s(request.per_s) <= 60.0
    if isinstance(request, control_pb2.Limits):
        control = Control()
        try:
            control.set_limits({field.name: value for field, value in request.ListFields()})
        except UsageError as error:
            assert len(str(error)) < 400
            return "refused"
        limits = control.limits
        assert 0.0 <= control.rest_s(1.0) <= 99.0 and limits.describe()
        assert control_pb2.Limits.FromString(control_pb2.Limits(**vars(limits)).SerializeToString())
        control.held()
    return ""


def _control_samples() -> list[bytes]:
    limits = control_pb2.Limits(
        up_mbps=5.0, compute_percent=50.0, threads=2, hours="22:00-08:00", on_battery=False
    )
    watch, log = control_pb2.WatchRequest(per_s=2.0), control_pb2.LogRequest(lines=3, follow=True)
    return [bytes([i]) + m.SerializeToString() for i, m in enumerate((limits, watch, log))]


def _control_trees() -> list[tuple[Tree, Callable[[Tree], bytes]]]:
    limits = {"up_mbps": 5.0, "compute_percent": 50.0, "threads": 2, "hours": "22:00-08:00", "memory_gb": 1.0}
    return [(limits, _request(0)), ({"per_s": 2.0}, _request(1)), ({"lines": 3, "follow": True}, _request(2))]


def _request(index: int) -> Callable[[Tree], bytes]:
    def encode(tree: Tree) -> bytes:
        try:
            return bytes([index]) + REQUESTS[index](**tree).SerializeToString()
        except (TypeError, ValueError, OverflowError, AttributeError):  # no client can send that
            return bytes([index])

    return encode


def _to_json(tree: Tree) -> bytes:
    return json.dumps(tree, default=repr).encode("utf-8", "surrogatepass")


def _to_msgpack(tree: Tree) -> bytes:
    try:
        packed: bytes = msgpack.packb(tree, unicode_errors="surrogatepass")
    except (OverflowError, ValueError):  # an integer that msgpack has no form for
        return b"\xc1"
    return packed


PARSERS = {
    "manifest": Parser(read_manifest, lambda: [s.to_json().encode() for s in _manifests()], _manifest_trees),
    "invite": Parser(
        read_invite,
        lambda: [blob for made in _invites() for blob in (made.encode().encode(), _invite_body(made))],
        lambda: [(msgpack.unpackb(_invite_body(made)), _to_msgpack) for made in _invites()],
    ),
    "record": Parser(read_record, _record_samples, _record_trees),
    "state": Parser(read_state, _state_samples, _state_trees),
    "control": Parser(read_control, _control_samples, _control_trees),
    "payload": Parser(
        read_payload, lambda: [bytes([i]) + s for i, three in enumerate(SOURCES) for s in three], list
    ),
}


# ---------------------------------------------------------------------- spoiling

TOKENS = (
    *(
        b"\xc1",
        b"\xc0",
        b"\xc3",
        b"\x90",
        b"\x80",
        b"\xc4\x00",
        b"\xd4\x00\x00",
    ),  # msgpack: none, true, empty, ...
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"),
    *(b"\xcb\x7f\xf8" + bytes(6), b"\xcb\x7f\xf0" + bytes(6), b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7)),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 400,
        b"-1",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'"\\ud800"',
        b"[" * 1100,
    ),
    *(b"\x91" * 900 + b"\x90", b"\x81\xa0" * 600 + b"\x80", b"\xff" * 10, bytes(10)),
)
"""What parsers stumble over: lengths far beyond the message, numbers that are none, and nesting."""


def spoiled(samples: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Samples with bytes flipped, replaced, cut off, moved, repeated, put in from TOKENS, or from another sample."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(draw.choice(samples))
        for _ in range(draw.randint(1, 3)):
            at, size = draw.randint(0, len(data)), draw.randint(1, 16)
            kind = draw.randrange(7)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1 and at < len(data):
                data[at] = draw.randrange(256)
            elif kind == 2:
                del data[at : at + size]
            elif kind == 3:
                del data[at:]
            elif kind == 4:
                data[at : at + draw.choice((0, 1, size))] = draw.choice(TOKENS)
            elif kind == 5:
                other = draw.choice(samples)
                begin = draw.randint(0, len(other))
                data[at : at + size] = other[begin : begin + size]
            else:
                to = draw.randint(0, len(data))
                data[to:to] = data[at : at + size]
        yield bytes(data)


def places(tree: Tree) -> Iterator[tuple[object, ...]]:
    """The way to every value of a tree of dicts and lists, and to the tree itself."""
    yield ()
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from ((key, *rest) for rest in places(child))


def with_value(tree: Tree, place: Sequence[Any], value: Tree) -> Tree:
    """The tree with another value there; the given one stays as it is."""
    if not place:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[place[0]] = with_value(copy[place[0]], place[1:], value)
    return copy
