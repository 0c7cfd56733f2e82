"""Where a scenario's workers live: each on a host of its own, on connections that are shaped and can be cut."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dtrain.experiments.lab_config import Place
from dtrain.experiments.lab_switch import Switch
from dtrain.experiments.lab_wire import HomeLink
from dtrain.experiments.netns import Internet

PORT = 31000
BOOTSTRAP = "bootstrap"
SKEWED = '''"""Puts the clock of this process ahead: the lab's, for one worker."""

import os
import sys
import time

_now, _ahead_s = time.time, float(os.environ["DTRAIN_LAB_SKEW_S"])


def _time():
    asker = sys._getframe(1).f_globals.get("__name__", "")
    return _now() + (0.0 if asker.startswith("grpc") else _ahead_s)  # whose other half, in C, reads the clock itself


time.time = _time
'''


class Places(Protocol):
    """All hosts of a scenario."""

    not_modelled: str
    """What these places leave out of a scenario, in one line, or ""."""
    cannot: tuple[str, ...]
    """Kinds of events that cannot happen here."""

    def started(self, name: str, pid: int) -> None:
        """A worker has this process now."""

    def command(self, name: str) -> list[str]:
        """What runs a command on that host; the command follows."""

    def flags(self, name: str) -> list[str]:
        """Where a worker on that host listens."""

    def cut(self, name: str, is_cut: bool) -> None: ...

    def partition(self, sides: Sequence[Sequence[str]]) -> None:
        """No sides: healed."""

    def move(self, name: str) -> None:
        """The host gets another address."""

    def counts(self) -> dict[str, dict[str, int]]:
        """See `Wire`."""

    def close(self) -> None: ...


class NamespacePlaces:
    """A network namespace for each host, joined by the switch."""

    not_modelled = ""
    cannot: tuple[str, ...] = ()

    def started(self, name: str, pid: int) -> None:
        """See Places: its namespace says who it is."""

    def __init__(self, places: dict[str, Place], seed: int):
        self._switch = Switch(seed)
        self._internet = Internet("lab", self._switch)
        self._addresses: dict[str, str] = {}
        self._namespaces: dict[str, str] = {}
        self._on_the_wire: dict[str, str] = {}  # a worker -> the switch's name for its line
        self._moves = 0
        for number, (name, place) in enumerate(places.items(), 1):
            self._settle(number, name, place)

    def _settle(self, number: int, name: str, place: Place) -> None:
        if place.nat:
            network = "192.168.1"  # the same in all homes, as in life
            self._namespaces[name] = self._internet.home(name, f"20.0.{number}.1", network, place.link)
            self._on_the_wire[name] = f"{name}-router"
            return
        self._addresses[name] = f"20.0.0.{number}"
        self._namespaces[name] = self._internet.host(name, self._addresses[name], place.link)
        self._on_the_wire[name] = name

    def command(self, name: str) -> list[str]:
        """See Places."""
        return ["ip", "netns", "exec", self._namespaces[name]]

    def flags(self, name: str) -> list[str]:
        """See Places."""
        return ["--host", "0.0.0.0", "--port", str(PORT)]

    def cut(self, name: str, is_cut: bool) -> None:
        """See Places."""
        self._switch.cut(self._on_the_wire[name], is_cut)

    def partition(self, sides: Sequence[Sequence[str]]) -> None:
        """See Places."""
        self._switch.partition([[self._on_the_wire[name] for name in side] for side in sides])

    def move(self, name: str) -> None:
        """See Places."""
        self._moves += 1
        old, new = self._addresses[name], f"20.0.200.{self._moves}"
        self._internet.move(self._namespaces[name], "wan", f"{old}/8", f"{new}/8")
        self._addresses[name] = new

    def counts(self) -> dict[str, dict[str, int]]:
        """See Places."""
        counts = self._switch.counts()
        return {name: counts[line] for name, line in self._on_the_wire.items()}

    def close(self) -> None:
        self._internet.close()
        self._switch.close()


class Disk:
    """A worker's folder on a small file system of its own, which can be filled; for inside the lab's corner."""

    def __init__(self, folder: Path, megabytes: float):
        self.folder, self._ballast = folder, folder / "ballast"
        folder.mkdir(parents=True, exist_ok=True)
        size = f"size={int(megabytes * 1e6)}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)

    def fill(self) -> None:
        """Leave no byte free."""
        with open(self._ballast, "ab", buffering=0) as file:
            try:
                while file.write(bytes(65536)):
                    pass
            except OSError:
                pass

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def keep(self) -> None:
        """Move what is on it to the folder below, which outlives the lab's corner."""
        self.free()
        kept = self.folder.with_name(f"{self.folder.name}.kept")
        shutil.copytree(self.folder, kept, ignore=shutil.ignore_patterns("*.sock", "control*"))
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        self.folder.rmdir()
        kept.rename(self.folder)


def skew_environment(scratch: Path, skew_s: float) -> dict[str, str]:
    """Environment variables with which a Python process's clock is `skew_s` ahead. The p2p daemon's is not."""
    if not skew_s:
        return {}
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "sitecustomize.py").write_text(SKEWED)
    return {"PYTHONPATH": str(scratch), "DTRAIN_LAB_SKEW_S": str(skew_s)}


def default_link(place: Place | None) -> HomeLink:
    """A connection that shapes nothing, where there is no place."""
    return HomeLink() if place is None else place.link
