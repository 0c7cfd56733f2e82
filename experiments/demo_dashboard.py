"""The demo's dashboard: a real `dtrain dashboard` beside the workers, and gone with them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from dtrain.experiments.dashboard import open_browser
from dtrain.experiments.demo_process import DemoProcess, stop_all

NEEDED = ("fastapi", "uvicorn", "segno")
START_S = 30.0  # a busy machine takes a while to load a web server
ADDRESS = "Dashboard: "


@contextmanager
def dashboard(run_id: str, rounds: int, base: Path, console: Console, wandb: str) -> Iterator[None]:
    """Show the run on a page while the block lasts; the demo goes on without one if it cannot be had."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        console.print("No dashboard: it needs pip install 'dtrain[dashboard]'.", highlight=False)
        yield
        return
    flags = ["--no-browser", "--target-rounds", str(rounds), "--wandb", wandb]
    process = DemoProcess(run_id, "dashboard", base, flags, command="dashboard")
    try:
        _tell_address(process, console)
        yield
    finally:
        stop_all([process])


def _tell_address(process: DemoProcess, console: Console) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.exit_code is None:
        for line in process.last_lines().splitlines():
            if line.startswith(ADDRESS):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
                open_browser(line.removeprefix(ADDRESS))
                return
        time.sleep(0.1)
    console.print(f"No dashboard: {process.last_lines(1) or 'it did not start in time'}", highlight=False)
