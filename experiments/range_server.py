"""A server of one folder's files on loopback that understands ranges, as object stores do, and can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Faults:
    """What the server does wrong."""

    cut_after: int | None = None
    """Close the connection after so many bytes of each answer."""
    gone: set[str] = field(default_factory=set)
    """Names of files that are answered with 404."""
    refuse: bool = False
    """Answer everything with 503."""
    num_requests: int = 0


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """(URL, faults) of a server that runs meanwhile."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(has_body=False)

        def do_GET(self) -> None:
            self.answer(has_body=True)

        def answer(self, has_body: bool) -> None:
            faults.num_requests += 1
            name = self.path.lstrip("/")
            path = folder / name
            if faults.refuse or name in faults.gone or path.parent != folder or not path.is_file():
                self.send_response(503 if faults.refuse else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            first, last = 0, size - 1
            if wanted := self.headers.get("Range"):
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                first, last = int(low), min(last, int(high) if high else last)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            if has_body:
                with path.open("rb") as file:
                    file.seek(first)
                    piece = file.read(last + 1 - first)
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
