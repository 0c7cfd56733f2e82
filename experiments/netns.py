"""A small internet of network namespaces: public hosts, and homes behind masquerading routers. Needs root (or a user
namespace in which we are root).

Addresses look public (20.0.0.0/8), as libp2p treats only such as public, and exist nowhere but inside the namespaces
that are made here and removed again. The wire between the hosts is a bridge, or a switch that shapes (`lab_switch`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from dtrain.experiments.lab_switch import MTU_BYTES, Switch
from dtrain.experiments.lab_wire import HomeLink

PREFIX = "dtrain"  # of the namespaces, before the process id of who made them
MASQUERADE = """
table ip home {
  chain out { type nat hook postrouting priority 100; oifname "wan" masquerade; }
  chain through { type filter hook forward priority 0; iifname "wan" ct state new drop; }
}
"""


def missing() -> str:
    """What this machine lacks for namespaces, or ""."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return f"needs {' and '.join(lacking)}" if lacking else ""


def run(*command: str, text: str | None = None) -> str:
    """Run a command to its end; its output. OSError with what it said if it failed."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Internet:
    """Namespaces on one wire. Their names begin with `prefix`; `backbone` is the one that holds the wire."""

    def __init__(self, prefix: str, switch: Switch | None = None):
        self.prefix, self._switch = prefix, switch
        self._names: list[str] = []
        if switch is None:
            self.backbone = self._namespace("backbone")
            self._in(self.backbone, "link", "add", "wire", "type", "bridge")
            self._in(self.backbone, "link", "set", "wire", "up")

    def host(self, name: str, address: str, link: HomeLink | None = None) -> str:
        """A host with a public `address` (such as 20.0.0.1); returns its namespace. `link` is for the switch, which
        knows the host by its name here."""
        namespace = self._namespace(name)
        if self._switch is None:
            self._plug(namespace, "wan")
        else:
            self._switch.plug(namespace, name, "wan", address, link or HomeLink())
            self._in(namespace, "link", "set", "wan", "mtu", str(MTU_BYTES), "up")
        self._in(namespace, "addr", "add", f"{address}/8", "dev", "wan")
        return namespace

    def home(self, name: str, address: str, network: str, link: HomeLink | None = None) -> str:
        """A host behind a router that masquerades as public `address`; `network` (such as 192.168.1) is its home's. On
        the switch it is the router, NAME-router, that has the link."""
        router, namespace = self.host(f"{name}-router", address, link), self._namespace(name)
        self._cable(router, "lan", namespace, "lan")
        self._in(router, "addr", "add", f"{network}.1/24", "dev", "lan")
        self._in(namespace, "addr", "add", f"{network}.2/24", "dev", "lan")
        self._in(namespace, "route", "add", "default", "via", f"{network}.1")
        self.inside(router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.inside(router, "nft", "-f", "-", text=MASQUERADE)
        return namespace

    def inside(self, namespace: str, *command: str, text: str | None = None) -> str:
        """Run a command inside a namespace."""
        return run("ip", "netns", "exec", namespace, *command, text=text)

    def forward(self, home: str, port: int, network: str) -> None:
        """The router of `home` (its namespace) passes a TCP port on to it, as its owner may have told it to."""
        rules = f"""
        table ip forwarded {{
          chain in {{ type nat hook prerouting priority -100; iifname "wan" tcp dport {port} dnat to {network}.2; }}
        }}
        insert rule ip home through iifname "wan" tcp dport {port} accept
        """
        self.inside(f"{home}-router", "nft", "-f", "-", text=rules)

    def move(self, namespace: str, device: str, old: str, new: str) -> None:
        """A host's address changes, as on another Wi-Fi. Both with their prefix length; the default route stays."""
        routes = [line for line in self._in(namespace, "route").splitlines() if line.startswith("default")]
        self._in(namespace, "addr", "del", old, "dev", device)
        self._in(namespace, "addr", "add", new, "dev", device)
        for route in routes:
            self._in(namespace, "route", "replace", *route.split())

    def close(self) -> None:
        """Remove every namespace; what is plugged in them goes with them."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _namespace(self, name: str) -> str:
        namespace = f"{self.prefix}-{name}"
        run("ip", "netns", "add", namespace)
        self._names.append(namespace)
        self._in(namespace, "link", "set", "lo", "up")
        return namespace

    def _plug(self, namespace: str, device: str) -> None:
        """A cable from `device` to the wire."""
        far = f"p{len(self._names)}"
        self._cable(namespace, device, self.backbone, far)
        self._in(self.backbone, "link", "set", far, "master", "wire")

    def _cable(self, one: str, device: str, other: str, far: str) -> None:
        self._in(one, "link", "add", device, "type", "veth", "peer", "name", far, "netns", other)
        self._in(one, "link", "set", device, "up")
        self._in(other, "link", "set", far, "up")

    @staticmethod
    def _in(namespace: str, *command: str) -> str:
        return run("ip", "-n", namespace, *command)


@contextmanager
def internet() -> Iterator[Internet]:
    """Namespaces that are gone at the end, whatever happened; a terminated test run cleans up as an interrupted one."""
    sweep_left_overs()
    made = Internet(f"{PREFIX}{os.getpid()}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield made
    finally:
        made.close()
        signal.signal(signal.SIGTERM, before)


def sweep_left_overs() -> None:
    """End what a test run has left behind that was killed."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split(" ")[0]
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdecimal() and not psutil.pid_exists(int(owner)):
            for pid in run("ip", "netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", name)
