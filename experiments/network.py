"""The network model: home connections by name, and how long a round's transfers take over them.

The simulator's virtual clock and `dtrain plan` both go by it. All transfers of a phase (sections to their reducers,
then aggregates to all) go on together and share their ends' links evenly, so a transfer from i to j takes

    the longest of: all that i sends / i's uplink, all that j receives / j's downlink, its own bytes / what TCP gives
    + half a round trip + the round trips in which TCP's window grows to the link's speed
    + two round trips (RFC 8985's tail loss probe) as often as the unluckiest transfer's last packet is lost

TCP's rate under loss is that of Mathis et al. (1997), 1.22 MSS / (RTT sqrt(loss)); real CUBIC and BBR do better. A
round trip between two peers is the mean of theirs; a connection's figure is the round trip to another of its kind.
The constants are fitted to the WAN lab's exchanges: see experiments/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.experiments.memory_links import Floats
from dtrain.trainer.errors import UsageError

MSS_BYTES = 1460
INITIAL_WINDOW_BYTES = 10 * MSS_BYTES
WIRE_OVERHEAD = 1.06
"""Bytes on the wire per byte of payload: TCP, IP and Ethernet headers, libp2p's encryption and framing."""
MESSAGE_BYTES = 2500
"""What goes with each payload or aggregate besides: signatures, seals, receipts, what members say of each other."""
MEET_RTTS = 1.0
"""Round trips for a group to form once its last member is there: it asks the leader, who says who is in."""
MEET_S = 0.1
"""What forming a group and checking what comes take besides, mostly signatures and scheduling."""
PROBE_RTTS = 2.0
"""Round trips until a lost packet that nothing follows is sent again."""
MOST_PROBES = 20
"""So often in a row at most is a packet counted as lost."""
CODEC_NS_PER_PARAM = 5.0
"""Encoding, reducing, decoding, outer step and digest of one round, on one core."""


@dataclass(frozen=True)
class Link:
    """One worker's connection to the internet."""

    up_mbps: float
    """Megabits per second from the worker."""
    down_mbps: float
    """Megabits per second to the worker."""
    rtt_ms: float
    """Round trip to another worker with such a connection, in milliseconds."""
    loss: float = 0.0
    """Share of packets that are lost on such a path."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("up_mbps", 1e-3, 1e6),
            ("down_mbps", 1e-3, 1e6),
            ("rtt_ms", 0.0, 1e4),
            ("loss", 0.0, 0.5),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise UsageError(f"network.{name} must be a number from {least:g} to {most:g}, not {value!r}")


PROFILES: dict[str, tuple[Link, ...]] = {
    "datacenter": (Link(10_000, 10_000, 1),),
    "fibre": (Link(300, 300, 20, 1e-5),),
    "cable": (Link(20, 200, 40, 1e-4),),
    "dsl": (Link(5, 25, 60, 5e-4),),
    "mobile": (Link(8, 30, 100, 5e-3),),
}
"""Connections by name. Several are dealt out to the workers in turn."""
PROFILES["mixed"] = tuple(PROFILES[name][0] for name in ("cable", "fibre", "dsl", "mobile"))


def profile_links(name: str, overrides: dict[str, float] | None = None) -> tuple[Link, ...]:
    """The connections of a profile, with some figures replaced. UsageError lists the choices."""
    if name not in PROFILES:
        raise UsageError(f"there is no network.profile {name!r}: choose one of {', '.join(PROFILES)}")
    return tuple(dataclasses.replace(link, **(overrides or {})) for link in PROFILES[name])


class ModelledLinks:
    """See `Links`: times by the model above. Every worker is added before it takes part."""

    def __init__(self, num_params: int) -> None:
        self._codec_s = num_params * CODEC_NS_PER_PARAM * 1e-9
        self._links: dict[str, Link] = {}

    def add(self, name: str, link: Link) -> None:
        """A worker and its connection."""
        self._links[name] = link

    def codec_s(self, name: str) -> float:
        """See `Links`."""
        return self._codec_s

    def meet_s(self, names: Sequence[str]) -> float:
        """See `Links`. The farthest member sets the pace, with one message each way for all but the leader."""
        if len(names) < 2:
            return 0.0
        links = [self._links[name] for name in names]
        rtt_s = max(link.rtt_ms for link in links) / 1e3
        again = _sent_again(np.full(2 * (len(links) - 1), max(link.loss for link in links)))
        return MEET_S + (MEET_RTTS + PROBE_RTTS * again) * rtt_s

    def arrivals_s(self, names: Sequence[str], num_bytes: Floats, begin_s: Floats) -> Floats:
        """See `Links`."""
        links = [self._links[name] for name in names]
        return arrivals_s(links, num_bytes, begin_s)

    def transfer_s(self, donor: str, receiver: str, num_bytes: int) -> float:
        """See `Links`."""
        sent = np.zeros((2, 2))
        sent[0, 1] = num_bytes
        links = [self._links[donor], self._links[receiver]]
        request_s = (links[0].rtt_ms + links[1].rtt_ms) / 2e3
        return request_s + float(arrivals_s(links, sent, np.zeros(2))[0, 1])


def arrivals_s(links: Sequence[Link], num_bytes: Floats, begin_s: Floats) -> Floats:
    """When transfers end, seconds, [senders, receivers]; 0 where nothing is sent. See the top of this file."""
    up = np.array([link.up_mbps for link in links]) * 1e6 / 8  # [N] bytes/s
    down = np.array([link.down_mbps for link in links]) * 1e6 / 8
    rtt = np.array([link.rtt_ms for link in links]) / 1e3
    loss = np.array([link.loss for link in links])
    rtt_s = np.add.outer(rtt, rtt) / 2  # [N, N]
    lost = np.add.outer(loss, loss) / 2
    sent = num_bytes > 0
    wire = WIRE_OVERHEAD * (num_bytes + MESSAGE_BYTES * sent)
    with np.errstate(divide="ignore", invalid="ignore"):
        tcp = np.where(lost * rtt_s > 0, 1.22 * MSS_BYTES / (rtt_s * np.sqrt(lost)), np.inf)
    narrow = np.minimum.outer(up, down)
    window = np.minimum(wire, np.minimum(narrow, tcp) * rtt_s)
    ramp_s = rtt_s * np.maximum(0.0, np.log2(np.maximum(window, 1.0) / INITIAL_WINDOW_BYTES))
    flow_s = np.maximum(np.maximum.outer(wire.sum(axis=1) / up, wire.sum(axis=0) / down), wire / tcp)
    probes_s = PROBE_RTTS * rtt_s * _sent_again(lost[sent])
    end_s: Floats = np.where(sent, begin_s[:, None] + rtt_s / 2 + ramp_s + flow_s + probes_s, 0.0)
    return end_s


def _sent_again(lost: Floats) -> float:
    """How often the unluckiest of some packets is sent again, in expectation, each lost with a chance of its own."""
    again = 0.0
    for times in range(1, MOST_PROBES + 1):  # P(one of them is lost so many times in a row)
        again += 1.0 - float(np.exp(np.log1p(-(lost**times)).sum()))
    return again
