"""A worker that is killed and goes on from an older checkpoint does not send again what was delivered since."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_worker import Threads, quick_manifest, swarm_of

from dtrain.trainer.checkpoint import newest_in
from dtrain.trainer.sent import Sent, SentLog, delivered


def test_the_log_is_what_happened(tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent")
    assert log.since(0) == []
    for round in (3, 4, 5):
        log.made(b"payload %d" % round, round)
        if round < 5:
            log.settled(round, [(round, 2)])
    again = SentLog(tmp_path / "sent")  # after a crash
    assert again.since(4) == [Sent(4, b"payload 4", [(4, 2)]), Sent(5, b"payload 5", None)]
    again.trim(4, 5)
    assert [sent.round for sent in again.since(0)] == [4]
    again.made(b"another", 4)  # the round is tried again
    assert again.since(0) == [Sent(4, b"another", None)]


def test_spoiled_files_and_a_full_disk_cost_only_the_log(tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent")
    log.made(b"payload", 1)
    (tmp_path / "sent" / "00000001.returned").write_text("{")
    (tmp_path / "sent" / "x.payload").write_bytes(b"")
    assert log.since(0) == [Sent(1, b"payload", None)]
    (tmp_path / "file").write_text("")
    refused = SentLog(tmp_path / "file" / "sent")
    refused.made(b"payload", 1)
    refused.settled(1, [])
    refused.trim(5)
    assert refused.since(0) == []


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(0, 1))
def test_what_did_not_come_back_was_delivered(lengths: list[int], parity: int) -> None:
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = list(zip(edges, lengths))
    returned = [part for index, part in enumerate(parts) if index % 2 == parity]
    chunks = {
        chunk for first, count in delivered(edges[-1], returned) for chunk in range(first, first + count)
    }
    gone = {chunk for first, count in returned for chunk in range(first, first + count)}
    assert chunks == set(range(edges[-1])) - gone


class Crash(Exception):
    """Stands for SIGKILL: nothing after it runs."""


def crashed(threads: Threads, at_round: int, *, delivers: bool) -> None:
    """Worker a dies in that round's exchange, before or after its payload is through; b goes on."""
    worker = threads.prepare("a", checkpoint_every=4, max_tokens_per_s=2000)
    run_round = worker.exchange.run_round

    def run(**contribution: Any) -> Any:
        if contribution["round"] < at_round:
            return run_round(**contribution)
        if delivers:
            run_round(**contribution)
        raise Crash

    worker.exchange.run_round = run  # type: ignore[method-assign]
    threads.start("b", max_tokens_per_s=2000)
    threads.begin("a")
    threads.threads[-1].join(60)
    [failure] = threads.failures
    assert isinstance(failure, Crash)
    threads.failures.clear()
    worker.exchange.close()  # its heartbeat has run out
    until = time.monotonic() + 60
    while threads.workers["b"].outer.round <= at_round + 1:
        assert time.monotonic() < until, "b does not go on"
        time.sleep(0.01)


@pytest.mark.parametrize("delivers", [False, True], ids=["before", "after"])
def test_nothing_is_sent_twice_after_a_crash(delivers: bool, tmp_path: Path) -> None:
    """What the stored feedback holds where payloads since have sent something is gone; the rest has decayed."""
    manifest = quick_manifest(exchange__start_workers=2)
    with swarm_of(manifest, tmp_path) as threads:
        crashed(threads, 6, delivers=delivers)
        stored = newest_in(tmp_path / "a" / "checkpoints")
        assert stored is not None and stored.round == 4
        before = stored.tensors["feedback.feedback"].clone()
        sent = SentLog(tmp_path / "a" / "sent").since(0)
        assert [one.round for one in sent] == [4, 5, 6] and sent[-1].returned is None

        worker = threads.prepare("a")
        worker._join()
        assert worker.outer.round > 6
        kept = worker.feedback.state_dict()["feedback"]
        theirs = torch.zeros(len(before), dtype=torch.bool)
        for one in sent[: 3 if delivers else 2]:
            theirs |= worker.codec.values(one.payload) != 0
        assert 0.1 < float(theirs.float().mean()) < 0.9
        decay = manifest.strategy.feedback_decay
        torch.testing.assert_close(kept[~theirs], before[~theirs] * decay**3)
        assert not kept[theirs].any() and before[theirs].abs().sum() > 0
        threads.workers["b"].stop("enough")


def test_what_theta_lost_stays_in_the_feedback(tmp_path: Path) -> None:
    """Everybody died: theta goes back to a checkpoint, and what was sent after it is in nobody's theta."""
    manifest = quick_manifest(exchange__start_workers=2)
    with swarm_of(manifest, tmp_path) as threads:
        crashed(threads, 6, delivers=True)
        threads.workers["b"].stop("dies too")
        threads.join()
    with swarm_of(manifest, tmp_path) as threads:  # a network without anybody
        worker = threads.prepare("a")
        worker._join()
        assert worker.outer.round == 4
        stored = newest_in(tmp_path / "a" / "checkpoints")
        assert stored is not None
        assert torch.equal(worker.feedback.state_dict()["feedback"], stored.tensors["feedback.feedback"])
        assert SentLog(tmp_path / "a" / "sent").since(0) == []
