"""The figures of the exchange benchmark: what each peer measured, and what comes of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.table import Table

IMPLEMENTATIONS = ("dtrain", "hivemind-float16", "all-gather")
OURS, STOCK = IMPLEMENTATIONS[:2]
LIGHT = "dtrain, in memory"

Row = dict[str, object]


@dataclass(frozen=True)
class PeerRound:
    """One round as one peer saw it."""

    seconds: float
    """From the delta in hand to the average in hand: packing, meeting, exchanging, unpacking."""
    payload_bytes: int
    """What the peer had to say: its payload, or its tensor in fp16."""
    contributors: int
    """Peers whose contribution is in the average, ourselves included; 0 = the round failed."""
    wait_s: float | None
    """Seconds until the group had met; null where that is not known or nobody needed to meet."""
    exchange_s: float | None
    """Seconds from then until the last byte was here; null where that is not known."""
    problem: str
    exchange_up_bytes: int | None = None
    """Of the bytes sent, the parts of payloads and aggregates, without matchmaking, headers and heartbeats; null where
    that is not known.
    """
    up_bytes: int = 0
    down_bytes: int = 0
    digest: str = ""
    """Of the average."""


def make_row(
    implementation: str,
    params: int,
    rounds: Sequence[Sequence[PeerRound]],
    background_bytes_per_s: float,
) -> Row:
    """One implementation at one number of peers: `rounds` holds every counted round's peers.

    Times are medians over the rounds of the slowest peer; bytes are medians over all peers of all rounds.
    """
    peers = len(rounds[0])
    everybody = [peer for peers_of in rounds for peer in peers_of]
    return {
        "implementation": implementation,
        "peers": peers,
        "params": params,
        "payload_bytes": int(median(peer.payload_bytes for peer in everybody)),
        "round_s_median": _median([max(peer.seconds for peer in group) for group in rounds]),
        "up_bytes_per_peer": int(median(peer.up_bytes for peer in everybody)),
        "down_bytes_per_peer": int(median(peer.down_bytes for peer in everybody)),
        "digests_equal": all(len({peer.digest for peer in group}) == 1 for group in rounds),
        "wait_s_median": _slowest([[peer.wait_s for peer in group] for group in rounds]),
        "exchange_s_median": _slowest([[peer.exchange_s for peer in group] for group in rounds]),
        "exchange_up_bytes_per_peer": _middle([peer.exchange_up_bytes for peer in everybody]),
        "round_s": [round(max(peer.seconds for peer in group), 3) for group in rounds],
        "complete_rounds": sum(all(peer.contributors == peers for peer in group) for group in rounds),
        "rounds": len(rounds),
        "background_bytes_per_s": round(background_bytes_per_s),
        "problems": sorted({peer.problem for peer in everybody if peer.problem}),
    }


def _slowest(rounds: Sequence[Sequence[float | None]]) -> float | None:
    slowest = [max(s for s in group if s is not None) for group in rounds if set(group) != {None}]
    return _median(slowest) if slowest else None


def _middle(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(median(known)) if known else None


def _median(values: Sequence[float]) -> float:
    return round(median(values), 4)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dtrain", "hivemind", "torch")},
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def make_table(rows: Sequence[Row]) -> Table:
    """The rows, for a terminal of 80 columns."""
    table = Table(title="One round, per peer", title_justify="left")
    table.add_column("implementation", no_wrap=True)
    for heading in ("peers", "s", "payload", "MB up", "MB down", "equal", "met"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["implementation"]),
            str(row["peers"]),
            "-" if row["round_s_median"] is None else f"{_number(row, 'round_s_median'):.2f}",
            *(
                f"{_number(row, key) / 1e6:.3f}"
                for key in ("payload_bytes", "up_bytes_per_peer", "down_bytes_per_peer")
            ),
            "yes" if row["digests_equal"] else "NO",
            f"{row['complete_rounds']}/{row['rounds']}",
        )
    return table


def comparison(rows: Sequence[Row]) -> list[str]:
    """What the rows say of our exchange at its largest number of peers, a sentence a line."""
    ours = max((row for row in rows if row["implementation"] == OURS), key=_peers, default=None)
    if ours is None:
        return []
    up, payload = _number(ours, "up_bytes_per_peer"), _number(ours, "payload_bytes")
    lines = [f"{ours['peers']} peers: {up / payload:.2f} payloads up per peer and round, everything counted"]
    if ours["exchange_up_bytes_per_peer"] is not None:
        own = _number(ours, "exchange_up_bytes_per_peer")
        lines.append(f"{own / payload:.2f} of them are the exchange itself; the rest is DHT and matchmaking")
    stock = next(
        (row for row in rows if row["implementation"] == STOCK and _peers(row) == _peers(ours)), None
    )
    if stock is not None:
        lines.append(f"{_number(stock, 'up_bytes_per_peer') / up:.0f}x fewer bytes up than stock Float16")
        share = _number(ours, "round_s_median") / _number(stock, "round_s_median")
        lines.append(f"{share:.2f}x stock's seconds per round")
    lines.append(f"{_number(ours, 'background_bytes_per_s') / 1e3:.1f} kB/s up per peer between rounds")
    return lines


def growth(rows: Sequence[Row]) -> list[str]:
    """What the rows counted in memory say of traffic in larger groups, in a line."""
    light = [row for row in rows if row["implementation"] == LIGHT]
    if not light:
        return []
    in_payloads = [_number(row, "up_bytes_per_peer") / _number(row, "payload_bytes") for row in light]
    said = ", ".join(f"{up:.2f} at {row['peers']}" for row, up in zip(light, in_payloads))
    return [f"payloads up per peer, the exchange itself, sums compressed again: {said} peers"]


def _peers(row: Mapping[str, object]) -> float:
    return _number(row, "peers")


def _number(row: Mapping[str, object], key: str) -> float:
    value = row[key]
    assert isinstance(value, (int, float))
    return float(value)
