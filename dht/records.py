"""What the DHT may hold: small records, each under its owner's peer id, signed by that owner, for an hour at most.

hivemind's own RSA validator accepts records that carry no owner tag and puts no ceiling on expiry; this one refuses
both, so nobody can write under another peer's name or block a key for years.
"""

from __future__ import annotations

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


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]  # hivemind ships no types
    """Signs what this peer stores; refuses every record that its subkey's owner did not sign."""

    def __init__(self, identity: Identity):
        self._identity = identity

    def sign_value(self, record: DHTRecord) -> bytes:
        value: bytes = record.value
        if self._owner(record) != self._identity.peer_id_bytes:
            return value  # not ours to sign: it will be refused wherever it arrives
        return value + self._identity.key.sign(_message(record, value))

    def strip_value(self, record: DHTRecord) -> bytes:
        value: bytes = record.value
        return value[:-_SIGNATURE_BYTES]

    def validate(self, record: DHTRecord) -> bool:
        if not _SIGNATURE_BYTES < len(record.value) <= MAX_RECORD_BYTES:
            return False
        if record.expiration_time > get_dht_time() + MAX_LIFETIME_S + CLOCK_SLACK_S:
            return False
        owner = self._owner(record)
        if owner is None:
            return False
        value, signature = record.value[:-_SIGNATURE_BYTES], record.value[-_SIGNATURE_BYTES:]
        return verify(owner, _message(record, value), signature)

    @staticmethod
    def _owner(record: DHTRecord) -> bytes | None:
        try:
            owner = msgpack.unpackb(record.subkey)
        except Exception:  # msgpack raises half a dozen types on hostile bytes
            return None
        return owner if isinstance(owner, bytes) else None


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
    try:
        status = msgpack.unpackb(blob)
    except Exception:  # msgpack raises half a dozen types on hostile bytes
        return None
    if not isinstance(status, dict) or _status_problem(status):
        return None
    if not isinstance(status.get("round"), int) or not 0 <= status["round"] < 2**40:
        return None
    if not isinstance(status.get("digest"), str) or not isinstance(status.get("state"), str):
        return None
    return status


def _status_problem(status: Mapping[str, object]) -> str:
    if len(status) > MAX_STATUS_FIELDS:
        return f"a status has {len(status)} fields; {MAX_STATUS_FIELDS} is the most"
    for key, value in status.items():
        if not isinstance(key, str) or len(key) > MAX_STATUS_TEXT:
            return "a status key is not a short text"
        if not isinstance(value, (str, int, float, bool)):
            return f"status field {key!r} is {type(value).__name__}, not a text or a number"
        if isinstance(value, str) and len(value) > MAX_STATUS_TEXT:
            return f"status field {key!r} is longer than {MAX_STATUS_TEXT} characters"
    return ""
