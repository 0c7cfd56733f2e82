"""State transfer between real network processes; no trainer is needed to give and take bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from swarm_tools import eventually

from dtrain.compression.spec import CodecSpec
from dtrain.dht.exchange import DhtExchange
from dtrain.dht.peer_settings import PeerSettings
from dtrain.dht.state_files import State

pytestmark = [pytest.mark.timeout(200), pytest.mark.xdist_group("processes")]

PIECES = [300_000] * 12
BYTES = random.Random(7).randbytes(sum(PIECES))
HASHES = [hashlib.sha256(BYTES[i : i + 300_000]).digest() for i in range(0, len(BYTES), 300_000)]
DIGEST = hashlib.sha256(b"".join(HASHES)).digest()
ROUND, WORK = 7, 7e6


@dataclass(frozen=True)
class Given:
    round: int = ROUND
    work: float = WORK
    digest: bytes = DIGEST
    hashes: Sequence[bytes] = tuple(HASHES)


def give(write: Callable[[memoryview], object]) -> Given:
    write(memoryview(BYTES))
    return Given()


def give_corrupt(write: Callable[[memoryview], object]) -> Given:
    """The hashes are right and every piece is wrong."""
    write(memoryview(bytes(byte ^ 1 for byte in BYTES)))
    return Given()


@dataclass
class Watcher:
    """Notes how a download goes on, and does `then()` once `after` bytes are here."""

    seen: list[int] = field(default_factory=list)
    gone: dict[str, str] = field(default_factory=dict)
    after: int = 0
    then: Callable[[], None] | None = None

    def progress(self, have: int, total: int) -> None:
        assert total == len(BYTES)
        self.seen.append(have)
        if self.then is not None and have >= self.after:
            then, self.then = self.then, None
            then()

    def left(self, donor: str, reason: str) -> None:
        self.gone[donor] = reason

    def trouble(self, reason: str) -> None:
        raise AssertionError(reason)


@contextmanager
def peer(
    folder: Path,
    through: list[str],
    newcomer_mbps: float = 0.0,
    connected: Callable[[int], None] = lambda pid: None,
) -> Iterator[DhtExchange]:
    """A peer that is in the run; `connected` is called before, with its network process."""
    folder.mkdir()
    settings = PeerSettings(
        folder / "identity.key", "127.0.0.1", initial_peers=tuple(through), newcomer_mbps=newcomer_mbps
    )
    exchange = DhtExchange(settings)
    try:
        exchange.connect()
        connected(exchange.process.pid)
        exchange.open_run(
            run_id="transfer",
            manifest=b"manifest",
            manifest_hash=bytes(32),
            codec=CodecSpec().to_dict(),
            shapes=[("w", (64, 64))],
            matchmaking_s=5.0,
            round_timeout_s=10.0,
            sender_timeout_s=5.0,
            exact_up_to=4,
            max_weight=1e9,
            heartbeat_s=0.2,
            heartbeat_ttl_s=10.0,
            pieces=PIECES,
        )
        yield exchange
    finally:
        exchange.close()


def announce(exchange: DhtExchange, state: str, work: float, round: int, digest: bytes) -> None:
    exchange.announce({"round": round, "digest": digest.hex(), "work": work, "state": state})


@contextmanager
def donor(folder: Path, through: list[str], provider: Callable[..., Given] = give) -> Iterator[DhtExchange]:
    with peer(folder, through, newcomer_mbps=8.0) as exchange:
        exchange.serve_state(provider)
        announce(exchange, "training", WORK, ROUND, DIGEST)
        yield exchange


def fetch(exchange: DhtExchange, watch: Watcher) -> State | None:
    """Try until a state is there or the watcher has cut the link."""
    return eventually(
        lambda: exchange.fetch_state(watch) or (watch.after and watch.then is None), "no state came", 60.0
    )


def test_a_network_process_may_die_before_it_is_in_the_run(tmp_path: Path) -> None:
    """As when the relay that it came through is gone at once: the next one enters the run, and nobody notices."""
    with peer(tmp_path / "a", []) as first:
        announce(first, "training", WORK, ROUND, DIGEST)
        kill = lambda pid: os.kill(pid, signal.SIGKILL)  # noqa: E731
        with peer(tmp_path / "b", first.addresses, connected=kill) as second:
            announce(second, "training", WORK, ROUND, DIGEST)
            eventually(lambda: first.swarm() and second.swarm(), "they do not see each other", 60.0)


def kill_network(exchange: DhtExchange) -> None:
    """In another thread, as the caller is the one that listens to it."""
    threading.Thread(target=exchange.process._child.kill).start()


def test_a_newcomer_whose_network_process_dies_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """And it catches and leaves a donor of corrupt pieces, and has the right bytes in the end."""
    with (
        donor(tmp_path / "honest", []) as first,
        donor(tmp_path / "liar", first.addresses, give_corrupt) as liar,
        peer(tmp_path / "new", first.addresses) as newcomer,
    ):
        announce(newcomer, "joining", 0.0, 0, bytes(32))
        eventually(lambda: len(newcomer.swarm()) == 2, "the donors are not seen", 30.0)
        before = Watcher(after=len(BYTES) // 3, then=lambda: kill_network(newcomer))
        assert fetch(newcomer, before) is True
        after = Watcher()
        state = fetch(newcomer, after)
        assert isinstance(state, State)
        assert (state.round, state.work, state.digest) == (ROUND, WORK, DIGEST)
        assert bytes(state.blob) == BYTES
        assert not memoryview(state.blob).readonly  # torch wants its tensors writable
        assert after.seen[0] >= before.seen[-1] >= len(BYTES) // 3
        gone = {**before.gone, **after.gone}
        assert gone.keys() == {liar.peer_id} and "is corrupt" in gone[liar.peer_id]
        assert list((tmp_path / "new" / "transfer").iterdir()) == []
