"""Rounds of many peers without processes: real payloads, cuts, sums and checks, but bytes are only counted.

They show how traffic grows with the group, for groups larger than one machine can hold.
"""

from __future__ import annotations

from statistics import mean

import torch

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.experiments.bench_exchange_report import LIGHT, Row
from dtrain.experiments.memory_round import Contribution, Faults, GroupReducer

ROUNDS = 2  # the second has residuals and error feedback in it
RUN = bytes(8)
TOKENS = 1000.0


def light_row(peers: int, params: int, k: int) -> Row:
    """What the exchange itself of a group of `peers` sends, sums compressed again, on average; times are not known."""
    codec = Codec(CodecSpec(k=k), [("delta", (params,))])
    reducer = GroupReducer(codec, RUN, exact_up_to=1, faults=Faults())
    feedbacks = [codec.error_feedback() for _ in range(peers)]
    names = [f"peer-{number:03d}" for number in range(peers)]
    for round in range(ROUNDS):
        members = []
        for number, name in enumerate(names):
            generator = torch.Generator().manual_seed(1000 * round + number)
            delta = torch.randn(params, generator=generator)
            payload = codec.encode([delta], feedbacks[number], decay=0.95, run=RUN, round=round)
            members.append(Contribution(name, b"", payload, TOKENS))
        reduced = reducer.reduce(round, members)
    return {
        "implementation": LIGHT,
        "peers": peers,
        "params": params,
        "payload_bytes": int(mean(len(member.payload) for member in members)),
        "round_s_median": None,
        "up_bytes_per_peer": int(mean(reduced.bytes_up[name] for name in names)),
        "down_bytes_per_peer": int(mean(reduced.bytes_down[name] for name in names)),
        "digests_equal": True,
        "complete_rounds": ROUNDS,
        "rounds": ROUNDS,
    }
