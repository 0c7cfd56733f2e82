"""Hostile members among real workers: put out within rounds, told why, and the others train on with one theta."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from swarm_tools import Swarm, WorkerProcess, eventually, swarm
from test_chaos import RUN_FILE

from dtrain.dht.faults import EVERY, VARIABLE
from dtrain.dht.tokens import reason_text

pytestmark = pytest.mark.xdist_group("processes")

OUT_WITHIN = 10  # rounds of the whole group


def start(run: Swarm, name: str, point: str = "", kind: str = "") -> WorkerProcess:
    planned = [{"point": point, "round": EVERY, "kind": kind}] if point else []
    env = {VARIABLE: json.dumps(planned), "DTRAIN_LOG_LEVEL": "INFO"}
    return run.start(name, "--config", str(run.base / "run.toml"), "--eval-every", "0", env=env)


def test_who_attacks_is_put_out_and_the_others_go_on(tmp_path: Path) -> None:
    """Of six, one pushes against the others and one sends what is no number; each of the four others says so."""
    with swarm("attacked", tmp_path) as run:
        text = RUN_FILE.format(exact_up_to=1).replace("start_workers = 4", "start_workers = 6")
        (tmp_path / "run.toml").write_text(text)
        honest = [start(run, "a")]
        honest[0].wait_for("start")
        honest += [start(run, name) for name in ("b", "c", "d")]
        hostile = {
            "against": start(run, "e", "update", "sign-flip"),
            "malformed": start(run, "f", "section", "nan"),
        }
        ids = {reason: worker.wait_for("start")["peer_id"] for reason, worker in hostile.items()}
        for worker in honest:
            for reason, peer_id in ids.items():
                said = f"{peer_id} is put out up to round"
                eventually(lambda w=worker, s=said: s in w.log.read_text(), f"{worker.name}: not {reason}")
        first = min(worker.events("round")[0]["round"] for worker in honest)
        last = max(worker.events("round")[-1]["round"] for worker in honest)
        assert last - first <= OUT_WITHIN
        for worker in honest:
            worker.wait_for_round(last + 4)
            inside = [set(event["contributors"]) for event in worker.events("round")]
            assert all(not members & set(ids.values()) for members in inside[last - first + 2 :])
            assert not any(len(members) < len(honest) for members in inside)  # nobody honest was left out
            log = worker.log.read_text()
            assert log.count("is put out up to round") == len(hostile)
        assert len({worker.digests()[last + 4] for worker in honest}) == 1
        everyone = [*honest, *hostile.values()]  # the smallest id tells, also a hostile one's
        told = [str(event["problem"]) for worker in everyone for event in worker.events("round")]
        for reason, peer_id in ids.items():
            words = reason_text(f"put-out-{reason}")
            assert sum(f"{peer_id} is put out" in line and words in line for line in told) == 1
        for reason, worker in hostile.items():
            words = reason_text(f"put-out-{reason}")
            eventually(lambda w=worker, s=words: s in w.log.read_text(), f"it is not told:\n{worker.tail()}")
