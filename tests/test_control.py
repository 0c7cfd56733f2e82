"""The control service of a worker, and what its commands do to a swarm."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from swarm_tools import eventually
from test_worker import Threads, quick_manifest, swarm_of

from dtrain.trainer import control_files
from dtrain.trainer.control import Control
from dtrain.trainer.control_client import ControlClient
from dtrain.trainer.control_server import SERVICE, ControlServer
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.limits import Limits
from dtrain.trainer.voice import Voice
from dtrain.trainer.worker import Worker

STAGES = ("_train", "_encode", "_deliver", "_settle")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Control, Voice, ControlServer]]:
    control, voice = Control(tmp_path), Voice()
    with ControlServer("run", "worker-1", control, voice, tmp_path / "control") as server:
        yield control, voice, server
    assert not list((tmp_path / "control").iterdir())


@pytest.fixture
def client(served: tuple[Control, Voice, ControlServer], tmp_path: Path) -> Iterator[ControlClient]:
    (endpoint,) = control_files.find(tmp_path / "control")
    with ControlClient(endpoint) as client:
        yield client


def test_commands_reach_the_worker(
    served: tuple[Control, Voice, ControlServer], client: ControlClient
) -> None:
    """Pause, resume, finish and stop do what they say, and answer with the status after it."""
    control, reasons = served[0], list[str]()
    control.stop_worker = reasons.append
    assert client.status().state == "starting"
    assert client.pause().pausing and "dtrain resume" in client.status().held
    assert not client.resume().held and not control.pausing
    assert client.finish().finishing and control.finishing
    assert not client.resume().finishing
    client.stop()
    assert reasons == ["asked to stop"]


def test_limits_change_one_by_one(
    served: tuple[Control, Voice, ControlServer], client: ControlClient, tmp_path: Path
) -> None:
    """Fields that are not given stay; 0 lifts a limit; what cannot be is refused with a line, and nothing changes."""
    seen = list[Limits]()
    served[0].on_limits = seen.append
    client.set_limits(up_mbps=5.0, on_battery=False)
    status = client.set_limits(up_mbps=0.0, hours="22:00-08:00")
    assert (status.limits.up_mbps, status.limits.hours, status.limits.on_battery) == (
        0.0,
        "22:00-08:00",
        False,
    )
    with pytest.raises(UsageError, match="hours"):
        client.set_limits(hours="noon")
    assert Control(tmp_path).limits == served[0].limits == seen[-1]


def test_the_status_streams(served: tuple[Control, Voice, ControlServer], client: ControlClient) -> None:
    """A watcher gets the status at once and after each change, and its stream ends with the worker."""
    watch = client.watch_status(per_s=20)
    assert not next(watch).pausing
    served[0].pause()
    eventually(lambda: next(watch).pausing, "the pause is not seen")
    served[2].close()
    try:
        list(watch)
    except RunError:
        pass  # cut off rather than ended: as good


def test_the_log_is_read_and_followed(
    served: tuple[Control, Voice, ControlServer], client: ControlClient
) -> None:
    """The last lines, and with `follow` each later one, once."""
    for number in range(5):
        served[1].say(f"line {number}")
    assert [line.text for line in client.read_log(2)] == ["line 3", "line 4"]
    follow = client.read_log(1, follow=True)
    assert next(follow).text == "line 4"
    served[1].say("two\nlines")
    assert [next(follow).text, next(follow).text] == ["two", "lines"]


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer wrong"])
def test_without_the_token_nothing_answers(token: str, client: ControlClient) -> None:
    """No call and no stream, not even the health check, is for who does not know the token."""
    metadata = (("authorization", token),) if token else ()
    with grpc.insecure_channel(client.endpoint.address) as channel:
        for method in ("GetStatus", "Stop", "SetLimits"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=10, metadata=metadata)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        for method in ("WatchStatus", "ReadLog"):
            with pytest.raises(grpc.RpcError) as refused:
                list(channel.unary_stream(f"/{SERVICE}/{method}")(b"", timeout=10, metadata=metadata))
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_health_is_served(client: ControlClient) -> None:
    """The standard health service answers, for who has the token."""
    metadata = (("authorization", f"Bearer {client.endpoint.token}"),)
    with grpc.insecure_channel(client.endpoint.address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10, metadata=metadata)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_the_token_is_the_owners(served: tuple[Control, Voice, ControlServer], tmp_path: Path) -> None:
    """The folder and the file are for the user alone."""
    (path,) = (tmp_path / "control").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_dead_workers_file_is_swept(served: tuple[Control, Voice, ControlServer], tmp_path: Path) -> None:
    """A process id that is used again does not bring a dead worker back."""
    folder = tmp_path / "other"
    endpoint = served[2].endpoint
    old = control_files.Endpoint(**{**vars(endpoint), "started": endpoint.started - 1000})
    control_files.publish(old, folder)
    assert control_files.find(folder) == [] and not list(folder.iterdir())


# ---------------------------------------------------------------------- a swarm


def at_stage(worker: Worker, stage: str, round: int, action: Any) -> None:
    """Call `action` once, when `worker` comes to `stage` with `round` rounds behind it."""
    inner, done = getattr(worker, stage), list[bool]()

    def wrapped(*args: Any) -> Any:
        if worker.outer.round == round and not done:
            done.append(True)
            action()
        return inner(*args)

    setattr(worker, stage, wrapped)


def audit_errors(threads: Threads, name: str) -> list[float]:
    return [event["error"] / max(1e-9, event["scale"]) for event in threads.events(name, "audit")]


def assert_together(threads: Threads) -> None:
    """One theta wherever two completed the same round, and nothing that was trained is lost."""
    digests = [{e["round"]: e["digest"] for e in threads.events(n, "round")} for n in threads.workers]
    for number in set().union(*digests):
        assert len({d[number] for d in digests if number in d}) == 1, f"round {number}"
    for name in threads.workers:
        assert max(audit_errors(threads, name)) < 1e-5


@pytest.mark.parametrize(
    ("stage", "overlap"), [*((stage, "none") for stage in STAGES), ("_train", "eager"), ("_settle", "eager")]
)
def test_a_pause_harms_no_round(stage: str, overlap: str, tmp_path: Path) -> None:
    """Paused at any stage of a round, a worker hands in what it has, holds while the others go on, and on resuming
    is with them again: one theta, nothing lost."""
    manifest = quick_manifest(exchange__start_workers=2, exchange__overlap=overlap)
    with swarm_of(manifest, tmp_path) as threads:
        pace = {"audit": True, "max_tokens_per_s": 2000.0}  # ten rounds a second
        paused = threads.start("a", **pace)
        at_stage(paused, stage, 3, paused.control.pause)
        other = threads.start("b", **pace)
        eventually(lambda: paused.report.snapshot()["state"] == "paused", "a does not pause")
        stands = paused.outer.round
        eventually(lambda: other.outer.round >= stands + 3, "b does not go on")
        assert paused.outer.round == stands
        paused.control.resume()

        def is_back() -> bool:
            rounds = [event for event in threads.events("a", "round") if event["round"] > stands + 3]
            return any(len(event["contributors"]) == 2 and event["own_included"] for event in rounds)

        # Under overlap this swarm in memory waits for nobody who comes in; there, catching up is what can be seen.
        back = is_back if overlap == "none" else lambda: paused.outer.round >= stands + 3
        eventually(back, "a is not back with the others")
        for worker in (paused, other):
            worker.stop("the test is over")
        threads.join()
        assert_together(threads)


def test_who_has_used_up_its_traffic_gives_nothing(tmp_path: Path) -> None:
    """A worker that holds because of its budget is not to be asked for state; as soon as it goes on, it is again."""
    with swarm_of(quick_manifest(), tmp_path) as threads:
        worker, seen = threads.start("a"), list[Mapping[str, object]]()
        announce = worker.exchange.announce
        worker.exchange.announce = lambda status: (seen.append(status), announce(status))[1]  # type: ignore[method-assign]
        used = [0]
        worker.control.used_bytes = lambda: used[0]
        worker.control.set_limits({"daily_gb": 1.0})
        used[0] = 10**9
        eventually(lambda: seen and seen[-1].get("gives") is False, "it does not say so")
        assert seen[-1]["state"] == "paused"
        worker.control.set_limits({"daily_gb": 2.0})
        eventually(lambda: seen[-1]["state"] == "training" and "gives" not in seen[-1], "it does not go on")


@pytest.mark.parametrize("stage", STAGES)
def test_finish_ends_after_the_round(stage: str, tmp_path: Path) -> None:
    """Asked at any stage to finish, a worker completes the round under way, is in it, and leaves."""
    with swarm_of(quick_manifest(exchange__start_workers=2), tmp_path) as threads:
        leaver = threads.start("a", audit=True)
        at_stage(leaver, stage, 2, leaver.control.finish)
        threads.start("b", audit=True, max_rounds=6)
        threads.join()
        (stop,) = threads.events("a", "stop")
        assert stop["round"] == 3 and "asked" in stop["reason"]
        assert threads.events("a", "round")[-1]["own_included"]
        assert_together(threads)


def test_finish_ends_a_pause(tmp_path: Path) -> None:
    """A paused worker that is told to finish leaves at once."""
    with swarm_of(quick_manifest(), tmp_path) as threads:
        worker = threads.start("a")
        at_stage(worker, "_train", 1, worker.control.pause)
        eventually(lambda: worker.report.snapshot()["state"] == "paused", "no pause")
        worker.control.finish()
        threads.join()
        assert threads.events("a", "stop")


def test_a_share_of_the_time(tmp_path: Path) -> None:
    """After a step of s seconds at 25 %, the worker rests for three times as long."""
    control = Control(tmp_path)
    control.set_limits({"compute_percent": 25.0})
    assert control.rest_s(0.2) == pytest.approx(0.6)
    assert Control().rest_s(0.2) == 0.0
