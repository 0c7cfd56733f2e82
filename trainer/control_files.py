"""Where a running worker's control service is: one small file per worker, readable by its owner only."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Endpoint:
    """A worker's control service. Who knows the token may control the worker."""

    run_id: str
    name: str
    pid: int
    started: float  # of the process, Unix seconds: a process id is used again one day
    address: str  # "127.0.0.1:PORT"
    token: str


def publish(endpoint: Endpoint, folder: Path) -> Path:
    """Write the file (mode 0600); returns its path, to be removed at the end."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{endpoint.run_id}.{endpoint.pid}.json"
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(endpoint), file)
    os.replace(draft, path)
    return path


def find(folder: Path) -> list[Endpoint]:
    """The control services of the workers that run on this machine; files of dead ones are removed."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            endpoint = Endpoint(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if _runs(endpoint):
            found.append(endpoint)
        else:
            path.unlink(missing_ok=True)
    return found


def _runs(endpoint: Endpoint) -> bool:
    try:
        return bool(abs(psutil.Process(endpoint.pid).create_time() - endpoint.started) < 2.0)
    except psutil.Error:
        return False
