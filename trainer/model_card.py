"""The README of an exported model: which run it is from, what it was trained on, and by whom."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dtrain.trainer.manifest import Manifest
from dtrain.trainer.metrics import read_metrics
from dtrain.trainer.trained import Trained

CARD = """\
---
{header}---
# {run_id}

A language model that volunteers' computers trained together, over the internet, with dtrain.

| | |
|---|---|
| run | {run_id} |
| manifest (SHA-256) | `{manifest_hash}` |
| organizer (Ed25519) | `{organizer}` |
| rounds | {rounds} |
| tokens | {tokens:,} |
| weights (digest) | `{digest}` |
| model | {model}, {num_params:,} trained parameters ({method}) |
| data | {data}, as {tokenizer} tokens |
| strategy | {strategy}, {inner_steps} inner steps a round |
| evaluation loss | {loss} |

## Contributors

{contributors}

## Use

{use}
"""
USE_HF = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""
USE_ADAPTERS = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
```"""
USE_PLAIN = (
    "model.safetensors has the trained parameters by name; manifest.json says what model they belong to."
)


def write_card(trained: Trained, out: Path, format: str) -> None:
    """Write README.md beside the model."""
    manifest, checkpoint = trained.manifest, trained.checkpoint
    adapters = (out / "adapter_config.json").exists()
    text = CARD.format(
        header=_header(manifest, format, adapters),
        run_id=manifest.run_id,
        manifest_hash=manifest.hash.hex(),
        organizer=manifest.organizer or "unsigned",
        rounds=checkpoint.round,
        tokens=checkpoint.tokens,
        digest=checkpoint.digest.hex(),
        model=manifest.model.title,
        num_params=sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
        or manifest.model.num_params,
        method=manifest.train.method,
        data=manifest.data.title,
        tokenizer=manifest.data.tokenizer,
        strategy=manifest.strategy.name,
        inner_steps=manifest.train.inner_steps,
        loss=_loss(trained),
        contributors=_contributors(trained),
        use=USE_PLAIN if format == "safetensors" else USE_ADAPTERS if adapters else USE_HF,
    )
    (out / "README.md").write_text(text)


def _header(manifest: Manifest, format: str, adapters: bool) -> str:
    lines = ["tags:", "- dtrain"]
    if format == "hf":
        lines += [f"library_name: {'peft' if adapters else 'transformers'}", "pipeline_tag: text-generation"]
    if manifest.model.weights_sha256 and "/" in manifest.model.name:
        lines.append(f"base_model: {manifest.model.name}")
    names = (
        [part.name for part in manifest.data.parts if part.source == "hub"]
        if manifest.data.is_streamed
        else []
    )
    lines += ["datasets:", *(f"- {name}" for name in names)] if names else []
    return "\n".join(lines) + "\n"


def _loss(trained: Trained) -> str:
    found = [e for e in read_metrics(trained.folder / "metrics.jsonl") if e["event"] == "eval"]
    found = [e for e in found if e.get("round", 0) <= trained.checkpoint.round]
    return (
        f"{found[-1]['eval_loss']:.4f} nats per token after round {found[-1]['round']}"
        if found
        else "not measured"
    )


def _contributors(trained: Trained) -> str:
    """Peers by the rounds that this worker saw them in; each counts once a round."""
    rounds: dict[int, list[str]] = {}
    for event in read_metrics(trained.folder / "metrics.jsonl"):
        if event["event"] == "round" and event["round"] <= trained.checkpoint.round:
            rounds[event["round"]] = event["contributors"]
    counts = Counter(peer for peers in rounds.values() for peer in peers)
    seen = f"In the {len(rounds)} rounds that the exporting worker took part in:\n\n"
    return seen + "\n".join(f"- `{peer}`: {count} rounds" for peer, count in counts.most_common())
