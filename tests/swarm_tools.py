"""Starts real workers for tests, watches what they write, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from dtrain.trainer.metrics import read_metrics

DEADLINE_S = 150.0  # generous: the test machine may be busy with other things


class WorkerProcess:
    """One `dtrain worker` and its folder; with `namespace`, in that network namespace."""

    def __init__(
        self,
        run_id: str,
        name: str,
        base: Path,
        *flags: str,
        env: Mapping[str, str] | None = None,
        namespace: str = "",
    ):
        self.name, self.folder = name, base / name
        self.log = base / f"{name}.log"
        command = [sys.executable, "-m", "dtrain.trainer.cli", "worker", "--run-id", run_id, "--name", name]
        command += ["--folder", str(self.folder), "--host", "127.0.0.1", "--threads", "1", *flags]
        if namespace:
            command = ["ip", "netns", "exec", namespace, *command]  # which becomes the command: one process
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "DTRAIN_RUNTIME_DIR": str(base / "runtime")}
        variables["PYTHONFAULTHANDLER"] = "1"  # so that `Swarm.explain` learns where each thread stands
        variables.update(env or {})
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, start_new_session=True
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the worker has written so far of one kind of event."""
        path = self.folder / "metrics.jsonl"
        return [e for e in read_metrics(path) if e["event"] == kind] if path.exists() else []

    def digests(self) -> dict[int, str]:
        """Digest of theta by number of rounds completed."""
        return {e["round"]: e["digest"] for e in self.events("round")}

    def children(self) -> list[psutil.Process]:
        """The network process and its daemon."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(
        self,
        kind: str,
        matches: Callable[[dict[str, Any]], bool] = lambda _: True,
        deadline_s: float = DEADLINE_S,
    ) -> dict[str, Any]:
        """The first event of a kind that matches, as soon as it is there."""

        def look() -> dict[str, Any] | None:
            if self.process.poll() is not None and not any(map(matches, self.events(kind))):
                raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
            return next((e for e in self.events(kind) if matches(e)), None)

        return eventually(look, f"{self.name}: no {kind!r} event\n{self.tail()}", deadline_s)

    def wait_for_round(self, number: int) -> dict[str, Any]:
        return self.wait_for("round", lambda event: event["round"] >= number)

    def wait(self) -> int:
        """The exit code, within the deadline."""
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end:\n{self.tail()}") from None

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def tail(self, num_characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-num_characters:]


def eventually(look: Callable[[], Any], failure: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value that `look` gives before the deadline."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        value = look()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(failure)


class Swarm:
    """Workers of one run that share a scratch folder."""

    def __init__(self, run_id: str, base: Path):
        self.run_id, self.base = run_id, base
        self.workers: list[WorkerProcess] = []

    def start(
        self, name: str, *flags: str, env: Mapping[str, str] | None = None, namespace: str = ""
    ) -> WorkerProcess:
        worker = WorkerProcess(self.run_id, name, self.base, *flags, env=env, namespace=namespace)
        self.workers.append(worker)
        return worker

    def explain(self) -> None:
        """Print what each worker said, and where those that still run stand: what a failed test is understood by."""
        for worker in self.workers:
            if worker.process.poll() is None:
                for process in [*worker.children(), psutil.Process(worker.process.pid)]:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGCONT)
                        process.send_signal(signal.SIGABRT)
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(5.0)
            print(f"---- {worker.name}\n{worker.tail(20_000)}")
            for path in sorted(worker.folder.glob("*.log")):
                print(f"---- {worker.name}/{path.name}\n{path.read_text(errors='replace')[-10_000:]}")


@contextmanager
def swarm(run_id: str, base: Path) -> Iterator[Swarm]:
    """A swarm whose processes are all ended at the end, whatever happened."""
    made = Swarm(run_id, base)
    try:
        yield made
    except BaseException:  # a test that takes too long ends with no Exception
        made.explain()
        raise
    finally:
        for worker in made.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        eventually(lambda: not our_processes(base), "processes of the swarm are left", 10.0)


def our_processes(base: Path) -> list[psutil.Process]:
    """Processes that belong to workers with folders below `base`, however they were started."""
    return started_with("DTRAIN_RUNTIME_DIR", str(base / "runtime"))


def started_with(variable: str, value: str) -> list[psutil.Process]:
    """Processes that were started with this in their environment, on the whole machine."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except (psutil.Error, OSError):
            continue
        if env.get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def leftovers(pids: set[int]) -> list[Path]:
    """Temp files that workers of these process ids should have removed, and hivemind's own."""
    temp = Path(tempfile.gettempdir())
    return [path for pid in pids for path in temp.glob(f"dtrain-{pid}-*")] + list(temp.glob("hivemind-*"))
