"""What joining costs is told beforehand, from the manifest alone."""

from __future__ import annotations

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.trainer.estimate import round_bytes
from dtrain.trainer.manifest import preset_manifest

SHAPES = [("a", (512, 1024)), ("b", (256, 512))]


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("members", [1, 2, 4, 8])
def test_a_rounds_traffic_is_what_the_codec_sends(preset: str, members: int) -> None:
    """Sections to the reducers and the own span's aggregate to all: the mean member's, within 10 %."""
    manifest = preset_manifest("test", preset)
    codec = Codec(manifest.codec, SHAPES)
    payloads = [payload(codec, seed) for seed in range(members)]
    sent = sum(map(len, payloads)) * (members - 1) / members
    for first, count in codec.spans([1.0] * members):
        sections = [(i, 1.0, codec.cut(payload, first, count)) for i, payload in enumerate(payloads)]
        residual = None if members <= manifest.exchange.exact_up_to else codec.residual(first, count)
        aggregate = codec.reduce(
            sections, residual=residual, run=bytes(8), round=0, first_chunk=first, num_chunks=count
        )
        sent += len(aggregate) * (members - 1)
    assert round_bytes(manifest, codec.num_params, members) == pytest.approx(sent / members, rel=0.1)


def payload(codec: Codec, seed: int) -> bytes:
    """A worker's, of noise."""
    draw = torch.Generator().manual_seed(seed)
    delta = [torch.randn(shape, generator=draw) for _, shape in SHAPES]
    return codec.encode(delta, codec.error_feedback(), decay=1.0, run=bytes(8), round=0)
