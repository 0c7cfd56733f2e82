"""The archive of a bootstrap peer: the run's newest state outlives all workers, and is given on unchanged."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from swarm_tools import DEADLINE_S, eventually, swarm
from test_admission import Machine, machines
from test_heartbeats import STATUS, Network, network, play  # noqa: F401  (a fixture)
from test_meeting import Others, record, verdict
from test_worker import quick_manifest

from dtrain.compression.codec import Codec
from dtrain.dht.archive import FetchedState
from dtrain.dht.outcome import PeerView
from dtrain.trainer import cli_archive
from dtrain.trainer.archive import Archivist, Kept, StateFile
from dtrain.trainer.cli_archive import ArchiveThread, remember, remembered
from dtrain.trainer.estimate import Estimate
from dtrain.trainer.exchange import Provider, Watch, is_archive
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.model import GPT
from dtrain.trainer.outer_loop import OuterLoop
from dtrain.trainer.signing import OrganizerKey
from dtrain.trainer.state_layout import keep_pieces, recall_pieces, state_pieces
from dtrain.trainer.strategies import STRATEGIES, make_strategy
from dtrain.trainer.voice import Voice

PIECES = [4, 4, 1]


def digest_of(content: bytes) -> bytes:
    pieces = content[:4], content[4:8], content[8:]
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).digest()


@dataclass
class Workers:
    """A swarm whose workers say and give what the test wants."""

    folder: Path
    views: list[PeerView] = field(default_factory=list)
    content: bytes = b"ninebytes"
    asked: list[tuple[float, float]] = field(default_factory=list)
    said: list[Mapping[str, object]] = field(default_factory=list)
    takes_s: float = 0.0
    now: float = 1000.0

    def clock(self) -> float:
        return self.now

    def stand_at(self, round: int, state: str = "training") -> None:
        status = {"state": state, "round": round, "work": 10.0 * round, "digest": "", "reach": "direct"}
        self.views = [PeerView("a", status, 0.0)]

    def swarm(self) -> list[PeerView]:
        return self.views

    def fetch(self, watch: Watch, *, above: float, wanted: float) -> FetchedState | None:
        self.asked.append((above, wanted))
        path = self.folder / "incoming"
        path.write_bytes(self.content)
        self.now += self.takes_s
        return FetchedState(int(wanted // 10), wanted, digest_of(self.content), path)

    def serve_state(self, provider: Provider) -> None:
        self.provider = provider

    def announce(self, status: Mapping[str, object]) -> None:
        self.said.append(status)


@pytest.fixture
def workers(tmp_path: Path) -> Workers:
    return Workers(tmp_path)


def archivist(workers: Workers, every_s: float = 300.0) -> tuple[Archivist, StateFile]:
    file = StateFile(workers.folder / "archive", PIECES)
    made = Archivist(workers, file, None, lambda _: None, every_s=every_s, clock=workers.clock)  # type: ignore[arg-type]
    return made, file


def given(file: StateFile) -> bytes:
    """The bytes that a newcomer gets; their hashes fit them and the digest."""
    pieces = list[bytes]()
    said = file.give(lambda piece: pieces.append(bytes(piece)))
    assert [hashlib.sha256(piece).digest() for piece in pieces] == list(said.hashes)
    assert hashlib.sha256(b"".join(said.hashes)).digest() == said.digest
    return b"".join(pieces)


# ---------------------------------------------------------------------- what is kept


def test_a_state_is_given_as_it_was_fetched(workers: Workers) -> None:
    """Also after a restart; an older one makes room, and one that nobody has fetched yet is not announced."""
    keeper, file = archivist(workers)
    assert not keeper.look() and not workers.said
    workers.stand_at(3)
    assert keeper.look() and given(file) == b"ninebytes"
    assert workers.said[-1]["state"] == "archiving" and workers.said[-1]["round"] == 3
    assert workers.said[-1]["digest"] == digest_of(b"ninebytes").hex() and workers.said[-1]["work"] == 30.0

    again, file = archivist(workers)
    assert given(file) == b"ninebytes" and file.kept is not None and file.kept.round == 3
    assert workers.said[-1]["round"] == 3
    workers.content = b"otherbyte"
    workers.stand_at(4)
    assert again.look() and given(file) == b"otherbyte"
    assert len(list((workers.folder / "archive").glob("*.state"))) == 1


@pytest.mark.parametrize("spoil", ["bytes", "gone"])
def test_what_the_disk_spoils_is_fetched_anew(spoil: str, workers: Workers) -> None:
    """Bytes that are not those of the digest are given to nobody, and not announced any longer."""
    keeper, file = archivist(workers)
    workers.stand_at(3)
    assert keeper.look()
    (path,) = (workers.folder / "archive").glob("*.state")
    path.write_bytes(b"ninebytez") if spoil == "bytes" else path.unlink()
    with pytest.raises(OSError, match=r"not what it was|No such file"):
        given(file)
    workers.now += 1000
    assert keeper.look() and given(file) == b"ninebytes"
    assert [status["state"] for status in workers.said] == ["archiving", "joining", "archiving"]


def test_a_note_that_lies_is_no_state(workers: Workers) -> None:
    """A file name that leads elsewhere, nonsense, another size: begun anew."""
    folder = workers.folder / "archive"
    for note in ("{", "[]", '{"round": 1, "work": 1.0, "digest": "ab", "file": "../../key"}', "{}"):
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(note)
        assert StateFile(folder, PIECES).kept is None


# ---------------------------------------------------------------------- when


def test_the_state_is_fetched_now_and_then(workers: Workers) -> None:
    """Not before `every_s` have passed, nor while nobody has more than is here."""
    keeper, _ = archivist(workers, every_s=300.0)
    workers.stand_at(3)
    assert keeper.look() and not keeper.look()
    workers.stand_at(9)
    assert not keeper.look()
    workers.now += 301
    assert keeper.look() and workers.asked == [(0.0, 30.0), (30.0, 90.0)]
    workers.now += 301
    assert not keeper.look()


def test_downloads_take_a_tenth_of_the_time(workers: Workers) -> None:
    """A state that takes long is fetched less often."""
    keeper, _ = archivist(workers, every_s=1.0)
    workers.takes_s = 60.0
    workers.stand_at(3)
    assert keeper.look()
    workers.stand_at(9)
    workers.now += 599
    assert not keeper.look()
    workers.now += 2
    assert keeper.look()


def test_who_is_about_to_leave_is_asked_at_once(workers: Workers) -> None:
    """What only it has would be lost."""
    keeper, _ = archivist(workers)
    workers.stand_at(3)
    assert keeper.look()
    workers.stand_at(4, "finished")
    assert keeper.look() and workers.asked[-1] == (30.0, 40.0)


def test_a_disk_that_refuses_is_said(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of before stays."""
    keeper, file = archivist(workers, every_s=1.0)
    workers.stand_at(3)
    assert keeper.look()
    workers.stand_at(4)
    workers.now += 10
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert not keeper.look()
    assert isinstance(file.kept, Kept) and file.kept.round == 3


