"""A folder for everything that a command's processes write, which is gone when the command is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Named so that any later worker sweeps it if we are killed."""
    base = Path(tempfile.mkdtemp(prefix=f"dtrain-{os.getpid()}-{purpose}-"))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)
