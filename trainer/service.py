"""A command of ours as a service of the user's own: begun at login, begun again when it fails.

Linux has systemd's user units (systemd.service(5)), macOS has launchd's agents (launchd.plist(5)).
"""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dtrain.trainer.errors import RunError, UsageError

PREFIX = "dtrain-"
RESTART_S = 60  # until one that failed is begun again: its network may not be up yet
STOP_S = 60  # to leave a round in peace


@dataclass(frozen=True)
class Service:
    """What is to run."""

    name: str
    """As `manifest.validate_run_id` allows."""
    command: Sequence[str]
    folder: Path
    """Where it runs: dtrain-runs is below."""
    environment: Mapping[str, str] = field(default_factory=dict)


class Manager(Protocol):
    """What looks after services on this kind of machine."""

    def file(self, name: str) -> Path: ...

    def names(self) -> list[str]:
        """Services of ours that are installed."""

    def install(self, service: Service) -> str:
        """Write the service's file and begin it; returns what else the user may want to know. RunError if it fails."""

    def uninstall(self, name: str) -> None:
        """End the service and remove its file."""

    def state(self, name: str) -> str:
        """How it is, in one line."""


def manager() -> Manager:
    """This machine's. UsageError where there is none."""
    if sys.platform == "darwin":
        return Launchd()
    if shutil.which("systemctl") is None:
        raise UsageError(
            "this machine has no systemd to look after a service: have what you use instead run the same command "
            "with --yes, or use the Dockerfile"
        )
    return Systemd()


class Systemd:
    """User units, driven by `systemctl --user`."""

    def __init__(self) -> None:
        base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
        self._folder = Path(base) / "systemd" / "user"

    def file(self, name: str) -> Path:
        """See Manager."""
        return self._folder / f"{PREFIX}{name}.service"

    def names(self) -> list[str]:
        """See Manager."""
        return _names(self._folder, ".service")

    def install(self, service: Service) -> str:
        """See Manager."""
        path = self.file(service.name)
        _write(path, systemd_unit(service).encode())
        try:
            self._call("daemon-reload")
        except RunError:
            path.unlink()  # this user has no systemd, whatever the machine has
            raise
        self._call("enable", path.name)
        self._call("restart", path.name)  # begins it, or begins it anew with what is typed now
        return (
            f"Its lines: journalctl --user -u {path.name} -f. It ends when you log out, unless you type once: "
            "loginctl enable-linger"
        )

    def uninstall(self, name: str) -> None:
        """See Manager."""
        path = self.file(name)
        self._call("disable", "--now", path.name)
        path.unlink()
        self._call("daemon-reload")

    def state(self, name: str) -> str:
        """See Manager."""
        wanted = ("ActiveState", "SubState", "UnitFileState", "NRestarts")
        shown = self._call("show", self.file(name).name, f"--property={','.join(wanted)}")
        found = dict(line.partition("=")[::2] for line in shown.splitlines())
        at_login = "at login" if found.get("UnitFileState") == "enabled" else "not at login"
        now = f"{found.get('ActiveState')} ({found.get('SubState')})"
        return f"{now}, begins {at_login}, begun again {found.get('NRestarts', '0')} times"

    @staticmethod
    def _call(*arguments: str) -> str:
        return _call("systemctl", "--user", *arguments)


def systemd_unit(service: Service) -> str:
    """The text of the unit's file."""
    environment = "".join(
        f"Environment={_quoted(f'{name}={value}')}\n" for name, value in sorted(service.environment.items())
    )
    return f"""\
[Unit]
Description=dtrain: {service.name}
StartLimitIntervalSec=0

[Service]
ExecStart={" ".join(_quoted(word.replace("$", "$$")) for word in service.command)}
WorkingDirectory={str(service.folder).replace("%", "%%")}
{environment}Restart=on-failure
RestartSec={RESTART_S}
TimeoutStopSec={STOP_S}
KillMode=mixed
Nice=10

[Install]
WantedBy=default.target
"""


def _quoted(word: str) -> str:
    """A word as systemd.syntax(7) reads it; "%" would begin one of its specifiers."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("%", "%%")
    return f'"{escaped}"'


class Launchd:
    """Agents, driven by `launchctl`."""

    def __init__(self) -> None:
        self._folder = Path.home() / "Library" / "LaunchAgents"
        self._domain = f"gui/{os.getuid()}"

    def file(self, name: str) -> Path:
        """See Manager."""
        return self._folder / f"{PREFIX}{name}.plist"

    def names(self) -> list[str]:
        """See Manager."""
        return _names(self._folder, ".plist")

    def install(self, service: Service) -> str:
        """See Manager."""
        path = self.file(service.name)
        if path.exists():
            self.uninstall(service.name)
        _write(path, launchd_plist(service))
        _call("launchctl", "bootstrap", self._domain, str(path))
        return f"Its lines: tail -f {log_file(service)}"

    def uninstall(self, name: str) -> None:
        """See Manager."""
        try:
            _call("launchctl", "bootout", f"{self._domain}/{PREFIX}{name}")
        except RunError:
            pass  # it was not loaded
        self.file(name).unlink()

    def state(self, name: str) -> str:
        """See Manager."""
        try:
            shown = _call("launchctl", "print", f"{self._domain}/{PREFIX}{name}")
        except RunError:
            return "not running, begins at login"
        found = re.search(r"^\s*state = (.+)$", shown, re.MULTILINE)
        return f"{found[1] if found else 'loaded'}, begins at login"


def launchd_plist(service: Service) -> bytes:
    """The bytes of the agent's file."""
    return plistlib.dumps(
        {
            "Label": f"{PREFIX}{service.name}",
            "ProgramArguments": list(service.command),
            "WorkingDirectory": str(service.folder),
            "EnvironmentVariables": dict(service.environment),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},  # one that ended well had its reason
            "ThrottleInterval": RESTART_S,
            "ExitTimeOut": STOP_S,
            "ProcessType": "Background",
            "StandardOutPath": str(log_file(service)),
            "StandardErrorPath": str(log_file(service)),
        }
    )


def log_file(service: Service) -> Path:
    """Where launchd, which has no journal, puts a service's lines."""
    return service.folder / f"{PREFIX}{service.name}.log"


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name[len(PREFIX) : -len(suffix)] for path in folder.glob(f"{PREFIX}*{suffix}"))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)  # an invite may carry an admission token
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _call(*command: str) -> str:
    """What a command prints. RunError with its own words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[:300] or f"exit code {done.returncode}"
        raise RunError(f"{' '.join(command[:3])} failed: {words}")
    return done.stdout