# ---------------------------------------------------------------------- among the others


def test_an_archive_is_asked_where_no_worker_has_more(network: Network) -> None:  # noqa: F811
    """Newcomers go to workers first: archives lag behind, and several of them agree on something old."""

    async def scenario() -> None:
        worker, archive, newcomer = network.peer(), network.peer(), network.peer()
        kept = {**STATUS, "state": "archiving"}
        for work, asked in ((9.0, {worker}), (5.0, {worker, archive}), (4.0, {worker, archive})):
            await worker.announce({**STATUS, "work": work})
            await archive.announce(kept)
            await newcomer.refresh()
            names = {record.peer_id for record in newcomer.donors()}
            assert names == {str(peer._node.peer_id) for peer in asked}, work
        assert newcomer.sees_an_archive() and len(newcomer.active()) == 1

    play(scenario)


@pytest.mark.parametrize("reach", ["client", "direct"])
def test_with_an_archive_a_worker_is_not_cut_off(reach: str) -> None:
    """Who cannot be dialled and sees nobody but an archive has really nobody else there, and goes on with the run."""
    there = Others(record("a", "archiving", reach="direct"))
    assert verdict(there, is_client=reach == "client", is_cut_off=True)["verdict"] == "alone"
    assert is_archive(PeerView("a", there.records[0].status, 0.0))


def test_a_run_that_only_an_archive_has_is_offered_as_such() -> None:
    """Who is asked whether to join reads that nobody trains it now, and that its weights are there."""
    cost = Estimate(
        download_bytes=3.7e6,
        up_bytes_per_h=0.0,
        down_bytes_per_h=0.0,
        memory_bytes=1e9,
        tokens_per_s=100.0,
        share_percent=100.0,
        round_s=5.0,
        round=5,
        workers=0,
    )
    shown = cost.lines(quick_manifest(), 10**6)
    assert "nobody in it now, 5 rounds done and kept" in shown and "3.7 MB to download" in shown


# ---------------------------------------------------------------------- without the model's memory


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_pieces_are_those_of_the_workers(strategy: str) -> None:
    """Found from the manifest alone, whatever the strategy shares beside theta."""
    manifest = quick_manifest(strategy__name=strategy)
    local = FlatParameters(GPT(manifest.model))
    outer = OuterLoop(
        manifest, local, Codec(manifest.codec, local.shapes), make_strategy(manifest, local.shapes)
    )
    assert state_pieces(manifest) == outer.pieces


def test_an_archive_needs_no_torch() -> None:
    """The process that keeps the state stays small."""
    modules = (
        "dtrain.trainer.cli_bootstrap, dtrain.trainer.cli_archive, dtrain.trainer.archive, dtrain.dht.archive"
    )
    code = f"import sys, {modules}, dtrain.trainer.state_layout, dtrain.trainer.control_server\n"
    code += "assert not {'torch', 'hivemind', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nobody_waits_for_the_pieces_any_more() -> None:
    """Whoever asked is gone: the process that was to find them ends, whatever it is at."""
    command = [sys.executable, "-m", "dtrain.trainer.state_layout", str(os.getppid())]  # not who starts it
    with subprocess.Popen(command, stdin=subprocess.PIPE) as asked:
        assert asked.wait(DEADLINE_S) == 1


