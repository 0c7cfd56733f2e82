"""Reads the documents of one piece of a file. Bad data costs a line to the user and the document, never the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from dtrain.trainer.errors import UsageError
from dtrain.trainer.sources import ARROW, JSONL, PARQUET, TEXT, Piece, SourceFile
from dtrain.trainer.text import one_line, without_login
from dtrain.trainer.tokenizer import NEEDS_HF

HTTP_TIMEOUT_S = 60.0
READ_AHEAD_BYTES = 1 << 16

Notice = Callable[[str], None]
"""Told in one line what is wrong with the data; the same line is said once."""


def documents(piece: Piece, column: str, notice: Notice) -> Iterator[str]:
    """The texts of a piece, in order; empty ones are left out.

    FileNotFoundError if the file is gone; other errors of the file's protocol if it cannot be reached.
    """
    for text in READERS[piece.file.format](piece, column, notice):
        if text:
            yield text


def check_column(file: SourceFile, column: str) -> None:
    """UsageError if the file lacks the column, or is not what its name says."""
    try:
        names = _columns(file)
    except UsageError:
        raise
    except (OSError, ValueError, LookupError) as error:  # pyarrow's and json's are ValueErrors
        raise UsageError(
            f"the data {without_login(file.url)} cannot be read as {file.format}: {one_line(error)}"
        ) from None
    if names is not None and column not in names:
        raise UsageError(
            f"the data {without_login(file.url)} has no column {column!r}: set data.column to one of {', '.join(names)}"
        )


def _columns(file: SourceFile) -> list[str] | None:
    if file.format == TEXT:
        return None
    if file.format == JSONL:
        with opened(file) as stream:
            first = next((line for line in stream if line.strip()), b"")
        row = json.loads(first.decode("utf-8", "replace"))
        if not isinstance(row, dict):
            raise ValueError("its first line is no JSON object: one object a line is needed")
        return list(row)
    pa = _pyarrow()
    with opened(file) as stream:
        if file.format == PARQUET:
            return list(pa.parquet.ParquetFile(stream).schema_arrow.names)
        return list(_arrow_reader(pa, stream)[0].schema.names)


@contextmanager
def opened(file: SourceFile, block_bytes: int = 1 << 20) -> Iterator[Any]:
    """The file's bytes as a stream, which can seek unless the file is compressed."""
    try:
        import fsspec
    except ImportError as error:
        raise UsageError(f"the data {without_login(file.url)} needs fsspec ({error}): {NEEDS_HF}") from None
    options: dict[str, Any] = {}
    if file.url.startswith(("http://", "https://")):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)}
    system, name = fsspec.core.url_to_fs(file.url, **options)
    compression = "infer" if file.is_compressed else None
    with system.open(name, "rb", block_size=block_bytes, compression=compression) as stream:
        yield stream


# ---------------------------------------------------------------------- by format


def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines that begin in the piece, with their ends."""
    size = piece.file.num_bytes
    begin, end = size * piece.index // piece.count, size * (piece.index + 1) // piece.count
    whole = piece.count == 1
    with opened(piece.file, 1 << 20 if whole else end - begin + READ_AHEAD_BYTES) as stream:
        position = 0
        if begin:
            stream.seek(begin - 1)
            position = begin - 1 + len(stream.readline())  # what is left of a line that began before
        while whole or position < end:
            line: bytes = stream.readline()
            if not line:
                return
            position += len(line)
            yield line


def _text(piece: Piece, column: str, notice: Notice) -> Iterator[str]:
    """A piece of plain text is one document."""
    yield "".join(_decoded(line, piece, notice) for line in _lines(piece))


def _jsonl(piece: Piece, column: str, notice: Notice) -> Iterator[str]:
    for line in _lines(piece):
        if not line.strip():
            continue
        try:
            row = json.loads(_decoded(line, piece, notice))
        except ValueError as error:
            notice(f"{_name(piece)} has lines that are no JSON ({one_line(error)}): they are left out")
            continue
        yield _only_text(row.get(column) if isinstance(row, dict) else None, column, piece, notice)


def _parquet(piece: Piece, column: str, notice: Notice) -> Iterator[str]:
    pa = _pyarrow()
    with opened(piece.file) as stream, _spoiled(pa, piece, notice):
        file = pa.parquet.ParquetFile(stream)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        yield from _rows(groups, lambda i: file.read_row_group(i, columns=[column]), piece, column, notice)


def _arrow(piece: Piece, column: str, notice: Notice) -> Iterator[str]:
    pa = _pyarrow()
    with opened(piece.file) as stream, _spoiled(pa, piece, notice):
        reader, batches = _arrow_reader(pa, stream)
        if batches is None:  # the streaming format: it can be read from its beginning only
            whole = reader.read_all()
            yield from _rows([whole.num_rows], lambda _: whole, piece, column, notice)
            return
        sizes = [reader.get_batch(i).num_rows for i in range(batches)]
        yield from _rows(sizes, reader.get_batch, piece, column, notice)


READERS: dict[str, Callable[[Piece, str, Notice], Iterator[str]]] = {
    TEXT: _text,
    JSONL: _jsonl,
    PARQUET: _parquet,
    ARROW: _arrow,
}


def _rows(
    sizes: list[int], read: Callable[[int], Any], piece: Piece, column: str, notice: Notice
) -> Iterator[str]:
    """The piece's share of all rows, of tables with so many rows each."""
    pa = _pyarrow()
    total = sum(sizes)
    begin, end = total * piece.index // piece.count, total * (piece.index + 1) // piece.count
    first = 0
    for index, size in enumerate(sizes):
        low, high = max(begin, first), min(end, first + size)
        if low < high:
            values = read(index)[column].slice(low - first, high - low)
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                values = values.cast(pa.large_binary())  # its bytes may be no UTF-8
            for value in values.to_pylist():
                text = _decoded(value, piece, notice) if isinstance(value, bytes) else value
                yield _only_text(text, column, piece, notice)
        first += size


@contextmanager
def _spoiled(pa: Any, piece: Piece, notice: Notice) -> Iterator[None]:
    """A file that Arrow cannot make sense of is left out."""
    try:
        yield
    except (pa.ArrowInvalid, KeyError) as error:
        notice(f"{_name(piece)} cannot be read ({one_line(error)}): it is left out")


def _arrow_reader(pa: Any, stream: Any) -> tuple[Any, int | None]:
    """(reader, number of batches); None for the streaming format, as data sets on disk have it."""
    try:
        reader = pa.ipc.open_file(stream)
        return reader, int(reader.num_record_batches)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_stream(stream), None


def _decoded(raw: bytes, piece: Piece, notice: Notice) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        notice(f"{_name(piece)} has bytes that are no UTF-8: each becomes U+FFFD")
        return raw.decode("utf-8", "replace")


def _only_text(value: object, column: str, piece: Piece, notice: Notice) -> str:
    if isinstance(value, str):
        return value
    if value is not None:
        notice(f"{_name(piece)} has {column!r} that is no text but {type(value).__name__}: it is left out")
    return ""


def _name(piece: Piece) -> str:
    return PurePosixPath(piece.file.url).name


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"Parquet and Arrow files need pyarrow ({error}): {NEEDS_HF}") from None
    return pyarrow
