"""Good defaults per model size: a preset is a manifest with only the run id missing.

Density and H follow the model's size: models of about 1M parameters want short rounds and dense payloads,
larger ones H = 30 and k = 64 of 4096 (arXiv 2508.15706). The small ones train with Muon, whose deltas lose less in few
bits (experiments/RESULTS.md); larger ones with AdamW, as in that paper, until we have measured them.
"""

from __future__ import annotations

from collections.abc import Mapping

Section = Mapping[str, object]

PRESETS: Mapping[str, Mapping[str, Section]] = {
    "tiny": {  # 0.93M parameters: learns visibly within a minute on one CPU core, at about 0.1 s per inner step
        "model": {"dim": 192, "num_layers": 2, "num_heads": 3, "hidden_dim": 768, "seq_len": 256},
        "train": {
            "inner_steps": 15,
            "batch_size": 16,
            "seq_len": 64,
            "lr": 1e-2,
            "total_steps": 3000,
            "optimizer": "muon",
        },
        "codec": {"k": 512, "value_bits": 1, "aggregate_k": 2048},
    },
    "small": {  # 25M
        "model": {"dim": 512, "num_layers": 8, "num_heads": 8, "hidden_dim": 2048, "seq_len": 1024},
        "train": {"inner_steps": 30, "batch_size": 16, "seq_len": 512, "lr": 1e-3, "total_steps": 20000},
        "codec": {"k": 64, "value_bits": 2},
    },
    "gpt2": {  # 127M: GPT-2's width; its 50k-token table's parameters are six more layers of a byte model
        "model": {"dim": 768, "num_layers": 18, "num_heads": 12, "hidden_dim": 3072, "seq_len": 1024},
        "train": {"inner_steps": 30, "batch_size": 16, "seq_len": 1024, "lr": 6e-4, "total_steps": 60000},
        "codec": {"k": 64, "value_bits": 2},
    },
    "medium": {  # 352M: GPT-2 medium's width, with four more layers
        "model": {"dim": 1024, "num_layers": 28, "num_heads": 16, "hidden_dim": 4096, "seq_len": 1024},
        "train": {"inner_steps": 30, "batch_size": 16, "seq_len": 1024, "lr": 4e-4, "total_steps": 100000},
        "codec": {"k": 64, "value_bits": 2},
    },
}
"""Preset name -> section -> values that differ from the section's own defaults."""
