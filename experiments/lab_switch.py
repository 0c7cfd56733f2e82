"""A switch in user space for network namespaces: every packet passes through `lab_wire`, as the kernel's netem is often
not there.

python -m dtrain.experiments.lab_switch SEED      the process: commands on stdin and answers on stdout, a JSON line each

Every host's namespace gets a TUN device, whose packets (IPv4 only) this process reads, delays, drops and hands on. The
device that an address belongs to is the one behind which it was last seen, so hosts may move.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from dtrain.experiments.lab_wire import HomeLink, Wire

MTU_BYTES = 1400
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
BURST = 64  # packets read from one host before the next one's turn
SPIN_S = 0.0005  # epoll waits in whole milliseconds: what is due sooner is waited for without it
ANSWER_S = 10.0


class Switch:
    """The process, seen from whoever starts it; a context manager."""

    def __init__(self, seed: int = 0):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for who started us
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def plug(self, namespace: str, name: str, device: str, address: str, link: HomeLink) -> None:
        """Make a device in a namespace and put it on the switch; its address is the caller's to set."""
        self._do("plug", namespace=namespace, name=name, device=device, address=address, link=asdict(link))

    def change(self, name: str, link: HomeLink) -> None:
        """See `Wire`."""
        self._do("change", name=name, link=asdict(link))

    def cut(self, name: str, is_cut: bool) -> None:
        """See `Wire`."""
        self._do("cut", name=name, is_cut=is_cut)

    def partition(self, sides: Sequence[Sequence[str]]) -> None:
        """See `Wire`."""
        self._do("partition", sides=[list(side) for side in sides])

    def counts(self) -> dict[str, dict[str, int]]:
        """See `Wire`."""
        counts: dict[str, dict[str, int]] = self._do("counts")
        return counts

    def _do(self, command: str, **args: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": command, **args}) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        answer = json.loads((self._process.stdout.readline() if ready else "") or '{"error": "it is gone"}')
        if "error" in answer:
            raise OSError(f"the switch: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Switch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------- the process


class _Running:
    """The switch at work: packets wait in a heap for their moment."""

    def __init__(self, seed: int):
        self._wire = Wire(seed)
        self._names: dict[int, str] = {}  # a device's descriptor -> its host
        self._devices: dict[str, int] = {}
        self._at: dict[bytes, int] = {}  # IPv4 address -> the device behind which it was seen last
        self._waiting: list[tuple[float, int, int, bytes, bool]] = []
        self._number = 0
        self._poll = select.epoll()
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._commands = b""

    def run(self) -> None:
        """Until whoever started us is gone."""
        while True:
            self._hand_on()
            wait_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else 1.0
            for descriptor, _ in self._poll.poll(0.0 if wait_s < SPIN_S else wait_s):
                if descriptor in self._names:
                    self._read(descriptor)
                elif not self._obey():
                    return

    def _hand_on(self) -> None:
        """Let every packet whose moment has come go on: from the way to the receiver's line, from there to it."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            due, _, device, packet, is_through = heapq.heappop(self._waiting)
            if is_through:
                try:
                    os.write(device, packet)
                except OSError:
                    pass  # the receiver is down, or takes nothing at the moment
                continue
            at = self._wire.receive(due, self._names[device], len(packet))
            if at is not None:
                self._wait(at, device, packet, True)

    def _wait(self, at: float, device: int, packet: bytes, is_through: bool) -> None:
        self._number += 1
        heapq.heappush(self._waiting, (at, self._number, device, packet, is_through))

    def _read(self, device: int) -> None:
        for _ in range(BURST):
            try:
                packet = os.read(device, 65536)
            except OSError:
                return
            if packet[0] >> 4 != 4:
                continue
            self._at[packet[12:16]] = device
            target = self._at.get(packet[16:20])
            if target is None or target == device:
                continue
            at = self._wire.send(time.monotonic(), self._names[device], self._names[target], len(packet))
            if at is not None:
                self._wait(at, target, packet, False)

    # ------------------------------------------------------------------ commands

    def _obey(self) -> bool:
        blob = os.read(sys.stdin.fileno(), 65536)
        if not blob:
            return False
        *lines, self._commands = (self._commands + blob).split(b"\n")
        for line in lines:
            try:
                answer = {"value": self._carry_out(json.loads(line))}
            except (OSError, KeyError) as error:
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)
        return True

    def _carry_out(self, command: dict[str, Any]) -> Any:
        kind = command.pop("do")
        if "link" in command:
            command["link"] = HomeLink(**command["link"])
        if kind == "plug":
            return self._plug(**command)
        return getattr(self._wire, kind)(**command)

    def _plug(self, namespace: str, name: str, device: str, address: str, link: HomeLink) -> None:
        descriptor = _tun(namespace, device)
        self._wire.add(name, link)
        self._names[descriptor], self._devices[name] = name, descriptor
        self._at[socket.inet_aton(address)] = descriptor
        self._poll.register(descriptor, select.EPOLLIN)


def _tun(namespace: str, device: str) -> int:
    """A new TUN device in a namespace; its descriptor."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    theirs = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(theirs)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(descriptor, TUNSETIFF, request)
    finally:
        _enter(own)
        os.close(own)
        os.close(theirs)
    return descriptor


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    _Running(int(sys.argv[1])).run()
