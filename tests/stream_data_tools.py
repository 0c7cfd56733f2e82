"""Small data in the formats of the real sets, and a server on loopback that can be made to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dtrain.trainer.data import open_data
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.sources import local_files, local_sha256
from dtrain.trainer.streamed import StreamedCorpus

QUICK = {"train.batch_size": 4, "train.seq_len": 32, "train.inner_steps": 2, "data.eval_tokens": 320}
TEXTS = [f"Document {i}: " + " ".join(f"w{(i * j) % 97}" for j in range(3 + i % 40)) for i in range(600)]


def write(path: Path, texts: Sequence[str] = TEXTS, column: str = "text") -> Path:
    """The texts in the format that the path's suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: t}) + "\n" for i, t in enumerate(texts)))
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"id": list(range(len(texts))), column: list(texts)})
        if path.suffix == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, path, row_group_size=50)
        else:
            kind = pa.ipc.new_stream if "stream" in path.stem else pa.ipc.new_file
            with kind(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
    return path


def manifest_for(path: Path, **overrides: object) -> Manifest:
    """A run on a local file or folder; double underscores stand for dots."""
    sha256 = local_sha256(path, local_files(path))
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    local = {"data.source": "files", "data.name": path.name, "data.sha256": sha256}
    return preset_manifest("streamed", "tiny", {**QUICK, **local, **dotted})


def opened(manifest: Manifest, path: Path | None, lines: list[str] | None = None) -> StreamedCorpus:
    data = open_data(manifest, path, None, (lines if lines is not None else []).append)
    assert isinstance(data, StreamedCorpus)
    return data


@dataclass
class Faults:
    """What the server does wrong."""

    cut_after: int | None = None
    """Close the connection after so many bytes of each answer."""
    gone: set[str] = field(default_factory=set)
    """Paths that are answered with 404."""
    refuse: bool = False
    """Answer everything with 503."""
    num_requests: int = 0


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """(URL, faults) of a server of a folder's files that understands ranges, as object stores do."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            faults.num_requests += 1
            path = folder / self.path.lstrip("/")
            if faults.refuse or self.path.lstrip("/") in faults.gone or not path.exists():
                self.send_response(503 if faults.refuse else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            first, last = 0, len(data) - 1
            if wanted := self.headers.get("Range"):
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                first, last = int(low), min(last, int(high) if high else last)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            else:
                self.send_response(200)
            piece = data[first : last + 1]
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(piece)))
            self.end_headers()
            if body:
                self.wfile.write(piece[: faults.cut_after])
                if faults.cut_after is not None and len(piece) > faults.cut_after:
                    self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
