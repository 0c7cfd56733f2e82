"""The network process comes up without what it never uses."""

from __future__ import annotations

import socket
import subprocess
import sys

from dtrain.dht.start import put_off


def test_a_module_that_is_put_off_comes_when_it_is_used() -> None:
    """Its import costs nothing; the first use of anything in it brings it in whole."""
    put_off("colorsys")
    assert not hasattr(sys.modules["colorsys"], "__file__")
    import colorsys

    assert colorsys.rgb_to_hsv(1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
    assert sys.modules["colorsys"].__file__


def test_hivemind_comes_without_scipys_optimizers() -> None:
    """They would be half of hivemind's import, and 40 MB."""
    code = (
        "import sys; from dtrain.dht import start; start.put_off('scipy.optimize');"
        "import dtrain.dht.peer; assert 'hivemind.averaging' in sys.modules;"
        "assert 'scipy.linalg' not in sys.modules and 'scipy.sparse' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


STUCK = """
import asyncio
from dtrain.dht import peer, start
from dtrain.dht.streams import in_background

class Peer:
    def __init__(self, reader, writer):
        self.reader = reader

    async def serve(self):
        in_background(self.connect())
        print("connects", flush=True)
        await self.reader.read()

    async def connect(self):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

peer.NetworkPeer = Peer
start.main()
"""


def test_who_is_stuck_when_its_worker_is_gone_ends_all_the_same() -> None:
    """A worker that is killed while its network process connects leaves no process behind."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", STUCK, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"connects\n"
        ours.close()
        assert process.wait(20.0) == 0
    finally:
        process.kill()
        process.communicate()
