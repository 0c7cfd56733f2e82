"""Where documents are: the files of a source, and how they are cut into pieces that workers read on their own.

A piece is a share of one file: bytes of a text or JSONL file, rows of a Parquet or Arrow file, or all of a compressed
one. It is known from the file's size alone, so thousands of files on a server cost a listing, not a download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dtrain.trainer.config_data import PartConfig
from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import one_line
from dtrain.trainer.tokenizer import NEEDS_HF

TEXT, JSONL, PARQUET, ARROW = "text", "jsonl", "parquet", "arrow"
FORMATS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": JSONL,
    ".json": JSONL,
    ".ndjson": JSONL,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LOADERS = {"text": TEXT, "json": JSONL, "parquet": PARQUET, "arrow": ARROW}
"""Formats by the name of the `datasets` loader that a hub data set needs."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    url: str
    """A path, or a URL that fsspec opens."""
    format: str
    """TEXT, JSONL, PARQUET or ARROW."""
    num_bytes: int

    @property
    def is_compressed(self) -> bool:
        """Whether it can be read from its beginning only."""
        return PurePosixPath(self.url).suffix in COMPRESSED


@dataclass(frozen=True)
class Piece:
    """The `index`-th of `count` equal shares of a file."""

    file: SourceFile
    index: int
    count: int


def cut(files: Sequence[SourceFile], piece_bytes: int) -> list[Piece]:
    """All pieces of about this size, in the files' order."""
    pieces = []
    for file in files:
        count = 1 if file.is_compressed else max(1, round(file.num_bytes / piece_bytes))
        pieces += [Piece(file, index, count) for index in range(count)]
    return pieces


def find(part: PartConfig, path: Path | None = None) -> list[SourceFile]:
    """The files of a source; `path` is this machine's copy, or a folder with that in it.

    UsageError if there is nothing, or something else.
    """
    if part.source == "hub":
        return _on_hub(part)
    if "://" in part.name:
        return _at_url(part.name)
    if path is None:
        raise UsageError(f"this run trains on {part.name}: type --data PATH with your copy of it")
    if path.name != part.name and (path / part.name).exists():
        path = path / part.name
    files = local_files(path)
    if local_sha256(path, files) != part.sha256:
        raise UsageError(
            f"{path} (--data) is not this run's {part.name}, whose SHA-256 begins {part.sha256[:16]}: "
            "get the same files as the others, or begin a new run with another --run-id"
        )
    return files


def format_of(name: str) -> str | None:
    """The format that a file's name tells, past a compression's suffix."""
    path = PurePosixPath(name.partition("?")[0])
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix)


def local_files(path: Path) -> list[SourceFile]:
    """One file, or all files of a known format below a folder, by name. UsageError if there are none."""
    try:
        if not path.exists():
            raise UsageError(f"cannot read the data (--data) {path}: No such file or directory")
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files = []
        for entry in found:
            kind = format_of(entry.name) or (TEXT if entry == path else None)
            if kind is not None and entry.stat().st_size:
                files.append(SourceFile(str(entry), kind, entry.stat().st_size))
    except OSError as error:
        raise UsageError(f"cannot read the data (--data) {path}: {error.strerror}") from None
    if not files:
        raise UsageError(f"the data (--data) {path} is empty: it has no text in {', '.join(FORMATS)} files")
    return files


def local_sha256(path: Path, files: Sequence[SourceFile]) -> str:
    """Hex SHA-256 of a file, or of the names and contents of a folder's."""
    from dtrain.trainer.data import file_sha256

    if path.is_file():
        return file_sha256(path)
    whole = hashlib.sha256()
    for file in files:
        name = Path(file.url).relative_to(path).as_posix()
        whole.update(f"{file_sha256(Path(file.url))}  {name}\n".encode())
    return whole.hexdigest()


def _at_url(url: str) -> list[SourceFile]:
    """A file at a URL, or those that a pattern with * finds where the server can list."""
    kind = format_of(url)
    if kind is None:
        raise UsageError(f"the data {url} is in no known format: its name must end in {', '.join(FORMATS)}")
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
        found = sorted(system.glob(root)) if "*" in root else [root]
        files = [
            SourceFile(system.unstrip_protocol(name), kind, int(system.info(name)["size"] or 0))
            for name in found
        ]
    except ImportError as error:
        raise UsageError(f"the data {url} needs more libraries ({error}): {NEEDS_HF}") from None
    except Exception as error:  # every protocol has its own
        raise UsageError(f"cannot get at the data {url}: {one_line(error)}") from None
    files = [file for file in files if file.num_bytes]
    if not files:
        raise UsageError(f"the data {url} is empty")
    return files


def _on_hub(part: PartConfig) -> list[SourceFile]:
    """The files that `datasets` finds for a name, configuration, split and revision."""
    try:
        import fsspec
        from datasets import load_dataset_builder
    except ImportError:
        raise UsageError(f"the data set {part.name} needs the datasets library: {NEEDS_HF}") from None
    try:
        builder = load_dataset_builder(part.name, part.subset or None, revision=part.revision or None)
        splits = builder.config.data_files or {}
        loader = type(builder).__module__.rpartition(".")[2]
    except Exception as error:  # no such name, no network, a script, another subset: it has many
        raise UsageError(f"cannot get at the data set {part.name}: {one_line(error)}") from None
    if loader not in LOADERS:
        raise UsageError(
            f"the data set {part.name} is in a format ({loader}) of no use here: {', '.join(LOADERS)}"
        )
    if part.split not in splits:
        raise UsageError(f"the data set {part.name} has no split {part.split}: it has {', '.join(splits)}")
    files = []
    for url in splits[part.split]:
        system, name = fsspec.core.url_to_fs(url)
        files.append(SourceFile(url, LOADERS[loader], int(system.info(name)["size"] or 0)))
    return [file for file in files if file.num_bytes]
