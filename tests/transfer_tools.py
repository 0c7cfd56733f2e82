"""Donors and newcomers in one event loop, over `stream_tools.Line`s, with faults that donors can have."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue
from stream_tools import Call, Handler, Line, Messages, settled

from dtrain.dht.history import KEPT_ROUNDS, RoundRecord
from dtrain.dht.partial_state import PartialState, Standing
from dtrain.dht.passed_rounds import PassedRounds
from dtrain.dht.state_donor import StateDonor, Written
from dtrain.dht.state_fetch import StateFetch
from dtrain.dht.streams import next_message, parse_header
from dtrain.dht.upload import UploadBudget

PIECES = (300_000, 300_000, 300_000, 300_000, 300_000, 300_000, 123_456, 40_000)


def state_bytes(seed: int) -> bytes:
    return random.Random(seed).randbytes(sum(PIECES))


def hashes_of(blob: bytes) -> bytes:
    hashes, start = [], 0
    for length in PIECES:
        hashes.append(hashlib.sha256(blob[start : start + length]).digest())
        start += length
    return b"".join(hashes)


def standing_of(blob: bytes, round: int, work: float) -> Standing:
    return Standing(round, work, hashlib.sha256(hashes_of(blob)).digest())


STATE, OTHER = state_bytes(1), state_bytes(2)
AT_NINE = standing_of(STATE, 9, 1e6)

Fault = Callable[[dict[str, Any], Handler], Handler]
"""Given a request's header and the honest handler, the handler that answers it."""


def honest(_: dict[str, Any], handler: Handler) -> Handler:
    return handler


class Donor:
    """A peer with a StateDonor; counts its snapshots and notes what is asked of it."""

    def __init__(
        self, folder: Path, blob: bytes = STATE, round: int = 9, work: float = 1e6, fault: Fault = honest
    ):
        self.folder, self.fault = folder, fault
        self.num_made = 0
        self.asked: list[int] = []  # pieces
        self.upload = UploadBudget()
        self.donor = StateDonor(PIECES, self._make, self._standing, self.upload)
        self.move_to(blob, round, work)

    def move_to(self, blob: bytes, round: int, work: float) -> None:
        """The donor's trainer takes outer steps."""
        self.blob, self.standing = blob, standing_of(blob, round, work)

    def _standing(self) -> tuple[int, bytes]:
        return self.standing.round, self.standing.digest

    async def _make(self) -> Written | None:
        self.num_made += 1
        path = self.folder / f"outgoing-{self.num_made}-{id(self)}"
        path.write_bytes(self.blob)
        standing = self.standing
        return Written(standing.round, standing.work, standing.digest, hashes_of(self.blob), path)

    async def handler(self, requests: Messages) -> Messages:
        """As `SwarmAverager.rpc_fetch_state` serves it."""
        header = parse_header((await next_message(requests, 30.0)).value, 0)
        if header.get("want") == "piece":
            self.asked.append(header["piece"])

        async def read_header() -> dict[str, Any]:
            return header

        async for message in self.fault(header, lambda rest: self.donor.serve(rest, read_header))(requests):
            yield message

    async def ask(self, **header: Any) -> tuple[dict[str, Any], bytes]:
        """One request without a line between."""

        async def nothing() -> Messages:
            return
            yield

        async def read_header() -> dict[str, Any]:
            return header

        values = [message.value async for message in self.donor.serve(nothing(), read_header)]
        return parse_header(values[0], 2**40), b"".join(values[1:])


