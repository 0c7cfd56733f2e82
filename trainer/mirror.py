"""Copies of a worker's checkpoints at a URL that fsspec knows (s3://, gs://, hf://, a mounted folder): written beside
the training, read back and compared, the newest few kept.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import one_line, without_login
from dtrain.trainer.tokenizer import NEEDS_HF

PIECE_BYTES = 1 << 20
NAME = re.compile(r"round-\d{8,}\.safetensors")


class Mirror:
    """One worker's checkpoints at a URL."""

    def __init__(self, url: str, keep: int, say: Callable[[str], None]) -> None:
        """UsageError if the URL cannot be written to."""
        self.url, self._keep, self._say = without_login(url.rstrip("/")), keep, say
        try:
            import fsspec
        except ImportError as error:
            raise UsageError(f"--checkpoint-to needs fsspec ({error}): {NEEDS_HF}") from None
        try:
            self._system, self._folder = fsspec.core.url_to_fs(url.rstrip("/"))
            self._system.makedirs(self._folder, exist_ok=True)
            self._names()
        except Exception as error:  # every protocol has its own
            raise UsageError(
                f"cannot write checkpoints to {self.url} (--checkpoint-to): {one_line(error)}"
            ) from None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._lock = threading.Lock()
        self._waiting: Path | None = None

    def put(self, path: Path) -> None:
        """Copy this checkpoint there when what is under way is done; of several that wait only the last goes."""
        with self._lock:
            self._waiting = path
        self._pool.submit(self._put_waiting)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True)

    def fetch_newest(self, folder: Path) -> Path | None:
        """Bring the newest checkpoint there into a folder; None if there is none."""
        names = self._names()
        if not names:
            return None
        target = folder / names[-1]
        draft = target.with_suffix(".tmp")
        try:
            self._system.get_file(f"{self._folder}/{names[-1]}", str(draft))
            draft.replace(target)
        except Exception as error:  # every protocol has its own
            raise UsageError(f"cannot read the checkpoint at {self.url}: {one_line(error)}") from None
        return target

    def _put_waiting(self) -> None:
        with self._lock:
            path, self._waiting = self._waiting, None
        if path is None:
            return
        try:
            self._put(path)
        except Exception as error:  # every protocol has its own; the copy on this disk is whole
            self._say(
                f"The checkpoint {path.name} is not at {self.url}: {one_line(error)}. The next one may be."
            )

    def _put(self, path: Path) -> None:
        wanted, draft = _sha256(path.open("rb")), f"{self._folder}/{path.name}.tmp"
        self._system.put_file(str(path), draft)
        if _sha256(self._system.open(draft, "rb")) != wanted:
            self._system.rm_file(draft)
            raise OSError("what was written there reads back as something else")
        self._system.mv(draft, f"{self._folder}/{path.name}")
        for name in self._names()[: -self._keep]:
            self._system.rm_file(f"{self._folder}/{name}")

    def _names(self) -> list[str]:
        """Names of the checkpoints there, oldest first."""
        self._system.invalidate_cache()
        found = (str(entry).rpartition("/")[2] for entry in self._system.ls(self._folder, detail=False))
        return sorted(name for name in found if NAME.fullmatch(name))


def _sha256(stream: Any) -> str:
    sha = hashlib.sha256()
    with stream:
        while piece := stream.read(PIECE_BYTES):
            sha.update(piece)
    return sha.hexdigest()
