"""Laws of the run as the dashboard watches it: what workers say is shown and kept, once, whatever they say."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_tools import ABOUT, ROUND_TOKENS, Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.experiments import dashboard_curves as curves
from dtrain.experiments.dashboard_history import connect, open_history
from dtrain.experiments.dashboard_text import clean_block, clean_line, number

BEGAN = 1_800_000_000.0


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "dashboard", began=BEGAN)
    yield stage
    stage.history.close()


def kinds(snapshot: dict[str, Any]) -> list[str]:
    """The events' kinds, oldest first."""
    return [event["kind"] for event in reversed(snapshot["events"])]


def test_a_run_in_full(stage: Stage) -> None:
    """Rounds, losses, speed, bytes, lanes and contributors are those that the workers told."""
    stage.enter("ada", "bert", "carla")
    stage.tick()
    for _ in range(10):
        shown = stage.play_round(4.0)
    health = shown["health"]
    assert (health["level"], health["round"], health["contributors"]) == ("good", 10, 3)
    assert health["digests"] == "agree" and health["round_s"] == pytest.approx(4.0)
    assert shown["tokens"] == 30 * ROUND_TOKENS
    assert shown["tokens_per_s"] == pytest.approx(3 * ROUND_TOKENS / 4.0)
    assert shown["eta_s"] == pytest.approx(10 * 4.0)
    assert shown["train_loss"] == (10, pytest.approx(4.6 / 10**0.3, abs=1e-3))
    assert shown["eval_loss"] == (10, pytest.approx(4.6 / 10**0.3 - 0.1, abs=1e-3))
    assert [lanes["round"] for lanes in shown["rounds"]] == [10, 9, 8]
    assert [lane["name"] for lane in shown["rounds"][0]["lanes"]] == ["ada", "bert", "carla"]
    assert [w["mine"] for w in shown["workers"]] == [True, False, False]
    assert sum(w["share"] for w in shown["workers"]) == pytest.approx(1.0)
    assert [c["contributions"] for c in shown["board"]] == [10, 10, 10]
    ring = 2 * 2 / 3 * 4 * ABOUT.num_params * 15 * 3 * 10
    assert shown["traffic"]["allreduce_bytes"] == pytest.approx(ring)
    assert shown["traffic"]["ratio"] == pytest.approx(ring / (3 * 10 * 150_000))


def test_workers_come_and_go(stage: Stage) -> None:
    """Joining, pausing, going on, leaving and vanishing are events, once each, with the name."""
    stage.enter("ada", "bert", "carla")
    stage.play_round()
    stage.actors["bert"].state = "paused"
    stage.play_round()
    stage.tick()
    stage.actors["bert"].state = "training"
    stage.play_round()
    stage.actors["carla"].state = "leaving"
    stage.tick()
    stage.actors.pop("carla")
    stage.actors.pop("bert")
    for _ in range(3):
        shown = stage.tick(5.0)
    assert kinds(shown) == ["joined", "joined", "joined", "paused", "resumed", "left", "gone"]
    assert shown["events"][0]["text"] == "bert dropped out: no heartbeat for 10 s"
    states = {worker["name"]: worker["state"] for worker in shown["workers"]}
    assert states == {"ada": "training", "bert": "gone", "carla": "left"}
    assert shown["health"]["level"] == "warning" and "bert" in shown["health"]["text"]
    stage.tick(100.0)
    assert [worker["name"] for worker in stage.tick()["workers"]] == ["ada"]


