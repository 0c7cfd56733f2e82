"""Watches one run in a thread of its own: finds it, hears it, keeps its history, publishes snapshots."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.dht import rendezvous
from dtrain.dht.invite import MAX_ADDRESSES, Invite
from dtrain.dht.observer import Observer
from dtrain.dht.peer_settings import PeerSettings
from dtrain.dht.process import ExchangeError
from dtrain.experiments.dashboard_history import History, open_history
from dtrain.experiments.dashboard_rows import About, Snapshot
from dtrain.experiments.dashboard_run import RunState
from dtrain.trainer.bulletin import SAMPLE_TOPIC, TOPIC, unpack_bulletin, unpack_sample
from dtrain.trainer.errors import UsageError
from dtrain.trainer.exchange import is_archive
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.signing import SignedManifest

LOOK_PERIOD_S = 0.5  # the heartbeats, as they arrive here
ASK_PERIOD_S = 1.0  # the DHT for heartbeats
READ_AFTER_S, READ_PERIOD_S = 2.0, 10.0  # the bulletins: soon after a round, and now and then
SHOW_PERIOD_S = 5.0  # a snapshot at least so often
SEARCH_PERIOD_S = 2.0
WITHOUT_A_RUN = "Nobody trains this run now"

Publish = Callable[[Snapshot], None]


@dataclass(frozen=True)
class Target:
    """Which run to watch, and where the history goes."""

    run_id: str
    folder: Path
    invite: Invite | None = None
    peers: tuple[str, ...] = ()
    target_rounds: int = 0  # 0 = what the manifest's schedule gives


class Watcher:
    """`start`, then `invite` and `history` tell more than the published snapshots; `close` ends it."""

    def __init__(self, target: Target, publish: Publish):
        self.target, self._publish = target, publish
        self.history: History = open_history(target.folder, "")
        self.about = About(target.run_id)
        self.invite = ""
        self._observer: Observer | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(15.0)
        if self._observer is not None:
            self._observer.close()
        self.history.close()

    # ------------------------------------------------------------------ finding the run

    def _run(self) -> None:
        state = RunState(self.about, self.history)  # what is remembered is shown at once
        self._show(state, "Looking for the run")
        while not self._closing.is_set():
            try:
                signed = self._find(state)
                if signed is not None:
                    self._watch(signed)
                    return
            except (ExchangeError, UsageError) as error:
                self._show(state, f"{error}; trying again")
            except Exception as error:  # a page that says so is better than one that stands still
                traceback.print_exc()
                self._show(state, f"the dashboard failed: {error!r:.200}; trying again")
            self._closing.wait(SEARCH_PERIOD_S)

    def _find(self, state: RunState) -> SignedManifest | None:
        """The run's manifest, once somebody who has it answers."""
        peers = list(self.target.peers) + list(self.target.invite.addresses if self.target.invite else ())
        peers = peers or [address for worker in self._local_workers() for address in worker.addresses]
        if not peers:
            self._show(state, "")
            return None
        if self._observer is None:
            # On one machine alone the loopback is enough, and no router has to be asked for anything.
            host = "127.0.0.1" if all("/ip4/127." in peer for peer in peers) else "0.0.0.0"
            identity = self.target.folder / "identity.key"
            observer = Observer(
                PeerSettings(identity, host, 0, initial_peers=tuple(peers), passes_on=False, relays=False)
            )
            try:
                observer.connect()
            except BaseException:
                observer.close()
                raise
            self._observer = observer
        for blob in self._observer.find_manifests(self.target.run_id):
            try:
                signed = SignedManifest.from_json(blob)
            except UsageError:
                continue  # somebody's garbage under the run's key
            if self.target.invite is None or signed.manifest.hash == self.target.invite.manifest_hash:
                return signed
        return None

    def _local_workers(self) -> list[rendezvous.LocalWorker]:
        own = self._observer.peer_id if self._observer is not None else ""
        return [worker for worker in rendezvous.find(self.target.run_id) if worker.peer_id != own]

    # ------------------------------------------------------------------ watching it

    def _watch(self, signed: SignedManifest) -> None:
        manifest, observer = signed.manifest, self._observer
        assert observer is not None
        self.about = about_run(manifest, self.target.target_rounds)
        self.history.close()
        self.history = open_history(self.target.folder, manifest.hash.hex())
        state = RunState(self.about, self.history)
        observer.observe(
            run_id=manifest.run_id,
            manifest=signed.to_json().encode(),
            manifest_hash=manifest.hash,
            heartbeat_s=min(ASK_PERIOD_S, manifest.exchange.heartbeat_s),
            heartbeat_ttl_s=manifest.exchange.heartbeat_ttl_s,
        )
        addresses = tuple(observer.addresses[:MAX_ADDRESSES])
        self.invite = Invite(
            manifest.run_id, manifest.hash, bytes.fromhex(manifest.organizer), addresses
        ).encode()
        schedule = _Schedule()
        while not self._closing.is_set():
            try:
                self._look(observer, state, schedule)
            except ExchangeError as error:
                self._show(state, f"The connection to the run is lost ({error}). Connecting anew")
            except Exception as error:
                traceback.print_exc()
                self._show(state, f"the dashboard failed: {error!r:.200}; trying again")
            self._closing.wait(LOOK_PERIOD_S)

    def _look(self, observer: Observer, state: RunState, schedule: _Schedule) -> None:
        now, before = time.time(), state.fingerprint()
        mine = {worker.peer_id for worker in self._local_workers()}
        state.hear([view for view in observer.swarm() if not is_archive(view)], mine, now)
        if schedule.reads(state.round, now):
            notes, samples = observer.posted(TOPIC), observer.posted(SAMPLE_TOPIC)
            bulletins = {peer: unpack_bulletin(note) for peer, note in notes.items()}
            written = {peer: unpack_sample(note) for peer, note in samples.items()}
            state.read(
                {peer: bulletin for peer, bulletin in bulletins.items() if bulletin is not None},
                {peer: sample for peer, sample in written.items() if sample is not None},
                now,
            )
        lost = "" if observer.is_connected else "The connection to the run is lost. Connecting anew"
        if state.fingerprint() != before or now - schedule.shown > SHOW_PERIOD_S or lost:
            schedule.shown = now
            self._show(state, lost)

    def _show(self, state: RunState, connection: str) -> None:
        snapshot = state.snapshot(time.time(), connection)
        if not self.about.manifest_hash:
            snapshot = replace(snapshot, health=replace(snapshot.health, level="empty", text=WITHOUT_A_RUN))
        self._publish(snapshot)


@dataclass
class _Schedule:
    """When the bulletins were read last, and when a snapshot was shown."""

    shown: float = 0.0
    _read: float = 0.0
    _round: int = -1

    def reads(self, round: int, now: float) -> bool:
        """Whether it is time to read the bulletins: a round has ended since, or none has for a while."""
        passed = now - self._read
        if passed < (READ_AFTER_S if round != self._round else READ_PERIOD_S):
            return False
        self._read, self._round = now, round
        return True


def about_run(manifest: Manifest, target_rounds: int = 0) -> About:
    """What the manifest says of the run."""
    train = manifest.train
    return About(
        run_id=manifest.run_id,
        manifest_hash=manifest.hash.hex(),
        preset=manifest.model.preset,
        num_params=manifest.model.num_params,
        data=manifest.data.name or manifest.data.source,
        strategy=manifest.strategy.name,
        inner_steps=train.inner_steps,
        round_tokens=manifest.exchange.round_tokens,
        tokens_per_step=train.batch_size * train.seq_len,
        target_rounds=target_rounds or math.ceil(train.total_steps / train.inner_steps),
        heartbeat_ttl_s=manifest.exchange.heartbeat_ttl_s,
    )
