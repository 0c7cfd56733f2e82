"""Take the README's pictures of the dashboard: a live run of real workers in headless Chromium (`make pictures`).

Three workers begin, a fourth comes late, worker-2 is killed and worker-3 paused. Nothing in the pictures is made up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver

from dtrain.experiments.demo_process import DemoProcess, stop_all
from dtrain.trainer.metrics import read_metrics

PLACE = Path(__file__).resolve().parent.parent / "experiments"
RUN_ID, ROUNDS = "stdlib-tiny", 60
DEADLINE_S = 300.0
SIZES = {"light": (1040, 0), "dark": (1040, 0), "phone": (390, 0)}  # pixels; height 0 = the whole page
FLAGS = ["--rounds", str(ROUNDS), "--eval-every", "2"]


def main() -> int:
    """Take all pictures."""
    with tempfile.TemporaryDirectory(prefix="dtrain-pictures-") as scratch, _browser() as browser:
        base, processes = Path(scratch), []
        (base / "runtime").mkdir()

        def begin(name: str, *flags: str, command: str = "worker") -> DemoProcess:
            processes.append(DemoProcess(RUN_ID, name, base, flags, command=command))
            return processes[-1]

        try:
            page = begin(
                "dashboard", "--no-browser", "--port", "0", "--target-rounds", "60", command="dashboard"
            )
            first = begin("worker-1", *FLAGS, "--start-workers", "3")
            _until(lambda: (first.folder / "manifest.json").exists(), "the run begins")
            second, third = begin("worker-2", *FLAGS), begin("worker-3", *FLAGS)
            _until(lambda: _rounds(third) >= 4, "three workers train")
            late = begin("worker-4", *FLAGS)
            _until(lambda: _rounds(late) >= 3, "the latecomer trains")
            _control(base, "pause", "worker-3")
            second.kill()
            done = _rounds(first)
            _until(lambda: _rounds(first) >= done + 4, "the others train on")
            browser.get(page.log.read_text().partition("Dashboard: ")[2].split()[0])
            _take(browser)
        finally:
            stop_all(processes)
    return 0


def _rounds(worker: DemoProcess) -> int:
    path = worker.folder / "metrics.jsonl"
    return sum(event["event"] == "round" for event in read_metrics(path)) if path.exists() else 0


def _control(base: Path, *command: str) -> None:
    env = {**os.environ, "DTRAIN_RUNTIME_DIR": str(base / "runtime")}
    action, name = command
    subprocess.run(
        [sys.executable, "-m", "dtrain.trainer.cli", action, "--name", name], env=env, check=True, timeout=60
    )


def _until(look: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not look():
        if time.monotonic() > until:
            raise SystemExit(f"gave up: {what}")
        time.sleep(0.3)


@contextmanager
def _browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def _take(browser: Any) -> None:
    """One picture for each look, once the page shows what has happened."""
    text = "return document.body.innerText"
    for word in ("paused", "gone", "worker-4"):
        _until(lambda w=word: w in browser.execute_script(text), f"the page shows {word!r}")
    for name, (width, height) in SIZES.items():
        scheme = {"name": "prefers-color-scheme", "value": "dark" if name == "dark" else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for tall in (900, height or None):
            size = {"width": width, "height": tall or _height(browser), "deviceScaleFactor": 1}
            size["mobile"] = name == "phone"
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            time.sleep(1.5)  # the charts fit themselves to their new place
        path = PLACE / f"dashboard-{name}.png"
        browser.save_screenshot(str(path))
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _height(browser: Any) -> int:
    return int(browser.execute_script("return document.documentElement.scrollHeight"))


if __name__ == "__main__":
    sys.exit(main())
