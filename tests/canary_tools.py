"""Secrets planted where this program or its libraries read them, and the search for them; see test_admission.py."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P

from dtrain.dht.identity import load_or_create
from dtrain.dht.invite import Invite
from dtrain.dht.records import SignedRecords
from dtrain.dht.terms import run_prefix
from dtrain.dht.transport import start_daemon
from dtrain.trainer.bulletin import SAMPLE_TOPIC, TOPIC

PLANTED = {
    "WANDB_API_KEY": "c0ffee00d15ea5ed0badf00dcafe5eed0ddba115",
    "HF_TOKEN": "hf_CanarySongOfTheHub",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanarySongOfOldHubs",
    "AWS_SECRET_ACCESS_KEY": "CanaryBucketSecret0123456789abcdefghijkl",
}
IN_NETRC = "feedface00d15ea5ed0badf00dcafe5eed0dca11"
IN_HF_FILE = "hf_CanaryOfTheTokenFile"
WANDB = ("--wandb", "offline")

# In place of wandb where it is not installed: keeps what it is given, in the folder that wandb would write to.
STAND_IN = """
import json, os, types
os.makedirs("wandb", exist_ok=True)
path = f"wandb/given-{os.getpid()}.jsonl"
def keep(*words, **given):
    with open(path, "a") as file:
        file.write(json.dumps([words, given], default=repr) + "\\n")
    return types.SimpleNamespace(log=keep, finish=keep)
init = keep
def Settings(**given):
    keep(**given)
    return given
"""


@contextmanager
def canary(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Canary]:
    """Plants secrets in a user's home and in the environment. The temp folder is short: paths of sockets must be."""
    with tempfile.TemporaryDirectory() as scratch:
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{scratch}/")
        monkeypatch.setenv("TMPDIR", scratch)
        yield Canary(base, plant(base / "home", monkeypatch), Path(scratch))


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with everything in it that must not get out."""
    (folder / "hf").mkdir(parents=True)
    for name, text in (
        (".netrc", f"machine api.wandb.ai\n  login user\n  password {IN_NETRC}\n"),
        ("hf/token", IN_HF_FILE),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    for name, value in {**PLANTED, "HOME": str(folder), "HF_HOME": str(folder / "hf")}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DIR", "NETRC", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    if importlib.util.find_spec("wandb") is None:
        (folder / "stand-in").mkdir()
        (folder / "stand-in" / "wandb.py").write_text(STAND_IN)
        monkeypatch.setenv("PYTHONPATH", str(folder / "stand-in"))
    return folder


def spellings(secret: bytes) -> set[bytes]:
    """The secret as it may be found: as it is, in hex, and in base64 wherever it begins there."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for num_before, first in ((0, 0), (1, 2), (2, 3)):  # characters that hold bits of what is before
        sure = base64.b64encode(bytes(num_before) + secret)[first:-4]
        found |= {sure, sure.replace(b"+", b"-").replace(b"/", b"_")}
    return found


async def everything_in_the_dht(
    folder: Path, addresses: tuple[str, ...], prefix: str, run_id: str, token: bytes
) -> bytes:
    """What the run's members have stored, as any stranger can read it."""
    stranger = load_or_create(folder / "stranger.key")
    daemon = await start_daemon(stranger, host="127.0.0.1", port=0, initial_peers=addresses)
    try:
        node = await DHTNode.create(
            p2p=daemon,
            initial_peers=list(addresses),
            record_validator=SignedRecords(stranger),
            client_mode=True,
        )
        topics = ["workers", "revoked", f"token.{token[:8].hex()}", f"note.{TOPIC}", f"note.{SAMPLE_TOPIC}"]
        keys = [*(f"{prefix}.{topic}" for topic in topics), f"dtrain-{run_id}.manifest"]
        found = await node.get_many(keys, sufficient_expiration_time=float("inf"))
        read = {key: found[key].value for key in keys if found[key] is not None}
        assert {f"{prefix}.workers", f"{prefix}.note.{TOPIC}", keys[-1]} <= read.keys()
        await node.shutdown()
    finally:
        await daemon.shutdown()
    values = [record.value for records in read.values() for record in records.values()]
    return b"\n".join(value if isinstance(value, bytes) else repr(value).encode() for value in values)


def control_tokens(runtime: Path) -> dict[Path, bytes]:
    """The token of each worker that runs, in its private file."""
    found = {}
    for path in (runtime / "control").glob("*.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        found[path] = json.loads(path.read_text())["token"].encode()
    return found


class Canary:
    """Secrets that must not get out: those planted, and those that a run makes, as they come to be."""

    def __init__(self, base: Path, home: Path, scratch: Path):
        self.base, self.scratch = base, scratch
        self._planted = {home / ".netrc", home / "hf" / "token"}
        self.secrets = {name: value.encode() for name, value in PLANTED.items()}
        self.secrets |= {"netrc": IN_NETRC.encode(), "hf file": IN_HF_FILE.encode()}
        self._handed_over: dict[str, Path] = {}

    def hand_over(self, name: str, secret: bytes, path: Path) -> None:
        """A secret whose purpose it is to be in that output, and nowhere else."""
        self.secrets[name], self._handed_over[name] = secret, path

    def read_the_run(self, run_id: str, invite: Invite) -> None:
        """Keep what any stranger can read of a run under way, and learn its workers' control tokens."""
        assert invite.token is not None
        prefix, key = run_prefix(run_id, invite.manifest_hash), invite.token.grant.key
        stored = asyncio.run(everything_in_the_dht(self.scratch, invite.addresses, prefix, run_id, key))
        (self.scratch / "dht").write_bytes(stored)
        tokens = control_tokens(self.base / "runtime")
        assert len(tokens) >= 2
        self.secrets |= {f"control token of {path.name}": token for path, token in tokens.items()}

    def search(self, run_folder: Path) -> None:
        """Look into every file below the base and the temp folder. The organizer's folder of the run has its key."""
        for path in self.base.glob(f"*/dtrain-runs/{run_folder.name}/*/identity.key"):
            self.secrets[f"identity of {path.parent}"] = load_or_create(path).key.private_bytes_raw()
        organizer = load_pem_private_key((run_folder / "organizer.key").read_bytes(), None)
        assert isinstance(organizer, Ed25519PrivateKey)
        self.secrets["organizer"] = organizer.private_bytes_raw()
        written = [p for folder in (self.base, self.scratch) for p in folder.rglob("*") if p.is_file()]
        written = [path for path in written if path not in self._planted]
        assert {".jsonl", ".safetensors", ".json", ".out", ".err", ".key"} <= {p.suffix for p in written}
        assert any("wandb" in path.parts for path in written) and self.scratch / "dht" in written
        seen = {name for path in written for name in self._found_in(path)}
        private = {n for n in self.secrets if n == "organizer" or n.startswith("identity of ")}
        # What must be somewhere is found, so the search finds things.
        assert seen == {*self._handed_over, *private}

    def _found_in(self, path: Path) -> Iterator[str]:
        data = path.read_bytes()
        for name, secret in self.secrets.items():
            if any(spelling in data for spelling in spellings(secret)):
                is_its_own = path.suffix == ".key" and stat.S_IMODE(path.stat().st_mode) == 0o600
                assert self._handed_over.get(name) == path or is_its_own, f"{name} is in {path}"
                yield name
