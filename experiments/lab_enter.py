"""The lab's own corner of the machine: namespaces of mounts, networks and processes that vanish with it.

When the first process in a namespace of processes ends, the kernel ends all others, and with the last of them go the
network namespaces, devices and mounts. So nothing is left behind, whether a scenario ends, fails, is interrupted or is
killed. Root is not needed where the kernel lets users have namespaces of their own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SCRATCH = Path("/run/dtrain")
"""For the temporary files of everything inside; on a file system of the corner's own."""
LEAVE_S = 60.0
"""How long a scenario may take to end its workers and to say what there was."""


def unshare_command() -> list[str] | None:
    """What runs a command in a corner of its own; None if this machine allows none."""
    if sys.platform != "linux" or any(shutil.which(tool) is None for tool in ("unshare", "ip", "nft")):
        return None
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    tried = subprocess.run([*command, "test", "-w", "/dev/net/tun"], capture_output=True)
    return command if tried.returncode == 0 else None


def run_inside(unshare: Sequence[str], module: str, arguments: Sequence[str]) -> int:
    """Run a module of ours in such a corner; its exit code. Ctrl-C and SIGTERM reach it as one Ctrl-C."""
    process = subprocess.Popen(
        [*unshare, sys.executable, "-m", module, *arguments],
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGINT)
    try:
        return process.wait(LEAVE_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):  # asked again, or asked before it could listen
        process.kill()
        process.wait()
        return 130


def _die_with_parent() -> None:
    """In the child: SIGKILL when whoever started us is gone; `--kill-child` hands it on to all inside."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def settle_in() -> None:
    """Inside: a /run of our own, for `ip netns` and for scratch."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
    Path("/run/netns").mkdir()
    SCRATCH.mkdir()
    os.environ["TMPDIR"] = str(SCRATCH)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def reap(own: Sequence[subprocess.Popen[bytes]]) -> None:
    """Inside we are process 1: whoever has lost its parent is ours to bury. `own` are buried by who started them."""
    for process in own:
        process.poll()
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or any(process.pid == ended.si_pid for process in own):
            return
        os.waitpid(ended.si_pid, os.WNOHANG)
