"""Where a worker keeps its receipts between two starts, and the statement of them that others can check offline."""

from __future__ import annotations

import binascii
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import base58

from dtrain.dht.credit import Purse, Receipt
from dtrain.dht.identity import Identity, verify

FILE = "credit.json"
FORMAT = "dtrain credit 1"
MAX_BYTES = 32 * 1024 * 1024
_DOMAIN = b"dtrain credit statement 1\n"
_TEXTS = ("format", "run_id", "run", "peer", "name", "team", "issued", "signature")
_COUNTS = ("rounds", "tokens", "bytes_up", "bytes_down")


class CreditError(ValueError):
    """A statement is refused; the text says why, in one line."""


@dataclass
class Tally:
    """What a worker counts for itself, all its life."""

    rounds: int = 0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Statement:
    """A statement that has been checked. What it says of traffic, name and team is its peer's own word."""

    run_id: str
    run: str
    """Hash of the run's manifest, hex."""
    peer: str
    name: str
    team: str
    issued: str
    rounds: int
    tokens: int
    bytes_up: int
    bytes_down: int
    signers: int
    """Peers that countersigned."""


# ---------------------------------------------------------------------- the worker's own file


def load(path: Path, run: bytes, peer: str) -> tuple[Tally, Purse]:
    """What `save` kept of that run and peer; nothing if there is none, or it is damaged."""
    try:
        tree = json.loads(path.read_text())
        if tree["run"] != run.hex() or tree["peer"] != peer:
            return Tally(), Purse()
        return Tally(**tree["own"]), _purse(tree)
    except (OSError, ValueError, TypeError, KeyError):
        return Tally(), Purse()


def save(path: Path, run: bytes, peer: str, tally: Tally, purse: Purse) -> None:
    """Write the file anew, whole or not at all."""
    tree = {"run": run.hex(), "peer": peer, "own": asdict(tally), "receipts": _listed(purse)}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(tree) + "\n")
    os.replace(draft, path)


# ---------------------------------------------------------------------- the statement


def statement(
    identity: Identity,
    run_id: str,
    run: bytes,
    tally: Tally,
    purse: Purse,
    *,
    name: str,
    team: str,
    issued: str,
) -> str:
    """A signed statement of what the receipts show, as JSON."""
    rounds, tokens, _ = purse.totals()
    tree: dict[str, Any] = {
        "format": FORMAT,
        "run_id": run_id,
        "run": run.hex(),
        "peer": identity.peer_id,
        "name": name,
        "team": team,
        "issued": issued,
        "rounds": rounds,
        "tokens": tokens,
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "receipts": _listed(purse),
    }
    tree["signature"] = b64encode(identity.key.sign(_signed_bytes(tree))).decode()
    return json.dumps(tree, indent=1) + "\n"


def check(blob: bytes) -> Statement:
    """Check a statement, with nothing but itself. Raises CreditError."""
    tree = _parse(blob)
    if not _is_signed(tree):
        raise CreditError("it was changed after its worker signed it, or that worker never signed it")
    try:
        purse = _purse(tree)
    except (ValueError, TypeError, KeyError):
        raise CreditError("its list of receipts is malformed") from None
    receipts = purse.receipts
    if len(receipts) != len(tree["receipts"]):
        raise CreditError("it lists receipts for the same rounds twice, or more than there can be")
    for receipt in receipts:
        if not receipt.is_genuine:
            raise CreditError(
                f"the receipt for rounds {_shown(receipt)} was not signed by {receipt.signer[-8:]}"
            )
    rounds, tokens, signers = purse.totals()
    for what, said, shown in (("rounds", tree["rounds"], rounds), ("tokens", tree["tokens"], tokens)):
        if said != shown:
            raise CreditError(f"it says {said:,} {what}, and its receipts show {shown:,}")
    fields = {key: tree[key] for key in (*_TEXTS[1:7], *_COUNTS)}
    return Statement(**fields, signers=signers)


def _parse(blob: bytes) -> Mapping[str, Any]:
    try:
        tree: Any = json.loads(blob) if len(blob) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or not _fits(tree):
        raise CreditError("it is no statement of dtrain credit")
    return tree


def _fits(tree: Mapping[str, Any]) -> bool:
    """Whether every field is there and of its kind."""
    return (
        set(tree) == {*_TEXTS, *_COUNTS, "receipts"}
        and all(isinstance(tree[key], str) and len(tree[key]) <= 200 for key in _TEXTS)
        and all(type(tree[key]) is int and 0 <= tree[key] < 2**63 for key in _COUNTS)
        and isinstance(tree["receipts"], list)
        and tree["format"] == FORMAT
    )


def _is_signed(tree: Mapping[str, Any]) -> bool:
    try:
        signature = b64decode(tree["signature"], validate=True)
        return verify(base58.b58decode(tree["peer"]), _signed_bytes(tree), signature)
    except ValueError:
        return False


def _signed_bytes(tree: Mapping[str, Any]) -> bytes:
    said = {key: value for key, value in tree.items() if key != "signature"}
    return _DOMAIN + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _listed(purse: Purse) -> list[list[Any]]:
    """[window, signer, rounds in hex, tokens, signature] of each receipt."""
    return [
        [r.window, r.signer, f"{r.rounds:x}", r.tokens, b64encode(r.signature).decode()]
        for r in purse.receipts
    ]


def _purse(tree: Mapping[str, Any]) -> Purse:
    run, found = bytes.fromhex(tree["run"]), []
    for window, signer, rounds, tokens, signature in tree["receipts"]:
        if type(window) is not int or type(tokens) is not int or not 0 <= window < 2**40:
            raise ValueError
        try:
            seal = b64decode(signature, validate=True)
        except binascii.Error:
            raise ValueError from None
        found.append(Receipt(run, tree["peer"], str(signer), window, int(rounds, 16), tokens, seal))
    return Purse(found)


def _shown(receipt: Receipt) -> str:
    from dtrain.dht.credit import WINDOW

    return f"{receipt.window * WINDOW + 1} to {(receipt.window + 1) * WINDOW}"
