"""Runs all simulations of a sweep that are not there yet, several at a time, each in a process of its own.

python -m dtrain.experiments.sim_jobs CONFIG OUT SEEDS      one such process: reads run ids, writes progress, by lines
"""

from __future__ import annotations

import json
import os
import platform
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dtrain.compression.errors import CompressionError
from dtrain.compression.warm_up import warm_up
from dtrain.experiments.results import ResultFolder, Row, write_json
from dtrain.experiments.sim_file import RunSpec, Sweep, load_sweep
from dtrain.experiments.sim_swarm import simulate
from dtrain.trainer.data import open_corpus
from dtrain.trainer.errors import DtrainError, RunError

Report = Callable[[Row], None]
"""Gets {"id", "round"} after a round, {"id", "done": true} or {"id", "failed": one line} after a run."""


def run_one(spec: RunSpec, data: Path | None, folder: ResultFolder, report: Report) -> None:
    """Simulate one run into its folder. A run that fails is reported, and leaves the rounds it got to."""
    torch.set_num_threads(1)
    began, place = time.monotonic(), folder.run_folder(spec.id)
    with open(place / "rounds.jsonl", "w") as file:

        def write(line: Row) -> None:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            report({"id": spec.id, "round": line["round"]})

        try:
            warm_up(spec.manifest.codec)
            row = simulate(spec, open_corpus(spec.manifest.data, data), write)
        except (DtrainError, CompressionError) as error:  # such as a loss that is no number any more
            report({"id": spec.id, "failed": str(error)})
            return
    write_json(place / "machine.json", _machine(time.monotonic() - began, row["rounds"]))
    folder.write_row(spec.id, row)
    report({"id": spec.id, "done": True})


def _machine(seconds: float, rounds: int) -> Row:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return {
        "wall_s": round(seconds, 3),
        "s_per_round": round(seconds / max(1, rounds), 4),
        "max_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def run_all(
    sweep: Sweep,
    config: Path,
    seeds: int,
    folder: ResultFolder,
    specs: Sequence[RunSpec],
    jobs: int,
    report: Report,
) -> None:
    """Simulate these runs of a sweep. However it ends, no process and no temporary file is left."""
    if jobs == 1:
        for spec in specs:
            run_one(spec, sweep.data, folder, report)
        return
    todo = [spec.id for spec in reversed(specs)]
    events: queue.Queue[tuple[subprocess.Popen[str], Row | None]] = queue.Queue()
    with _processes(config, folder, seeds, min(jobs, len(todo)), events) as processes:
        for process in processes:
            _give(process, todo)
        busy = len(processes)
        while busy:
            process, event = events.get()
            if event is None:
                raise RunError("a simulation process has ended by itself; what it said is above")
            report(event)
            if "round" not in event and not _give(process, todo):
                busy -= 1


def _give(process: subprocess.Popen[str], todo: list[str]) -> bool:
    """Hand a process its next run; False if there is none."""
    if not todo:
        return False
    assert process.stdin is not None
    process.stdin.write(todo.pop() + "\n")
    process.stdin.flush()
    return True


@contextmanager
def _processes(
    config: Path, folder: ResultFolder, seeds: int, count: int, events: queue.Queue[Any]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that simulate, and threads that put what they say into `events`."""
    command = [sys.executable, "-m", __spec__.name, str(config), str(folder.path), str(seeds)]
    # Theirs, who are killed in the midst of it.
    scratch = tempfile.TemporaryDirectory(prefix="dtrain-simulate-")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch.name}
    processes: list[subprocess.Popen[str]] = []
    threads = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which ends them
            )
            processes.append(process)
            threads.append(threading.Thread(target=_listen, args=(process, events), daemon=True))
            threads[-1].start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
        for process in processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        scratch.cleanup()


def _listen(process: subprocess.Popen[str], events: queue.Queue[Any]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        events.put((process, json.loads(line)))
    events.put((process, None))


def main(config: str, out: str, seeds: str) -> None:
    """Simulate the runs whose ids come in, until no more come."""
    sweep, folder = load_sweep(Path(config), seeds=int(seeds)), ResultFolder(Path(out))
    specs = {spec.id: spec for spec in sweep.runs}
    ids: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(ids,), daemon=True).start()
    while True:
        run_one(specs[ids.get()], sweep.data, folder, lambda event: print(json.dumps(event), flush=True))


def _read(ids: queue.Queue[str]) -> None:
    for line in sys.stdin:
        ids.put(line.strip())
    os._exit(0)  # whoever asked is gone: nobody waits for what is under way


if __name__ == "__main__":
    main(*sys.argv[1:])