def test_the_pieces_are_found_once(tmp_path: Path) -> None:
    """They are kept for the next start; another run's, or nonsense on the disk, are none."""
    manifest = quick_manifest()
    assert recall_pieces(tmp_path, manifest) is None
    keep_pieces(tmp_path, manifest, PIECES)
    assert recall_pieces(tmp_path, manifest) == PIECES
    assert recall_pieces(tmp_path, quick_manifest(train__inner_steps=7)) is None
    for nonsense in ("{", "[]", "{}", '{"of": 1}', '{"pieces": [1]}'):
        (tmp_path / "pieces.json").write_text(nonsense)
        assert recall_pieces(tmp_path, manifest) is None
    keep_pieces(tmp_path / "no such folder", manifest, PIECES)  # as on a full disk


@dataclass
class Run(Workers):
    """The same, as a whole run that a bootstrap peer is to take part in."""

    peer_id: str = "us"

    def archive(self, *, pieces: list[int], **_: object) -> None:
        assert pieces == PIECES and not self.said

    def seen_addresses(self) -> list[str]:
        return []


def test_a_state_of_last_time_is_offered_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody reads the invite: who comes in the seconds that torch takes would begin the run anew."""
    run, signed = Run(tmp_path), OrganizerKey.load_or_create(tmp_path / "key").sign(quick_manifest())
    file = StateFile(tmp_path / "archive", PIECES)
    run.stand_at(3)
    file.put(run.fetch(None, above=0, wanted=30.0))  # type: ignore[arg-type]
    keep_pieces(tmp_path, signed.manifest, PIECES)
    monkeypatch.setattr(cli_archive, "ask_state_pieces", lambda *_: pytest.fail("asks torch"))
    thread = ArchiveThread(run, signed, None, tmp_path, Voice(), Namespace(archive_every=300.0))  # type: ignore[arg-type]
    thread.start()
    try:
        assert [status["round"] for status in run.said] == [3]
    finally:
        thread.stop()


def test_peers_are_remembered(tmp_path: Path) -> None:
    """A bootstrap peer that is started again calls those that it knew; nonsense on the disk is nobody."""
    assert remembered(tmp_path) == []
    remember(tmp_path, ["/ip4/20.0.0.1/tcp/1/p2p/a", "/ip4/20.0.0.2/tcp/1/p2p/b"])
    remember(tmp_path, [])  # nobody is heard of at the moment
    assert remembered(tmp_path) == ["/ip4/20.0.0.1/tcp/1/p2p/a", "/ip4/20.0.0.2/tcp/1/p2p/b"]
    (tmp_path / "peers.json").write_text("7")
    assert remembered(tmp_path) == []


# ---------------------------------------------------------------------- a run


def kept_round(machine: Machine) -> int:
    """The last round whose state a bootstrap peer says that it has; 0 = none yet."""
    found = re.findall(r"state after round (\d+) is here", machine.said("out"))
    return int(found[-1]) if found else 0


@pytest.mark.xdist_group("processes")
@pytest.mark.timeout(400)
def test_a_run_outlives_its_workers_and_all_bootstrap_peers_but_one(tmp_path: Path) -> None:
    """The only worker and the first of two bootstrap peers are killed, and the other one is started again, with the
    invite of the dead one; who joins through it has the digest that the worker had after that round, goes on, and what
    it trains is kept too."""
    here, boots = ("--host", "127.0.0.1"), tmp_path / "boots"
    boots.mkdir()
    with machines(boots, "one", "two") as (one, two), swarm("kept", tmp_path) as run:
        settings = ("--preset", "tiny", "--inner-steps", "2", "--batch-size", "2", "--matchmaking-s", "4")
        assert one.run("create", "--run-id", "kept", *settings)[0] == 0
        serve = ("bootstrap", "--port", "0", "--archive-every", "1", *here)
        first = one.type(*serve, "--run-id", "kept")
        invite = eventually(lambda: re.search(r"dtrain join (\S+)", one.said("out")), "no invite")[1]
        other = two.type(*serve, "--invite", invite)
        flags = ("--eval-every", "0", "--no-lan")
        worker = run.start("a", *flags, "--invite", invite, "--max-tokens-per-s", "500")
        eventually(lambda: kept_round(two) >= 2, f"nothing is kept: {two.said('out')}")
        for process in (first, worker.process, other):
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = kept_round(two)
        two.type(*serve, "--invite", invite)
        second = eventually(lambda: re.search(r"dtrain join (\S+)", two.said("out")), two.said("err"))[1]
        late = run.start("b", *flags, "--invite", second, "--rounds", str(kept + 2))
        joined = late.wait_for("joined")
        assert (joined["source"], joined["round"]) == ("peers", kept)
        assert joined["digest"] == worker.digests()[kept]
        assert late.wait() == 0, late.tail()
        assert kept_round(two) == kept + 2, two.said("out")
        kept_now = f"with the state after round {kept + 2}"
        assert kept_now in one.run("status", "--name", "bootstrap")[1]
