"""Laws of the live stream: everybody gets the newest, and who does not read costs nobody anything."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_tools import Stage, served

from dtrain.experiments import dashboard_stream
from dtrain.experiments.dashboard_guard import Access

DEADLINE_S = 30.0
REQUEST = b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "dashboard")
    stage.enter("ada", "bert")
    yield stage
    stage.history.close()


def follow(address: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=DEADLINE_S)
    connection.request("GET", "/api/stream")
    return connection, connection.getresponse()


def next_round(answer: http.client.HTTPResponse) -> int:
    """The round in the next snapshot of the stream."""
    while True:
        line = answer.readline()
        if line.startswith(b"data: ") and b'"health"' in line:
            return int(json.loads(line[6:])["health"]["round"])


def eventually(look: object, failure: str) -> None:
    assert callable(look)
    until = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < until, failure
        time.sleep(0.02)


def test_news_arrive_and_old_news_do_not(stage: Stage) -> None:
    """A viewer gets the state at once and then what changes; one that comes late or reads late gets only the newest."""
    stage.play_round()
    with served(stage, Access()) as (address, _):
        connection, answer = follow(address)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert next_round(answer) == 1
        stage.play_round()
        assert next_round(answer) == 2
        for _ in range(5):
            stage.play_round()
        late, late_answer = follow(address)
        assert next_round(late_answer) == 7
        while next_round(answer) < 7:
            pass
        eventually(lambda: stage.hub.clients == 2, "both are counted")
        for one in (answer, late_answer):
            one.close()
        connection.close()
        late.close()
        stage.play_round()
        eventually(lambda: stage.hub.clients == 0, "nobody is left")


def test_who_never_reads_is_cut_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing loses its connection, and one that reads goes on getting the news."""
    monkeypatch.setattr(dashboard_stream, "STALLED_S", 0.2)
    monkeypatch.setattr(dashboard_stream, "MIN_PERIOD_S", 0.01)
    padding = "x" * 200_000
    with served(stage, Access()) as (address, _), socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("http://").split(":")
        silent.connect((host, int(port)))
        silent.sendall(REQUEST)
        connection, answer = follow(address)
        stop = threading.Event()

        def play() -> None:
            while not stop.wait(0.02):
                stage.hub.publish({"health": {"round": 1}, "padding": padding})

        player = threading.Thread(target=play)
        player.start()
        try:
            eventually(lambda: stage.hub.clients == 2, "both have come")
            reader = threading.Thread(target=lambda: [next_round(answer) for _ in range(20)])
            reader.start()
            eventually(lambda: stage.hub.clients == 1, "the silent one is cut off")
            reader.join(DEADLINE_S)
            assert not reader.is_alive()
        finally:
            stop.set()
            player.join()
        silent.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionResetError):
            while silent.recv(65536):
                pass
        answer.close()
        connection.close()


def test_the_server_ends_at_once(stage: Stage) -> None:
    """Viewers that stay do not keep Ctrl-C waiting."""
    stage.play_round()
    with served(stage, Access()) as (address, _):
        connection, answer = follow(address)
        next_round(answer)
        began = time.monotonic()
    assert time.monotonic() - began < DEADLINE_S
    answer.close()
    connection.close()
