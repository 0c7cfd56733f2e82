"""A machine that has moved or slept is noticed; one that has not is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from dtrain.dht.roaming import JUMP_S, PATIENCE, MachineWatch, own_addresses, source_address

WIFI, OTHER_WIFI, CABLE, BRIDGE = "192.168.1.5", "10.0.0.7", "192.168.2.9", "172.17.0.1"


@dataclass
class Machine:
    """What the watch sees: its addresses, the one that leads out (or ""), and how far the clocks are apart."""

    addresses: set[str]
    way_out: str = ""
    clock: float = 0.0
    host: str = "0.0.0.0"
    watch: MachineWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = MachineWatch(
            self.host,
            ["20.0.0.1"],
            addresses=lambda: self.addresses | {"127.0.0.1"},
            route=lambda target: self.way_out,
            clock=lambda: self.clock,
        )

    def now(self, addresses: set[str], way_out: str = "") -> str:
        self.addresses, self.way_out = addresses, way_out
        return self.watch.look()


def test_another_network_is_noticed_once() -> None:
    """The user reads from where to where; then the machine is at home there."""
    machine = Machine({WIFI}, WIFI)
    assert machine.watch.look() == ""
    reason = machine.now({OTHER_WIFI}, OTHER_WIFI)
    assert reason == f"this machine's address changed from {WIFI} to {OTHER_WIFI}"
    assert machine.watch.look() == ""


def test_only_the_addresses_in_use_matter() -> None:
    """A bridge of some virtual machine comes and goes, and a cable is plugged in beside the Wi-Fi: nothing is lost."""
    machine = Machine({WIFI, BRIDGE}, WIFI)
    assert machine.now({WIFI}, WIFI) == ""
    assert machine.now({WIFI, BRIDGE}, WIFI) == ""
    assert machine.now({WIFI, CABLE}, CABLE) == ""  # the old connections are still good
    assert machine.now({CABLE}, CABLE) == f"this machine's address changed from {WIFI} to {CABLE}"


def test_between_two_networks_it_waits() -> None:
    """While there is no way out nothing is renewed: there would be nobody to connect to."""
    machine = Machine({WIFI, BRIDGE}, WIFI)
    assert machine.now({BRIDGE}) == ""
    assert machine.now({BRIDGE, OTHER_WIFI}, OTHER_WIFI).endswith(f"to {OTHER_WIFI}")
    machine = Machine({WIFI}, WIFI)
    assert [machine.now(set()) for _ in range(PATIENCE + 5)] == [""] * (PATIENCE + 5)
    assert machine.now({WIFI}, WIFI) == ""  # back where it was: connections have survived
    machine = Machine({WIFI}, WIFI)
    looks = [machine.now({CABLE}) for _ in range(PATIENCE + 1)]
    assert looks[:-1] == [""] * PATIENCE and looks[-1].endswith(
        f"to {CABLE}"
    )  # a network that leads nowhere else


def test_a_machine_without_its_network_is_offline() -> None:
    """One that never had a network is not: it can only be alone."""
    machine = Machine({WIFI}, WIFI)
    assert not machine.watch.is_offline()
    machine.addresses = set()
    assert machine.watch.is_offline()
    assert not Machine(set()).watch.is_offline()
    local = Machine({WIFI}, WIFI, host="127.0.0.1")
    local.addresses = set()
    assert not local.watch.is_offline()


def test_a_network_that_comes_late_is_noticed() -> None:
    """A machine that began without a network connects when there is one."""
    machine = Machine(set())
    assert machine.watch.look() == ""
    assert machine.now({WIFI}, WIFI).endswith(f"to {WIFI}")
    machine = Machine({BRIDGE})
    assert machine.now({BRIDGE, WIFI}, WIFI).endswith(f"to {WIFI}")


@pytest.mark.parametrize("host", ["127.0.0.1", WIFI])
def test_a_given_address_is_the_only_one_that_counts(host: str) -> None:
    """Who listens at one address has not moved when others come and go."""
    machine = Machine({WIFI, CABLE}, CABLE, host=host)
    assert machine.now({WIFI}, WIFI) == ""
    assert machine.now({WIFI, OTHER_WIFI}, OTHER_WIFI) == ""


@pytest.mark.parametrize("jump", [JUMP_S + 1, 3600.0, -JUMP_S - 1])
def test_sleep_is_noticed_once(jump: float) -> None:
    """The wall's clock has gone on while the machine's stood still (or was set)."""
    machine = Machine({WIFI}, WIFI)
    machine.clock += jump
    assert "asleep" in machine.watch.look()
    assert machine.watch.look() == ""
    machine.clock += JUMP_S - 1  # slewed by a time server
    assert machine.watch.look() == ""


def test_the_real_machine_is_seen() -> None:
    """Its own addresses are IPv4, loopback among them, which is the way to itself; it does not move by itself."""
    assert "127.0.0.1" in own_addresses()
    assert source_address("127.0.0.1") == "127.0.0.1"
    assert source_address("255.255.255.255") == ""  # no way there without the permission to broadcast
    assert MachineWatch("0.0.0.0", []).look() == ""
