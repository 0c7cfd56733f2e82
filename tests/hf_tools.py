"""Small models of the transformers library, made from configs."""

from __future__ import annotations

import json
from pathlib import Path

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.1,
}
SHAPES = {"llama": LLAMA, "gpt2": GPT2}


def config_file(folder: Path, kind: str = "llama") -> Path:
    """A config.json of a small model."""
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(SHAPES[kind]))
    return path


def pretrained(folder: Path, kind: str = "llama") -> Path:
    """A folder with a small model's random weights, as `save_pretrained` leaves it."""
    import transformers

    transformers.set_seed(1)
    config = transformers.AutoConfig.for_model(**SHAPES[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    return folder / kind
