"""The worker's side of its network process: starts it, speaks with it, starts it again when it dies.

Nothing here imports hivemind, so a worker imports torch while its network process, beside it, imports hivemind.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.dht import ipc

COMMAND_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0
RESTART_PAUSE_S = 1.0


class ExchangeError(Exception):
    """The network cannot be used; the message is for the user."""


class ConnectionLost(ExchangeError):
    """The network process died while a command was under way; it is being restarted."""

    def __init__(self) -> None:
        super().__init__("the network process is gone; it is being restarted")


@dataclass
class _Pending:
    done: threading.Event = field(default_factory=threading.Event)
    reply: ipc.Message = field(default_factory=lambda: {"lost": True})


class NetworkProcess:
    """One child process (`dht/peer.py`) and the socket to it.

    `on_event(message)` gets what it tells unasked, `on_question(name)` answers what it asks (in a thread of its own).
    `set_up()`, if set, is called after every restart, to bring the new process to where the old one was.
    """

    def __init__(self, on_event: Callable[[ipc.Message], None], on_question: Callable[[str], Any]):
        self._on_event, self._on_question = on_event, on_question
        self.set_up: Callable[[], None] | None = None
        self.on_death: Callable[[], None] = lambda: (
            None
        )  # told at once when a child that was set up ends unasked
        self._send_lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._closing = threading.Event()
        self.ends_on_purpose = False  # the child said so: no need to tell the user
        self._restart_lock, self._child_lock = threading.Lock(), threading.Lock()
        sweep_left_overs()
        self._start()

    def _start(self) -> None:
        self.private_folder = Path(tempfile.mkdtemp(prefix=f"dtrain-{os.getpid()}-"))
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "dtrain.dht.start", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is the worker's to handle
                # One process needs no shared memory: without this, torch starts a manager for hivemind's.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "HIVEMIND_MEMORY_SHARING_STRATEGY": "file_descriptor",
                },
            )
        self._connection = ours
        threading.Thread(target=self._listen, args=(ours,), daemon=True, name="network-listener").start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def command(self, name: str, *, timeout_s: float = COMMAND_TIMEOUT_S, **args: Any) -> Any:
        """Have a command carried out and return its value. Raises ExchangeError."""
        pending = _Pending()
        with self._send_lock:
            self._next_id += 1
            number = self._next_id
            self._pending[number] = pending
        self._send({"do": name, "id": number, "args": args})
        if not pending.done.wait(timeout_s):
            self._pending.pop(number, None)
            raise ExchangeError(f"the network process did not answer {name!r} within {timeout_s:.0f} s")
        if "lost" in pending.reply:
            raise ConnectionLost
        if "error" in pending.reply:
            raise ExchangeError(pending.reply["error"])
        return pending.reply["value"]

    def tell(self, name: str, **args: Any) -> None:
        """The same without waiting for an answer. Raises ConnectionLost."""
        self._send({"do": name, "id": 0, "args": args})

    def _send(self, message: ipc.Message) -> None:
        with self._send_lock:
            try:
                self._connection.sendall(ipc.encode(message))
            except OSError:
                raise ConnectionLost from None

    def _listen(self, connection: socket.socket) -> None:
        try:
            while True:
                self._receive(ipc.receive(connection))
        except EOFError:
            pass
        connection.close()
        for number in list(self._pending):
            self._pending.pop(number).done.set()  # their reply stays "lost"
        if self.set_up is not None and not self._closing.is_set():
            if connection is self._connection and not self.ends_on_purpose:
                self.on_death()
            threading.Thread(
                target=self._restart, args=(connection,), daemon=True, name="network-restart"
            ).start()

    def _receive(self, message: ipc.Message) -> None:
        if "event" in message:
            self._on_event(message)
        elif "ask" in message:
            threading.Thread(target=self._answer, args=(message["ask"], message["id"]), daemon=True).start()
        elif (pending := self._pending.pop(message["id"], None)) is not None:
            pending.reply = message
            pending.done.set()

    def _answer(self, question: str, number: int) -> None:
        value = None
        try:
            value = self._on_question(question)
        except Exception as error:  # e.g. a full disk: the newcomer asks another donor
            logging.warning("a newcomer's question for our %s failed: %s", question, error)
        try:
            self._send({"answer": number, "value": value})
        except ConnectionLost:
            pass  # with the process went who wanted to know

    def _restart(self, lost: socket.socket) -> None:
        """Replace the child behind `lost`, over and over until the new one is set up.

        Every child that ends calls this; one call at a time works, and one whose child is already replaced has nothing
        to do.
        """
        with self._restart_lock:
            while lost is self._connection and self._replace_child():
                try:
                    assert self.set_up is not None
                    self.set_up()
                except ExchangeError as error:
                    logging.warning("the network is not back yet: %s", error)
                    lost = self._connection
                    self._closing.wait(RESTART_PAUSE_S)

    def _replace_child(self) -> bool:
        with self._child_lock:
            if self._closing.is_set():
                return False
            self._bury()
            self.ends_on_purpose = False
            self._start()
            return True

    def _bury(self) -> None:
        """End the child, however it is, and remove its files."""
        try:
            self._child.wait(CLOSE_TIMEOUT_S if self._closing.is_set() else 0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        shutil.rmtree(self.private_folder, ignore_errors=True)

    def close(self) -> None:
        """Let the child say goodbye and end it; one that was never asked for anything has nothing to say."""
        self._closing.set()
        if self._next_id:
            try:
                self._send({"do": "close"})
            except ConnectionLost:
                pass
        else:
            self._child.kill()
        with self._child_lock:  # a child that is just being started is buried too
            self._bury()


def sweep_left_overs() -> None:
    """Remove the folders of workers that were killed together with their network process."""
    for path in Path(tempfile.gettempdir()).glob("dtrain-*-*"):
        pid = path.name.split("-")[1]
        if not pid.isdecimal():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, OverflowError):
            continue