def test_a_workers_speed_is_that_of_its_last_round(stage: Stage) -> None:
    """Heartbeats begin to count anew with each round; what is shown does not, and a paused worker has none."""
    stage.enter("ada", "bert")
    stage.play_round()
    for actor in stage.actors.values():
        actor.changes["tokens_per_s"] = 0.0
    line = stage.actors["ada"].bulletin.rounds[-1]
    passed_s = line.compute_s + line.wait_s + line.exchange_s + line.apply_s
    ada, bert = stage.tick()["workers"]
    assert ada["tokens_per_s"] == pytest.approx(ROUND_TOKENS / passed_s, rel=1e-3)
    assert 0 < bert["share"] < ada["share"] < 1
    stage.actors["bert"].state = "paused"
    assert [worker["share"] for worker in stage.tick()["workers"]] == [1.0, 0.0]


def test_a_worker_that_was_killed_dropped_out(stage: Stage) -> None:
    """Its network process still says that it stopped: that is no goodbye, and is told once."""
    stage.enter("ada", "bert")
    stage.play_round()
    stage.actors["bert"].state = "stopped"
    shown = stage.tick()
    assert [worker["state"] for worker in shown["workers"]] == ["training", "gone"]
    stage.actors.pop("bert")
    shown = stage.tick(5.0)
    assert kinds(shown) == ["joined", "joined", "gone"]
    assert shown["events"][0]["text"] == "bert dropped out: its process ended"
    assert shown["health"]["level"] == "warning"


def test_trouble_is_told(stage: Stage) -> None:
    """Differing weights, a late round, and an empty run are in the first line."""
    assert stage.tick()["health"]["level"] == "empty"
    stage.enter("ada", "bert")
    for _ in range(5):
        stage.play_round(2.0)
    assert "late" in stage.tick(60.0)["health"]["text"]
    stage.actors["bert"].changes["digest"] = "ff" * 32
    shown = stage.play_round(2.0)
    assert (shown["health"]["level"], shown["health"]["digests"]) == ("bad", "differ")
    stage.actors.clear()
    assert stage.tick(20.0)["health"]["text"] == "All workers are gone"


def test_a_restart_forgets_and_repeats_nothing(stage: Stage) -> None:
    """What was known before is shown after, nobody joins twice, and who went meanwhile is told."""
    stage.enter("ada", "bert")
    for _ in range(6):
        before = stage.play_round()
    stage.restart()
    stage.actors.pop("bert")
    after = stage.tick()
    for _ in range(3):
        after = stage.tick(5.0)
    for key in ("tokens", "train_loss", "eval_loss", "rounds", "traffic"):
        assert after[key] == before[key]
    assert kinds(after) == ["joined", "joined", "gone"]
    assert "while this dashboard was away" in after["events"][0]["text"]
    with stage.history.reader() as db:
        for curve in ("train_loss", "eval_loss"):
            rounds = [row[1] for row in curves.read(db, curve)]
            assert rounds == sorted(set(rounds))


def test_a_worker_that_is_started_again_keeps_its_account(stage: Stage) -> None:
    """Its counters begin anew; its rounds and bytes on the board do not."""
    stage.enter("ada", "bert")
    for _ in range(3):
        stage.play_round()
    ada = stage.actors["ada"]
    ada.since, ada.up, ada.bulletin = stage.now, 0, type(ada.bulletin)()
    shown = stage.play_round()
    assert {c["name"]: c["contributions"] for c in shown["board"]} == {"ada": 4, "bert": 4}
    assert shown["traffic"]["up_bytes"] == 8 * 150_000


def test_what_was_sent_before_is_not_held_against_anything(stage: Stage) -> None:
    """The comparison with an all-reduce covers the rounds that the dashboard saw, and the bytes since."""
    stage.enter("ada", "bert")
    for actor in stage.actors.values():
        actor.since, actor.up = BEGAN - 1000, 10**9
    for _ in range(2):
        shown = stage.play_round()
    assert shown["traffic"]["counted_up_bytes"] == 2 * 150_000
    assert shown["traffic"]["up_bytes"] > 2 * 10**9


