"""Laws of the observer: over a real network it sees what workers say, and they do not see it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain.dht.exchange import DhtExchange
from dtrain.dht.invite import decode
from dtrain.dht.peer_settings import PeerSettings
from dtrain.experiments.dashboard_observer import Target, Watcher
from dtrain.experiments.dashboard_rows import Snapshot
from dtrain.trainer.bulletin import SAMPLE_TOPIC, TOPIC, Bulletin, EvalLine, RoundLine, Sample
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.signing import OrganizerKey, SignedManifest

pytestmark = pytest.mark.xdist_group("processes")

DEADLINE_S = 90.0
STATUS = {"round": 3, "digest": "ab" * 32, "work": 9000.0, "state": "training", "name": "ada", "tokens": 9000}


def worker_of(signed: SignedManifest, folder: Path, peers: tuple[str, ...] = ()) -> DhtExchange:
    """A worker's place in the network, without the worker."""
    exchange = DhtExchange(PeerSettings(folder / "identity.key", "127.0.0.1", 0, initial_peers=peers))
    exchange.connect()
    terms = signed.manifest.exchange
    exchange.open_run(
        run_id=signed.manifest.run_id,
        manifest=signed.to_json().encode(),
        manifest_hash=signed.manifest.hash,
        codec=signed.manifest.codec.to_dict(),
        shapes=[("t", (4096,))],
        matchmaking_s=terms.matchmaking_s,
        round_timeout_s=terms.round_timeout_s,
        sender_timeout_s=terms.sender_timeout_s,
        exact_up_to=terms.exact_up_to,
        max_weight=signed.manifest.max_weight,
        heartbeat_s=0.5,
        heartbeat_ttl_s=terms.heartbeat_ttl_s,
    )
    return exchange


def bulletin() -> bytes:
    told = Bulletin()
    told.rounds.append(RoundLine(3, 2.0, 0.1, 0.4, 0.01, 1, True, 2.5, 3000))
    told.evals.append(EvalLine(3, 2.25))
    told.contributions = 3
    return told.pack(time.time(), (500, 600))


def wait_for(shown: list[Snapshot], matches: Callable[[Snapshot], Any], what: str) -> Snapshot:
    until = time.monotonic() + DEADLINE_S
    while True:
        found = next((snapshot for snapshot in reversed(shown) if matches(snapshot)), None)
        if found is not None:
            return found
        assert time.monotonic() < until, f"{what}; last: {shown[-1] if shown else None}"
        time.sleep(0.05)


def test_an_observer_sees_and_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its name alone, a run is shown with its worker, its bulletin and its text. To the worker the observer is
    no worker; when the worker says goodbye, it has left; nothing of the observer stays behind."""
    monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))
    manifest = preset_manifest("watched", "tiny", {"exchange.heartbeat_s": 0.5})
    signed = OrganizerKey.load_or_create(tmp_path / "organizer.key").sign(manifest)
    shown: list[Snapshot] = []
    watcher = Watcher(Target("watched", tmp_path / "dashboard"), shown.append)
    watcher.start()
    worker = worker_of(signed, tmp_path)
    try:
        wait_for(shown, lambda s: s.health.level == "empty", "the page waits for the run")
        worker.announce(STATUS)
        worker.post(TOPIC, bulletin())
        worker.post(SAMPLE_TOPIC, Sample(3, "once", " upon").pack())
        wait_for(shown, lambda s: [w.name for w in s.workers] == ["ada"], "the worker's heartbeat")
        full = wait_for(shown, lambda s: s.eval_loss == (3, 2.25) and s.sample, "the worker's bulletin")
        assert full.about.num_params == manifest.model.num_params
        assert full.workers[0].up_bytes == 500 and full.tokens == 9000
        assert full.rounds[0].lanes[0].compute_s == 2.0
        assert full.sample is not None and full.sample.text == " upon"
        assert worker.swarm() == []
        invite = decode(watcher.invite)
        assert invite.manifest_hash == signed.manifest.hash and invite.addresses
        worker.close()
        wait_for(shown, lambda s: "left" in {e.kind for e in s.events}, "the worker's goodbye")
        network = watcher._observer.process.pid if watcher._observer else 0
    finally:
        worker.close()
        watcher.close()
    assert network and not psutil.pid_exists(network)
    assert list((tmp_path / "runtime").glob("watched.*")) == []
