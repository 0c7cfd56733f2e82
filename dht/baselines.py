"""What `dtrain bench exchange` measures our exchange against: stock hivemind, and the all-gather of payloads.

Each of them needs a process of its own: the byte counters patch hivemind's classes, and stock hivemind forks.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import multiprocessing
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hivemind
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import Float16Compression
from hivemind.p2p import P2P, P2PContext, PeerID
from torch import Tensor

from dtrain.dht.streams import StreamError, answer, ask, next_message, parse_header
from dtrain.dht.transport import DAEMON_IDLE_S, Traffic, patch_hivemind

DAEMON: dict[str, Any] = {  # on loopback, as our own daemon is started
    "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
    "use_relay": False,
    "auto_nat": False,
    "nat_port_map": False,
    "idle_timeout": DAEMON_IDLE_S,
}
MAX_FORKS = 16
SHUTDOWN_S = 2.0
START_TIMEOUT_S = 120.0
KEPT_ROUNDS = 2
METHOD = "dtrain-bench-payload"

T = TypeVar("T")


class ForkedTraffic(Traffic):
    """A count that goes on in forked processes: each has a slot of its own, so that none overwrites another's."""

    def __init__(self) -> None:
        self._slots = multiprocessing.RawArray(ctypes.c_longlong, 2 * MAX_FORKS)
        self._num_slots = multiprocessing.Value("i", 0)
        self._slot, self._pid = 0, 0
        super().__init__()

    def _own(self) -> int:
        if self._pid != os.getpid():
            with self._num_slots.get_lock():
                self._slot, self._pid = self._num_slots.value, os.getpid()
                self._num_slots.value += 1
        return 2 * self._slot

    @property
    def up(self) -> int:
        """What this process has sent; see `total`."""
        return int(self._slots[self._own()])

    @up.setter
    def up(self, value: int) -> None:
        self._slots[self._own()] = value

    @property
    def down(self) -> int:
        """What this process has received; see `total`."""
        return int(self._slots[self._own() + 1])

    @down.setter
    def down(self, value: int) -> None:
        self._slots[self._own() + 1] = value

    def total(self) -> tuple[int, int]:
        """Bytes (up, down) of this process and all its forks."""
        return sum(self._slots[0::2]), sum(self._slots[1::2])


class StockAverager:
    """A peer of hivemind's own `DecentralizedAverager` with Float16 compression, as its users set it up.

    The group's size is told beforehand: a full group starts at once. To be made in the main thread, before other
    threads: it forks.
    """

    def __init__(self, folder: Path, initial_peers: Sequence[str], *, num_params: int, num_peers: int):
        multiprocessing.set_start_method("fork", force=True)  # hivemind's processes cannot be spawned
        self._traffic = ForkedTraffic()
        patch_hivemind(folder, self._traffic)
        self._dht = hivemind.DHT(
            initial_peers=list(initial_peers) or None,
            start=True,
            shutdown_timeout=SHUTDOWN_S,
            **DAEMON,
        )
        self._averager = DecentralizedAverager(
            [torch.zeros(num_params)],
            self._dht,
            start=True,
            prefix="bench",
            target_group_size=num_peers,
            compression=Float16Compression(),
            shutdown_timeout=SHUTDOWN_S,
        )
        self.peer_id = str(self._dht.peer_id)
        self.addresses = [str(address) for address in self._dht.get_visible_maddrs()]

    def average(self, values: Tensor, timeout_s: float) -> tuple[Tensor, int]:
        """Average fp32 [num_params] with the group: (the average, members of the group; 0 if there was none).

        The result is hivemind's shared tensor: good until the next call.
        """
        with self._averager.get_tensors() as (shared,):
            shared.copy_(values)
        try:
            gathered = self._averager.step(timeout=timeout_s)
        except Exception:  # hivemind raises many types; a round that failed is a result here
            gathered = None
        with self._averager.get_tensors() as (shared,):
            return shared, len(gathered or ())

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        return self._traffic.total()

    def close(self) -> None:
        self._averager.shutdown()
        self._dht.shutdown()


class AllGather:
    """A peer that gets every other peer's payload from its maker: N - 1 payloads up and as many down."""

    def __init__(self, folder: Path, initial_peers: Sequence[str]):
        self._traffic = Traffic()
        patch_hivemind(folder, self._traffic)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="all-gather")
        self._thread.start()
        self._offers: dict[int, asyncio.Future[bytes]] = {}
        self._p2p = self._wait_for(P2P.create(initial_peers=list(initial_peers) or None, **DAEMON))
        self._wait_for(
            self._p2p.add_protobuf_handler(
                METHOD, self._serve, BytesValue, stream_input=True, stream_output=True
            )
        )
        self.peer_id = str(self._p2p.peer_id)
        self.addresses = [str(address) for address in self._wait_for(self._p2p.get_visible_maddrs())]

    def gather(
        self, round: int, payload: bytes, peer_ids: Sequence[str], *, max_bytes: int, timeout_s: float
    ) -> list[bytes]:
        """Everyone's payload of `round`, in the order of `peer_ids` (ours among them).

        Raises StreamError, asyncio.TimeoutError or hivemind's errors when one cannot be had.
        """
        return self._wait_for(self._gather(round, payload, peer_ids, max_bytes, timeout_s), timeout_s)

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        return self._traffic.up, self._traffic.down

    def close(self) -> None:
        self._p2p._terminate()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait_for(self, work: Coroutine[Any, Any, T], timeout_s: float = START_TIMEOUT_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _gather(
        self, round: int, payload: bytes, peer_ids: Sequence[str], max_bytes: int, timeout_s: float
    ) -> list[bytes]:
        self._offer(round).set_result(payload)

        async def fetch(peer_id: str) -> bytes:
            if peer_id == self.peer_id:
                return payload
            call = functools.partial(self._call, PeerID.from_base58(peer_id))
            _, theirs = await ask(call, {"round": round}, max_bytes=max_bytes, timeout_s=timeout_s)
            return theirs

        return list(await asyncio.gather(*(fetch(peer_id) for peer_id in peer_ids)))

    async def _call(self, peer_id: PeerID, requests: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
        replies: AsyncIterator[BytesValue] = await self._p2p.iterate_protobuf_handler(
            peer_id, METHOD, requests, BytesValue
        )
        return replies

    def _offer(self, round: int) -> asyncio.Future[bytes]:
        """Our payload of `round`, as soon as we have it: others may ask before."""
        if round not in self._offers:
            self._offers[round] = self._loop.create_future()
            for old in sorted(self._offers)[:-KEPT_ROUNDS]:
                del self._offers[old]
        return self._offers[round]

    async def _serve(
        self, requests: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        async def handle() -> tuple[Mapping[str, Any], bytes]:
            header = parse_header((await next_message(requests, START_TIMEOUT_S)).value, 0)
            if not isinstance(header.get("round"), int):
                raise StreamError("which round?")
            offer = asyncio.shield(self._offer(header["round"]))
            return {}, await asyncio.wait_for(offer, START_TIMEOUT_S)

        async for message in answer(requests, handle):
            yield message
