"""Hostile reducers among real workers: they are found, proven to everybody and put out, and the others go on as one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from swarm_tools import Swarm, WorkerProcess, eventually, swarm
from test_chaos import FAULT_ROUND, RUN_FILE

from dtrain.dht.faults import VARIABLE

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(400)]
# A reducer is audited only by who was in its last round too: on a busy machine a first round may lack somebody.
AUDITED_ROUNDS = range(FAULT_ROUND, FAULT_ROUND + 8)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Swarm]:
    with swarm("audits", tmp_path) as made:
        (tmp_path / "run.toml").write_text(RUN_FILE.format(exact_up_to=1))
        yield made


def start(
    run: Swarm, name: str, *faults: tuple[str, str], rounds: Iterable[int] = (FAULT_ROUND,)
) -> WorkerProcess:
    planned = [{"point": point, "round": r, "kind": kind} for r in rounds for point, kind in faults]
    env = {VARIABLE: json.dumps(planned), "DTRAIN_LOG_LEVEL": "INFO"}
    return run.start(name, "--config", str(run.base / "run.toml"), "--eval-every", "0", env=env)


def test_a_wrong_sum_is_found_and_its_reducer_put_out(run: Swarm) -> None:
    """One member audits it; all others check the evidence, and have nothing to do with it any more."""
    honest = [start(run, "a", ("audit", "all"), rounds=AUDITED_ROUNDS)]
    honest[0].wait_for("start")
    honest += [start(run, "b"), start(run, "c")]
    cheat = start(run, "d", ("sum", "wrong-sum"), rounds=AUDITED_ROUNDS)
    cheat_id = cheat.wait_for("start")["peer_id"]
    for worker in honest:
        words = f"{cheat_id} is no reducer to be trusted"
        eventually(lambda w=worker, said=words: said in w.log.read_text(), f"{worker.name}:\n{worker.tail()}")
    seen = max(worker.events("round")[-1]["round"] for worker in honest)
    for worker in honest:
        worker.wait_for_round(seen + 3)
        later = [event["contributors"] for event in worker.events("round") if event["round"] > seen + 1]
        assert all(len(inside) == 3 and cheat_id not in inside for inside in later)
        # Once for each of its sums; of a second one if the first was still being looked at on a busy machine.
        cheated = [
            e for e in worker.events("round") if e["round"] > FAULT_ROUND and cheat_id in e["contributors"]
        ]
        assert 1 <= worker.log.read_text().count("is no reducer to be trusted") <= len(cheated)
    digests = [worker.digests() for worker in honest]
    assert len({d[seen + 3] for d in digests}) == 1


@pytest.mark.slow
def test_who_is_left_out_says_so_and_keeps_its_work(run: Swarm) -> None:
    """A reducer that has read a member's section and does not count it: that member's log names it, nobody else's."""
    workers = [start(run, "a")]
    workers[0].wait_for("start")
    workers += [start(run, name) for name in ("b", "c")]
    workers.append(start(run, "d", ("sum", "leave-out")))
    ids = [worker.wait_for("start")["peer_id"] for worker in workers]
    for worker in workers:
        worker.wait_for_round(FAULT_ROUND + 2)
    problems = {
        peer_id: " ".join(str(event.get("problem", "")) for event in worker.events("round"))
        for peer_id, worker in zip(ids, workers, strict=True)
    }
    named = [peer_id for peer_id in ids if f"{ids[3]} leaves us out" in problems[peer_id]]
    assert named == [min(ids[:3])]  # the first of the others is whom the fault leaves out
    assert len({worker.digests()[FAULT_ROUND + 1] for worker in workers}) == 1
