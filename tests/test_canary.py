"""Secrets that are planted where this program or its libraries read them are found nowhere afterwards."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import re
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P
from sim_tools import write_file
from swarm_tools import eventually
from test_admission import FAST, Machine, machines

from dtrain.dht.exchange import run_prefix
from dtrain.dht.identity import load_or_create
from dtrain.dht.invite import decode
from dtrain.dht.records import SignedRecords
from dtrain.dht.transport import start_daemon
from dtrain.trainer.bulletin import SAMPLE_TOPIC, TOPIC

pytestmark = pytest.mark.xdist_group("processes")

PLANTED = {
    "WANDB_API_KEY": "c0ffee00d15ea5ed0badf00dcafe5eed0ddba115",
    "HF_TOKEN": "hf_CanarySongOfTheHub",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanarySongOfOldHubs",
    "AWS_SECRET_ACCESS_KEY": "CanaryBucketSecret0123456789abcdefghijkl",
}
IN_NETRC = "feedface00d15ea5ed0badf00dcafe5eed0dca11"
IN_HF_FILE = "hf_CanaryOfTheTokenFile"
JOIN = ("--host", "127.0.0.1", "--threads", "1", "--no-lan", "--eval-every", "2", "--checkpoint-every", "1")
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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with everything in it that must not get out, and the same in the environment."""
    folder = tmp_path / "home"
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
        (tmp_path / "stand-in").mkdir()
        (tmp_path / "stand-in" / "wandb.py").write_text(STAND_IN)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    return folder


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temp folder, for the test's own peer too; short, because the path of a socket must be."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{path}/")
        monkeypatch.setenv("TMPDIR", path)
        yield Path(path)


def spellings(secret: bytes) -> set[bytes]:
    """The secret as it may be found: as it is, in hex, and in base64 wherever it begins there."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for num_before, first in ((0, 0), (1, 2), (2, 3)):  # characters that hold bits of what is before
        sure = base64.b64encode(bytes(num_before) + secret)[first:-4]
        found |= {sure, sure.replace(b"+", b"-").replace(b"/", b"_")}
    return found


async def everything_in_the_dht(folder: Path, addresses: tuple[str, ...], prefix: str, token: bytes) -> bytes:
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
        keys = [*(f"{prefix}.{topic}" for topic in topics), "dtrain-canary.manifest"]
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


def train_and_watch(host: Machine, guest: Machine, watcher: Machine, sockets: Path) -> dict[str, bytes]:
    """A run by token with two workers, a dashboard, and a simulation; the secrets that came to be meanwhile."""
    secrets: dict[str, bytes] = {}
    host.type("worker", "--run-id", "canary", *JOIN, *FAST, *WANDB, "--admission", "token")
    eventually(lambda: host.events("round"), "the organizer's worker did not begin")
    code, line, _ = host.run("invite", "--run-id", "canary")
    assert code == 0
    invite = decode(line)
    assert invite.token is not None
    secrets["token"], public = invite.token.seed, invite.token.grant.key
    guest.type("join", line, "--yes", *JOIN, *WANDB, "--journal")
    watcher.type("dashboard", "--run-id", "canary", "--no-browser", "--port", "0", *WANDB)
    token = eventually(lambda: re.search(r"#token=(\S+)", watcher.said("out")), "no dashboard")[1]
    secrets["dashboard"] = token.encode()
    eventually(lambda: guest.events("first_contribution"), f"no guest: {guest.said('err')}")
    for number, value in enumerate(control_tokens(host.base / "runtime").values()):
        secrets[f"control-{number}"] = value
    assert "control-1" in secrets
    prefix = run_prefix("canary", invite.manifest_hash)
    stored = asyncio.run(everything_in_the_dht(sockets, invite.addresses, prefix, public))
    (sockets / "dht").write_bytes(stored)
    for machine in (guest, host, watcher):
        process = machine.started[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130), machine.said("err")
    path = write_file(watcher.folder)
    assert watcher.run("simulate", str(path), "--jobs", "1", *WANDB)[0] == 0
    for path in host.base.glob("*/dtrain-runs/canary/*/identity.key"):
        secrets[f"identity of {path.parent}"] = load_or_create(path).key.private_bytes_raw()
    organizer = load_pem_private_key((host.folder / "dtrain-runs/canary/organizer.key").read_bytes(), None)
    assert isinstance(organizer, Ed25519PrivateKey)
    return {**secrets, "organizer": organizer.private_bytes_raw()}


@pytest.mark.timeout(400)
def test_no_secret_gets_out(home: Path, sockets: Path, tmp_path: Path) -> None:
    """Keys of wandb, of the hub and of a bucket, a token of admission, control tokens and private keys: none is in any
    file that two workers, the dashboard and the simulator wrote (metrics, journals, checkpoints, wandb's files), in
    their output, or in the DHT; but in the private files that are made for them, and in the lines that hand them over.
    """
    with machines(tmp_path, "host", "guest", "watcher") as (host, guest, watcher):
        secrets = train_and_watch(host, guest, watcher, sockets)
    secrets |= {name: value.encode() for name, value in PLANTED.items()}
    secrets |= {"netrc": IN_NETRC.encode(), "hf file": IN_HF_FILE.encode()}
    seen: set[str] = set()
    handed_over = {"token": {host.file("out", 1)}, "dashboard": {watcher.file("out", 0)}}
    planted = {home / ".netrc", home / "hf" / "token"}
    written = [path for folder in (tmp_path, sockets) for path in folder.rglob("*") if path.is_file()]
    written = [path for path in written if path not in planted]
    kinds = {path.suffix for path in written}
    assert {".jsonl", ".safetensors", ".json", ".out", ".err", ".key"} <= kinds
    assert any("wandb" in path.parts for path in written) and (sockets / "dht") in written
    for path in written:
        data = path.read_bytes()
        for name, secret in secrets.items():
            if not any(spelling in data for spelling in spellings(secret)):
                continue
            is_its_own = path.suffix == ".key" and stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path in handed_over.get(name, ()) or is_its_own, f"{name} is in {path}"
            seen.add(name)
    private = {name for name in secrets if name == "organizer" or name.startswith("identity of ")}
    assert seen == {*handed_over, *private}  # what must be somewhere is found, so the search finds things
