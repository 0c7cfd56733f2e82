"""Laws of the lab's proxy: bytes arrive whole, after their way, at the lines' rates, and not through a cut."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dtrain.experiments.lab_config import Place
from dtrain.experiments.lab_proxy import ProxyPlaces
from dtrain.experiments.lab_wire import HomeLink

DEADLINE_S = 30.0


@contextmanager
def echoing(places: ProxyPlaces, name: str) -> Iterator[tuple[str, int]]:
    """A server where that worker listens, which sends back what it gets; the address that others dial."""
    flags = dict(zip(places.flags(name)[::2], places.flags(name)[1::2]))
    with socket.create_server(("127.0.0.1", int(flags["--port"]))) as server:

        def serve() -> None:
            try:
                connection, _ = server.accept()
                with connection:
                    while blob := connection.recv(65536):
                        connection.sendall(blob)
            except OSError:
                pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield "127.0.0.1", int(flags["--announce"].split(":")[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


@pytest.fixture
def places() -> Iterator[ProxyPlaces]:
    made = ProxyPlaces({"a": Place(HomeLink(4, 8, 100)), "b": Place(HomeLink(4, 8, 200))})
    yield made
    made.close()


def test_bytes_take_their_time(places: ProxyPlaces) -> None:
    """A byte there and back takes the mean of both round trips; a megabit the sender's rate; both ends are counted."""
    places.started("a", os.getpid())  # whoever dials from this process is a
    with echoing(places, "b") as address, socket.create_connection(address, DEADLINE_S) as connection:
        began = time.monotonic()
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        assert time.monotonic() - began > 0.149
        blob, back = os.urandom(250_000), b""
        began = time.monotonic()
        threading.Thread(target=connection.sendall, args=(blob,)).start()
        while len(back) < len(blob):
            back += connection.recv(65536)
        assert back == blob and time.monotonic() - began > 250_000 * 8 / 4e6
    counts = places.counts()
    assert counts["a"]["up_bytes"] == counts["b"]["down_bytes"] == 250_001


def test_a_cut_holds_everything_back(places: ProxyPlaces) -> None:
    """While a cable is pulled nothing arrives, and afterwards everything does; who dials meanwhile is hung up on."""
    places.started("a", os.getpid())
    with echoing(places, "b") as address, socket.create_connection(address, DEADLINE_S) as connection:
        connection.sendall(b"1")
        assert connection.recv(1) == b"1"
        places.partition([["a"], ["b"]])
        connection.sendall(b"2")
        connection.settimeout(0.6)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        with socket.create_connection(address, DEADLINE_S) as refused:
            refused.settimeout(DEADLINE_S)
            assert refused.recv(1) == b""
        places.partition([])
        connection.settimeout(DEADLINE_S)
        assert connection.recv(1) == b"2"
