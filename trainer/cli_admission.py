"""The organizer's tokens and the volunteer's pass: what a run that does not admit everybody asks for."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.dht.invite import Invite
    from dtrain.dht.tokens import Revocations, Token
    from dtrain.trainer.manifest import Manifest
    from dtrain.trainer.signing import OrganizerKey, SignedManifest

PASS_FILE, LEDGER_FILE = "pass", "admission.bin"
ISSUED_FILE, REVOKED_FILE = "invites.json", "revoked.bin"
DAY_S = 86400
UNITS_S = {"m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}


def show_pass(manifest: Manifest, invite: Invite | None, peer_id: str, folder: Path) -> bytes:
    """This worker's pass, from its invite, from last time, or from the organizer's key beside its folder; b"" where
    none is needed. UsageError says how to get one."""
    if manifest.admission.mode == "open":
        return b""
    if manifest.admission.mode == "list":
        if peer_id not in manifest.admission.allowed:
            raise UsageError(f"this run admits listed machines only: ask its organizer to list {peer_id}")
        return b""
    from dtrain.dht.identity import bytes_of

    path = folder / PASS_FILE
    token, kept = invite.token if invite is not None else None, path.read_bytes() if path.exists() else b""
    if kept and (token is None or _comes_from(kept, token)):
        return kept  # who is in stays in, also when the invite has expired since
    if token is not None:
        _refuse_expired(token)
    else:
        token = _own_token(manifest, folder)
    shown = token.bind(manifest.hash, bytes_of(peer_id)).encode()
    write_private(path, shown)
    return shown


def _comes_from(shown: bytes, token: Token) -> bool:
    """Whether a pass was made with that token."""
    from dtrain.dht.tokens import TokenError, decode_pass

    try:
        return decode_pass(shown).grant == token.grant
    except TokenError:  # a damaged file: made anew
        return False


def _refuse_expired(token: Token) -> None:
    if token.grant.expires and time.time() > token.grant.expires:
        raise UsageError(f"the invite expired on {day(token.grant.expires)}: ask the organizer for a new one")


def _own_token(manifest: Manifest, folder: Path) -> Token:
    """The organizer's own machines need no invite."""
    from dtrain.dht.tokens import issue
    from dtrain.trainer.signing import OrganizerKey

    path = folder.parent / "organizer.key"
    if path.exists():
        key = OrganizerKey.load(path)
        if key.public_hex == manifest.organizer:
            return issue(key.sign_bytes, manifest.hash, expires=0, uses=1)
    raise UsageError("this run admits by invite: ask its organizer for one, and type dtrain join INVITE")


def admission_args(manifest: Manifest, shown: bytes, folder: Path) -> dict[str, Any]:
    """What `DhtExchange.open_run` asks about admission."""
    revoked = folder.parent / REVOKED_FILE
    return {
        "mode": manifest.admission.mode,
        "organizer": bytes.fromhex(manifest.organizer),
        "allowed": list(manifest.admission.allowed),
        "pass": shown,
        "ledger": str(folder / LEDGER_FILE),
        "revocations": revoked.read_bytes() if revoked.exists() else b"",
    }


# ---------------------------------------------------------------------- the organizer's side


def organizer_key(signed: SignedManifest, folder: Path) -> OrganizerKey:
    """The key in a run's folder. UsageError if it is not there, or of another run."""
    from dtrain.trainer.signing import OrganizerKey

    path = folder / "organizer.key"
    if not path.exists():
        raise UsageError(
            f"{path} is not here: only the organizer of {signed.manifest.run_id}, who has that key, can do this"
        )
    key = OrganizerKey.load(path)
    if key.public_hex != signed.manifest.organizer:
        raise UsageError(f"{path} is not the key that signed the run {signed.manifest.run_id}")
    return key


def issue_token(signed: SignedManifest, folder: Path, *, lasts_s: int, uses: int) -> Token:
    """A new token, noted in the run's folder so that it can be revoked by its id."""
    from dtrain.dht.tokens import MAX_USES, issue

    if not 1 <= uses <= MAX_USES:
        raise UsageError(f"--uses {uses} will not do: type 1 to {MAX_USES}, or make several invites")
    key, expires = organizer_key(signed, folder), int(time.time()) + lasts_s if lasts_s else 0
    token = issue(key.sign_bytes, signed.manifest.hash, expires=expires, uses=uses)
    entry = {"id": token.grant.id, "key": token.grant.key.hex(), "expires": expires, "uses": uses}
    issued = [*issued_tokens(folder), {**entry, "issued": int(time.time())}]
    write_private(folder / ISSUED_FILE, json.dumps(issued, indent=1).encode())
    return token


def issued_tokens(folder: Path) -> list[dict[str, Any]]:
    """What `issue_token` has noted: ids, public keys and terms, no secrets."""
    path = folder / ISSUED_FILE
    try:
        return list(json.loads(path.read_text())) if path.exists() else []
    except (OSError, ValueError):
        raise UsageError(
            f"{path} is damaged: move it away; its invites can be revoked by their text only"
        ) from None


def revoke(signed: SignedManifest, folder: Path, *, tokens: set[bytes], peers: set[bytes]) -> Revocations:
    """Add to the run's list of revocations, in its folder."""
    from dtrain.dht.tokens import Revocations, TokenError

    key, path, manifest = organizer_key(signed, folder), folder / REVOKED_FILE, signed.manifest
    try:
        before = (
            Revocations.decode(path.read_bytes(), manifest.hash, key.public)
            if path.exists()
            else Revocations()
        )
        # Later lists win, also over those of a lost folder.
        serial = max(before.serial + 1, int(time.time()))
        after = Revocations.make(
            key.sign_bytes, manifest.hash, serial, tokens | before.tokens, peers | before.peers
        )
    except TokenError:
        raise UsageError(f"{path} is damaged: move it away, and revoke anew what it held") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    write_private(path, after.blob)
    return after


def parse_lasting(text: str) -> int:
    """ "30d", "12h", "90m", "2w" in seconds; "never" = 0. UsageError."""
    if text.lower() == "never":
        return 0
    match = re.fullmatch(r"(\d{1,4})([mhdw])", text.lower())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--expires {text[:20]!r} will not do: type a time such as 30d, 12h, 90m, or never")
    return int(match[1]) * UNITS_S[match[2]]


def day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def write_private(path: Path, content: bytes) -> None:
    """Put a file in place that only its owner can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