@dataclass
class Newcomer:
    """A newcomer's folder and what it was told. `donors`: None = cannot be reached."""

    folder: Path
    donors: dict[str, Donor | None]
    progress: list[int] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    least_work: float = 0.0
    own: bytes = b""
    where: bytes = b""

    def __post_init__(self) -> None:
        self.partial = PartialState(self.folder, PIECES)

    async def fetch(self) -> Standing | None:
        """One download over new connections; all ends have hung up afterwards."""
        line = Line(loses=False)  # what a donor sent before it broke off has arrived

        async def unreachable(_: Messages) -> Messages:
            raise ConnectionRefusedError

        def method(name: str, rpc: str) -> Call:
            assert rpc == "rpc_fetch_state"
            donor = self.donors[name]
            return unreachable if donor is None else line.call(donor.handler)

        try:
            return await StateFetch(
                lambda: list(self.donors),
                method,
                self.partial,
                PIECES,
                active=lambda: [donor for donor in self.donors if not donor.startswith("paused")],
                passed=PassedRounds(self.folder / "passed", self.newest, self.past_round),
                least_work=self.least_work,
                own=self.own,
                where=lambda: self.where,
                on_progress=self._heard,
                on_left=self.left.__setitem__,
            ).run()
        finally:
            await settled(line)

    def newest(self) -> int:
        """The round that the donors are at."""
        return max((donor.standing.round for donor in self.donors.values() if donor is not None), default=0)

    async def past_round(self, round: int) -> RoundRecord | None:
        """Donors keep as many rounds as they do in earnest."""
        if round < self.newest() - KEPT_ROUNDS:
            return None
        return RoundRecord(round, bytes(32), ["a"], ["a"], [[0, 16]], [bytes([round % 256]) * 9])

    async def fetch_part(self, num_bytes: int) -> None:
        """A download that dies when so many bytes are here."""
        fetching = asyncio.create_task(self.fetch())
        while not (self.progress and self.progress[-1] >= num_bytes):
            assert not fetching.done()
            await asyncio.sleep(0.005)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)

    def _heard(self, have: int, total: int) -> None:
        assert total == sum(PIECES)
        self.progress.append(have)

    def run(self) -> Standing | None:
        return asyncio.run(self.fetch())

    @property
    def received(self) -> bytes:
        return self.partial.path.read_bytes()

    def asked(self) -> Counter[int]:
        """How often each piece was asked for."""
        return Counter(i for donor in self.donors.values() if donor is not None for i in donor.asked)


# ---------------------------------------------------------------------- faults of a donor


def corrupt(piece: int | None = None) -> Fault:
    """The last bit of the piece (None = of every one) is wrong."""

    def fault(header: dict[str, Any], handler: Handler) -> Handler:
        if header["want"] != "piece" or piece not in (None, header["piece"]):
            return handler

        async def spoiled(requests: Messages) -> Messages:
            number = 0
            async for message in handler(requests):
                value = message.value
                yield BytesValue(value=value[:-1] + bytes([value[-1] ^ 1])) if number == 1 else message
                number += 1

        return spoiled

    return fault


def cut_after(num_pieces: int) -> Fault:
    """After that many pieces every connection breaks in the middle of a piece."""
    served = [0]

    def fault(header: dict[str, Any], handler: Handler) -> Handler:
        if header["want"] != "piece":
            return handler
        served[0] += 1
        if served[0] <= num_pieces:
            return handler

        async def broken(requests: Messages) -> Messages:
            number = 0
            async for message in handler(requests):
                number += 1
                if number > 2:
                    return
                yield message

        return broken

    return fault


def silent_after(num_pieces: int) -> Fault:
    """After that many pieces no word comes, and the connections stay open."""
    served = [0]

    def fault(header: dict[str, Any], handler: Handler) -> Handler:
        served[0] += header["want"] == "piece"
        if served[0] <= num_pieces:
            return handler

        async def silent(requests: Messages) -> Messages:
            await asyncio.Event().wait()
            yield BytesValue()

        return silent

    return fault


def once(is_so: Callable[[], bool]) -> Fault:
    """Pieces are given once something is so."""

    def fault(header: dict[str, Any], handler: Handler) -> Handler:
        async def patient(requests: Messages) -> Messages:
            while header["want"] == "piece" and not is_so():
                await asyncio.sleep(0.005)
            async for message in handler(requests):
                yield message

        return patient

    return fault


def saying(want: str, blob: bytes = b"", **fields: object) -> Fault:
    """Answers requests of one kind with this, whatever it has."""

    def fault(header: dict[str, Any], handler: Handler) -> Handler:
        if header["want"] != want:
            return handler

        async def liar(requests: Messages) -> Messages:
            yield BytesValue(value=msgpack.packb({"size": len(blob), **fields}))
            if blob:
                yield BytesValue(value=blob)
            async for _ in requests:
                pass

        return liar

    return fault
