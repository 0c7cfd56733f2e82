"""How workers on one machine find each other's runs: a small file per worker in the user's runtime folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs


@dataclass(frozen=True)
class LocalWorker:
    """A worker of this machine: where its peer listens and which process keeps the file alive."""

    run_id: str
    pid: int
    peer_id: str
    manifest_hash: str
    addresses: list[str]


def folder() -> Path:
    """Where this machine's workers leave their files (mode 0700; the variable DTRAIN_RUNTIME_DIR moves it)."""
    given = os.environ.get("DTRAIN_RUNTIME_DIR")
    system = os.environ.get("XDG_RUNTIME_DIR")
    if given:
        path = Path(given)
    elif system:
        path = Path(system) / "dtrain"
    else:  # a home folder may be shared between machines
        path = platformdirs.user_state_path("dtrain") / socket.gethostname()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def publish(worker: LocalWorker) -> Path:
    """Write the file by which others find this worker; returns its path, to be removed at the end."""
    path = folder() / f"{worker.run_id}.{worker.pid}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(worker)))
    draft.replace(path)
    return path


def find(run_id: str) -> list[LocalWorker]:
    """The workers of that run which live on this machine; files of dead ones are removed."""
    found = []
    for path in sorted(folder().glob(f"{run_id}.*.json")):
        try:
            worker = LocalWorker(**json.loads(path.read_text()))
            os.kill(worker.pid, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError, TypeError, OverflowError):
            continue
        else:
            found.append(worker)
    return found


@contextmanager
def lock() -> Iterator[None]:
    """Held while a worker looks for a run and, finding none, begins it: two workers never begin it twice."""
    with (folder() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
