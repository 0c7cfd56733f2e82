"""Can this machine take part? One check a line, each with what to do about it. Nothing is downloaded or joined.

The checks take what was measured; measuring is done in `trainer/cli_doctor.py` and below.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

OK, WARN, FAIL = "ok", "warn", "fail"
MIN_PYTHON, MAX_PYTHON = (3, 10), (3, 14)
MIN_DISK_GB, GOOD_DISK_GB = 1.0, 5.0
MIN_MEMORY_GB, GOOD_MEMORY_GB = 1.5, 4.0
MAX_SKEW_S, GOOD_SKEW_S = 86_400.0, 1.0  # up to the first a worker goes by the others' clocks
SLOW_MBPS = 1.0
SPEED_S = 3.0
HUB_PACKAGES = ("datasets", "tokenizers", "transformers", "peft")


@dataclass(frozen=True)
class Check:
    """One line of the report. `fix` says what to do; "" where there is nothing to do."""

    check: str
    status: str
    detail: str
    fix: str = ""


def python_version(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """dtrain and its libraries exist for these."""
    text = ".".join(map(str, version))
    if MIN_PYTHON <= version <= MAX_PYTHON:
        return Check("python", OK, text)
    return Check("python", FAIL, text, "install Python 3.10 to 3.14 and set dtrain up with it")


def packages(requires: list[str] | None = None) -> Check:
    """What dtrain needs is installed, in versions that it can work with."""
    from packaging.requirements import Requirement

    wrong = []
    for line in importlib.metadata.requires("dtrain") or [] if requires is None else requires:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            has = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((f"{needed.name} is missing", needed))
            continue
        if not needed.specifier.contains(has, prereleases=True):
            wrong.append((f"{needed.name} {has}, but {needed.specifier} is needed", needed))
    if not wrong:
        return Check("packages", OK, "all as dtrain needs them")
    fix = " ".join(f"'{needed.name}{needed.specifier}'" for _, needed in wrong)
    return Check(
        "packages", FAIL, "; ".join(text for text, _ in wrong), f"{sys.executable} -m pip install {fix}"
    )


def disk(folder: Path) -> Check:
    """There is room for checkpoints where they go."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    detail = f"{free_gb:.1f} GB free in {there}"
    fix = "free some space, or type --folder with a folder on another disk"
    status = FAIL if free_gb < MIN_DISK_GB else WARN if free_gb < GOOD_DISK_GB else OK
    return Check("disk", status, detail, "" if status == OK else fix)


def memory() -> Check:
    """There is memory for the libraries and a small model."""
    free_gb = psutil.virtual_memory().available / 1e9
    status = FAIL if free_gb < MIN_MEMORY_GB else WARN if free_gb < GOOD_MEMORY_GB else OK
    fix = "close other programs; a small run needs about 2 GB, a larger one says how much before it begins"
    return Check("memory", status, f"{free_gb:.1f} GB free", "" if status == OK else fix)


def port(host: str, number: int) -> Check:
    """The worker could listen there."""
    where = f"port {number}" if number else "any free port"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            return Check(
                "port", FAIL, f"{where}: {error.strerror}", "type another --port, or none for any free one"
            )
    return Check("port", OK, f"{where} can be listened on")


def accelerator(seconds: float = SPEED_S) -> Check:
    """torch works, on what, and how fast it multiplies matrices."""
    import torch

    from dtrain.trainer.settings import resolve_device

    device = resolve_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    side = 512 if device.type == "cpu" else 4096
    a = torch.randn(side, side, device=device)
    count, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        float((a @ a)[0, 0])
        count += 1
    gflops = 2 * side**3 * count / passed / 1e9
    detail = f"torch {torch.__version__} on {name}: {gflops:,.0f} GFLOP/s"
    if device.type != "cpu":
        return Check("accelerator", OK, detail)
    return Check("accelerator", WARN, detail, _gpu_fix())