def test_another_run_of_that_name_gets_a_history_of_its_own(tmp_path: Path) -> None:
    """The old one is put aside, not mixed in, and not lost."""
    for digest in ("aa" * 32, "bb" * 32, "bb" * 32):
        history = open_history(tmp_path, digest)
        history.close()
    assert sorted(p.name for p in tmp_path.glob("*.sqlite")) == ["history-aaaaaaaa.sqlite", "history.sqlite"]


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "bidi": "abc\u202egnp.exe\u2066",
    "nul": "a\x00b\x1b[31m",
    "long": "x" * 1_000_000,
    "half": "\ud800",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_cut_and_shown(stage: Stage, text: str) -> None:
    """A name or an event of any content is short, visible and valid UTF-8 in the snapshot; the rest goes on."""
    stage.enter("ada", "bert")
    ada = stage.actors["ada"]
    ada.changes.update(name=text, device=text, state=text, digest=text, reach=text)
    ada.bulletin.event(stage.now, "problem", text if text != "\ud800" else "x")
    shown = stage.play_round()
    texts = [v for w in shown["workers"] for v in w.values() if isinstance(v, str)]
    texts += [event["text"] for event in shown["events"]]
    assert len(shown["workers"]) == 2
    for told in texts:
        told.encode()
        assert len(told) <= 300
        assert not any(c in told for c in "\x00\x1b\u202e\u2066")


@given(st.text(), st.integers(1, 100))
def test_clean_text_is_short_and_visible(text: str, limit: int) -> None:
    """Whatever goes in, what comes out is one line of at most `limit` characters that encodes."""
    line = clean_line(text, limit)
    assert len(line) <= limit and "\n" not in line
    line.encode()
    assert len(clean_block(text, limit)) <= limit


@given(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans(), st.lists(st.integers())))
def test_a_number_is_a_number(value: object) -> None:
    """Figures from the network are finite and not negative, or 0."""
    assert 0 <= number(value) < 2**54


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=400), st.integers(2, 60))
def test_thinning_keeps_the_extremes(values: list[float], max_points: int) -> None:
    """However few points are asked for, the lowest and the highest value are among them, in order."""
    db = sqlite3.connect(":memory:")
    db.executescript(curves.SCHEMA)
    points = [curves.Point(n, float(n), n, 10.0 * n, value) for n, value in enumerate(values)]
    curves.append(db, "c", points)
    shown = curves.read(db, "c", max_points=max_points)
    assert len(shown) <= max_points
    assert {min(values), max(values)} <= {row[3] for row in shown} or max_points < 2
    assert [row[0] for row in shown] == sorted(row[0] for row in shown)
    db.close()


@pytest.mark.parametrize("axis", ["time", "round", "tokens"])
def test_a_zoom_reads_its_stretch(axis: str, tmp_path: Path) -> None:
    """Of any part of a long curve all points come if they are few, else the extremes of its buckets."""
    db = connect(tmp_path / "curves.sqlite")
    db.executescript(curves.SCHEMA)
    values = [math.sin(n / 50) for n in range(20_000)]
    values[7_777] = 99.0
    curves.append(db, "c", [curves.Point(n, float(n), n, float(n), v) for n, v in enumerate(values)])
    assert curves.append(db, "c", [curves.Point(5, 5.0, 5, 5.0, 0.0)]) == 0
    near = curves.read(db, "c", axis=axis, start=100.0, end=149.0)
    assert [row[1] for row in near] == list(range(100, 150))
    whole = curves.read(db, "c", axis=axis, max_points=100)
    assert len(whole) <= 100 and 99.0 in {row[3] for row in whole}
    assert whole[0][1] < 400 and whole[-1][1] > 19_600
    db.close()


def test_values_that_are_no_numbers_make_no_points(stage: Stage) -> None:
    """A loss of NaN or infinity is left out of the curve; the run goes on."""
    stage.enter("ada", "bert")
    stage.play_round(loss=math.nan)
    stage.play_round(loss=2.0)
    shown = stage.tick(10.0)
    assert shown["train_loss"] == (2, 2.0)
