"""Laws of the advisory check: a known advisory fails it, a database that cannot be reached does not, and says so."""

from __future__ import annotations

import http.server
import json
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "advisories.py"
ADVISORY = {
    "id": "PYSEC-2026-1",
    "summary": "reads what it should not",
    "affected": [
        {
            "package": {"name": "weak", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
    ],
}


@contextmanager
def database() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers as OSV does, with an advisory on `weak`; its URL, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query)
            body = json.dumps({"vulns": [ADVISORY]} if query["package"]["name"] == "weak" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(folder: Path, pins: str, url: str) -> tuple[int, str]:
    """Exit code and output."""
    (folder / "pins.txt").write_text(pins)
    command = [sys.executable, str(SCRIPT), "--pins", str(folder / "pins.txt"), "--osv-url", url]
    ran = subprocess.run([*command, "--memo", str(folder / "memo.json")], capture_output=True, text=True)
    assert ran.stderr == ""
    return ran.returncode, ran.stdout


def test_a_known_advisory_fails_and_is_named(tmp_path: Path) -> None:
    """A clean answer holds for a day, until the pins change; an advisory's line says where it is mended."""
    with database() as (url, asked):
        assert check(tmp_path, "sound==2.0\n", url) == (0, "advisories: none on 1 packages\n")
        assert check(tmp_path, "sound==2.0\n", url) == (0, "advisories: none, as of today\n")
        assert [(query["package"]["name"], query["version"]) for query in asked] == [("sound", "2.0")]
        code, said = check(tmp_path, "sound==2.0\nweak==1.0\n", url)
    assert code == 1 and "weak 1.0: PYSEC-2026-1, mended in 1.1" in said and "sound" not in said


def test_a_database_out_of_reach_is_one_line(tmp_path: Path) -> None:
    """Not checked is not clean, and is not remembered; the check passes."""
    code, said = check(tmp_path, "sound==2.0\n", "http://127.0.0.1:9/v1/query")
    assert code == 0 and said.count("\n") == 1 and "NOT CHECKED" in said
    assert not (tmp_path / "memo.json").exists()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Traceback\npip_audit._service.interface.ServiceError", 0),  # a server in trouble
        ("requests.exceptions.JSONDecodeError: Expecting value", 0),
        ("ERROR:pip_audit._cli:requirement sound is not pinned: sound>=2.0", 1),
        ("No module named pip_audit", 1),
        ("", 1),
    ],
)
def test_a_mistake_of_ours_is_not_taken_for_a_network_in_trouble(
    said: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what the database did wrong passes."""
    scope = runpy.run_path(str(SCRIPT))
    assert scope["_failed"](said) == code
    assert ("NOT CHECKED" in capsys.readouterr().out) == (code == 0)
