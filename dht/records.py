"""What the DHT may hold: small records, each under its owner's peer id, signed by that owner, for an hour at most.

hivemind's own RSA validator accepts records that carry no owner tag and puts no ceiling on expiry; this one refuses
both, so nobody can write under another peer's name or block a key for years. It also refuses what hivemind itself would
stumble over when somebody reads the key: one peer's bad record must not hide everybody else's.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgpack
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import get_dht_time

from dtrain.dht.identity import Identity, verify

MAX_RECORD_BYTES = 64 * 1024
MAX_LIFETIME_S = 3600.0
CLOCK_SLACK_S = 60.0
_SIGNATURE_BYTES = 64
_DOMAIN = b"dtrain-dht-record-1"

MAX_STATUS_FIELDS = 32
MAX_STATUS_TEXT = 200
PASS_FIELD, MAX_PASS_TEXT = "pass", 400  # in the DHT's copy of a heartbeat only


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]  # hivemind ships no types
    """Signs what this peer stores; refuses every record that its subkey's owner did not sign."""

    def __init__(self, identity: Identity):
        self._identity = identity
        self.refusals: Counter[str] = Counter()  # by reason

    def sign_value(self, record: DHTRecord) -> bytes:
        value: bytes = record.value
        if self._owner(record) != self._identity.peer_id_bytes:
            return value  # not ours to sign: it will be refused wherever it arrives
        return value + self._identity.key.sign(_message(record, value))

    def strip_value(self, record: DHTRecord) -> bytes:
        value: bytes = record.value
        return value[:-_SIGNATURE_BYTES]

    def validate(self, record: DHTRecord) -> bool:
        reason = self._reason_to_refuse(record)
        if reason:
            self.refusals[reason] += 1
        return not reason

    def _reason_to_refuse(self, record: DHTRecord) -> str:
        if not _SIGNATURE_BYTES < len(record.value) <= MAX_RECORD_BYTES:
            return "record-size"
        if not record.expiration_time <= get_dht_time() + MAX_LIFETIME_S + CLOCK_SLACK_S:  # NaN too
            return "record-expiry"
        owner = self._owner(record)
        value, signature = record.value[:-_SIGNATURE_BYTES], record.value[-_SIGNATURE_BYTES:]
        if owner is None or not isinstance(_unpack(value), (bytes, bool)):
            return "record-schema"
        return "" if verify(owner, _message(record, value), signature) else "record-signature"

    @staticmethod
    def _owner(record: DHTRecord) -> bytes | None:
        # hivemind drops a whole dictionary for one bad record in it, and packs the subkeys anew before it checks:
        # a subkey packed in another way than hivemind's would pass here and spoil everybody's records there.
        owner = _unpack(record.subkey)
        return owner if isinstance(owner, bytes) and msgpack.packb(owner) == record.subkey else None


def _unpack(blob: bytes) -> object:
    """What the msgpack holds; None also when it is none."""
    try:
        return msgpack.unpackb(blob)
    except Exception:  # msgpack raises half a dozen types on hostile bytes
        return None


def _message(record: DHTRecord, value: bytes) -> bytes:
    packed = msgpack.packb([_DOMAIN, record.key, record.subkey, value, float(record.expiration_time)])
    assert isinstance(packed, bytes)
    return packed


def pack_status(status: Mapping[str, object]) -> bytes:
    """Encode a heartbeat's fields. Raises ValueError when a field is not a short text or a plain number."""
    problem = _status_problem(status)
    if problem:
        raise ValueError(problem)
    packed = msgpack.packb(dict(status))
    assert isinstance(packed, bytes)
    return packed


def unpack_status(blob: object) -> dict[str, Any] | None:
    """Decode a heartbeat from the network; None unless it fits the schema."""
    if not isinstance(blob, bytes) or len(blob) > MAX_RECORD_BYTES:
        return None
    status = _unpack(blob)
    if not isinstance(status, dict) or _status_problem(status):
        return None
    round, work = status.get("round"), status.get("work", 0)
    if isinstance(round, bool) or not isinstance(round, int) or not 0 <= round < 2**40:
        return None
    if isinstance(work, bool) or not isinstance(work, (int, float)) or not 0 <= work < math.inf:
        return None
    if not isinstance(status.get("digest"), str) or not isinstance(status.get("state"), str):
        return None
    return status


def take_pass(status: dict[str, Any]) -> bytes:
    """Take the pass out of a heartbeat's fields; b"" if there is none that can be read."""
    try:
        return base64.b64decode(str(status.pop(PASS_FIELD, "")), validate=True)
    except ValueError:
        return b""


def _status_problem(status: Mapping[str, object]) -> str:
    if len(status) > MAX_STATUS_FIELDS:
        return f"a status has {len(status)} fields; {MAX_STATUS_FIELDS} is the most"
    for key, value in status.items():
        if not isinstance(key, str) or len(key) > MAX_STATUS_TEXT:
            return "a status key is not a short text"
        if not isinstance(value, (str, int, float, bool)):
            return f"status field {key!r} is {type(value).__name__}, not a text or a number"
        longest = MAX_PASS_TEXT if key == PASS_FIELD else MAX_STATUS_TEXT
        if isinstance(value, str) and len(value) > longest:
            return f"status field {key!r} is longer than {longest} characters"
    return ""