def training() -> Check:
    """What a worker chooses here where its flags leave it open, and whether it can read the hub's data and models."""
    from dtrain.trainer.compute import CPU_TOKENS, choose_precision
    from dtrain.trainer.settings import resolve_device

    device = resolve_device("auto")
    passes = f"passes of {CPU_TOKENS:,} tokens" if device.type == "cpu" else "passes halved until they fit"
    compiled = "compiled" if device.type == "cuda" else "not compiled"
    detail = f"on {device.type} in {choose_precision('auto', device)}, {passes}, {compiled}"
    lacking = [name for name in HUB_PACKAGES if importlib.util.find_spec(name) is None]
    if not lacking:
        return Check("training", OK, f"{detail}; data and models of the hub can be used")
    fix = "for runs with data or models of the Hugging Face hub: pip install 'dtrain[hf]'"
    return Check("training", WARN, f"{detail}; without {', '.join(lacking)}", fix)


def _gpu_fix() -> str:
    if shutil.which("nvidia-smi"):
        return "an NVIDIA GPU seems to be here, but this torch has no CUDA: install torch from its CUDA index"
    return "a GPU trains many times faster, but is not needed: small runs welcome CPUs"


# ---------------------------------------------------------------------- with an invite


def bootstrap(answers: dict[str, str]) -> Check:
    """`answers` maps each address of the invite to "" or why it cannot be reached."""
    good = [address for address, problem in answers.items() if not problem]
    detail = f"{len(good)} of {len(answers)} addresses of the invite answer"
    if good:
        return Check("bootstrap", OK, detail)
    said = "; ".join(sorted(set(answers.values())))
    if any("refused" in problem for problem in answers.values()):
        fix = "the worker that made the invite has ended or moved: ask for a fresh invite"
    else:
        fix = "if other internet pages open, ask for a fresh invite; else a firewall blocks outgoing TCP: allow it"
    return Check("bootstrap", FAIL, f"{detail} ({said})", fix)


def clock(skew_s: float | None) -> Check:
    """Our clock against a peer's."""
    fix = "set the clock by the network: timedatectl set-ntp true (Linux), or in the system's settings"
    if skew_s is None:
        return Check("clock", WARN, "no peer said what time it is", "")
    detail = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the peers'"
    status = FAIL if abs(skew_s) > MAX_SKEW_S else WARN if abs(skew_s) > GOOD_SKEW_S else OK
    return Check("clock", status, detail, "" if status == OK else fix)


def reach(verdict: str, listening: int) -> Check:
    """How others reach this machine, by having them try."""
    if verdict == "direct":
        return Check("reachability", OK, "direct: others can dial this machine")
    detail = (
        "relayed: others reach this machine through a peer"
        if verdict == "relayed"
        else ("client: nobody can dial this machine; it takes part by dialling others")
    )
    where = f"TCP port {listening}" if listening else "a TCP port, and type it as --port"
    return Check(
        "reachability", WARN, detail, f"to be a full peer, have your router forward {where} to this machine"
    )


def bandwidth(up_mbps: float, down_mbps: float) -> Check:
    """To the peer that the invite names."""
    detail = f"{up_mbps:.1f} Mbit/s up, {down_mbps:.1f} Mbit/s down to a peer of the run"
    if min(up_mbps, down_mbps) >= SLOW_MBPS:
        return Check("bandwidth", OK, detail)
    return Check(
        "bandwidth", WARN, detail, "rounds will wait for this link: use a cable, or pause other transfers"
    )


def run_settings(found: list[str], wanted: str) -> Check:
    """Whether the run of the invite is there: hashes of the manifests that peers publish, against the invite's."""
    if wanted in found:
        return Check("run", OK, f"its settings {wanted[:8]} are as the invite says")
    if found:
        return Check("run", FAIL, "another run has this name there", "ask the organizer for a fresh invite")
    return Check("run", FAIL, "the peers know no such run", "ask the organizer for a fresh invite")
