"""Models of the transformers library: trained whole or by adapters, exported, and loaded back by the library alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import SHAPES, config_file, pretrained
from safetensors.torch import load_file
from swarm_tools import swarm
from test_worker import assert_one_theta, quick_manifest, swarm_of
from torch import nn

from dtrain.trainer.cli import main
from dtrain.trainer.errors import UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.models import ModelPlace, build_model
from dtrain.trainer.models_hf import CausalLM, config_text, num_trained, shape_of, weights_sha256

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
QUICK = (
    "--inner-steps",
    "3",
    "--batch-size",
    "4",
    "--rounds",
    "3",
    "--lr",
    "0.003",
    "--checkpoint-every",
    "1",
)


def hf_manifest(
    folder: Path, kind: str = "llama", *, weights: Path | None = None, **overrides: object
) -> Manifest:
    """A run of a small transformers model; double underscores stand for dots."""
    config = config_text(str(weights or config_file(folder, kind)))
    named = {"model__kind": "transformers", "model__name": kind, "model__config": config}
    named["model__weights_sha256"] = weights_sha256(weights) if weights else ""
    shape = {f"model__{key}": value for key, value in shape_of(config).items()}
    return quick_manifest(**{**shape, **named, "train__lr": 3e-3, **overrides})


@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_from_a_config_is_the_same_for_everybody(kind: str, tmp_path: Path) -> None:
    """Built twice from one manifest, its first weights are equal in every bit; torch's random numbers are as before."""
    manifest = hf_manifest(tmp_path, kind)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build_model(manifest, ModelPlace(CPU))
    assert torch.equal(torch.rand(3), expected)
    again = build_model(manifest, ModelPlace(CPU))
    assert torch.equal(FlatParameters(first).flat, FlatParameters(again).flat)
    assert FlatParameters(first).num_params == num_trained(manifest.model.config, manifest.train)
    tokens = torch.randint(0, 256, (2, 16))
    first.eval()
    logits = first(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(first(tokens[:, :-1], tokens[:, 1:]), loss)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_train_beside_a_frozen_base(method: str, tmp_path: Path) -> None:
    """Three workers: only adapters travel, theta is one, the loss falls, and not a bit of the base changes."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    base = pretrained(tmp_path)
    changes = {
        "train__method": method,
        "train__lora_rank": 4,
        "exchange__start_workers": 3,
        "train__inner_steps": 6,
    }
    manifest = hf_manifest(tmp_path, weights=base, train__lr=2e-2, train__batch_size=8, **changes)
    place = ModelPlace(CPU, base)
    before = frozen(build_model(manifest, place))
    assert (method == "qlora") == any(weight.dtype == torch.uint8 for weight in before.values())
    adapters = FlatParameters(build_model(manifest, place))
    assert all("lora_" in name for name, _ in adapters.shapes)
    with swarm_of(manifest, tmp_path, shapes=adapters.shapes) as threads:
        for name in ("a", "b", "c"):
            threads.start(name, max_rounds=6, model=base)
        threads.join()
        assert_one_theta(threads, 6)
        for name, worker in threads.workers.items():
            rounds = threads.events(name, "round")
            assert rounds[-1]["loss"] < rounds[0]["loss"] - 0.1
            assert all(e["payload_bytes"] < 4 * adapters.num_params for e in rounds)
            after = frozen(worker.model)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[key], before[key]) for key in before)


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The raw frozen weights; a run's model before and after its training."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_what_does_not_fit_has_its_line(tmp_path: Path) -> None:
    """Other weights, no weights, unknown architectures, layers and methods: named before anything begins."""
    base = pretrained(tmp_path)
    manifest = hf_manifest(tmp_path, weights=base)
    other = pretrained(tmp_path, "gpt2")
    with pytest.raises(UsageError, match="are not this run's llama, whose SHA-256 begins"):
        build_model(manifest, ModelPlace(CPU, other))
    with pytest.raises(UsageError, match="there is no model folder"):
        build_model(manifest, ModelPlace(CPU, tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"train\.lora_targets = q,nothing"):
        lora = hf_manifest(tmp_path, weights=base, train__method="lora", train__lora_targets="q,nothing")
        build_model(lora, ModelPlace(CPU, base))
    with pytest.raises(UsageError, match=r"model\.weights_sha256 must be those of a trained model"):
        hf_manifest(tmp_path, train__method="lora")
    with pytest.raises(UsageError, match=r"model\.kind must be transformers for train\.method = lora"):
        preset_manifest("r", "tiny", {"train.method": "lora"})
    with pytest.raises(UsageError, match="names no model of this transformers library"):
        build_model(hf_manifest(tmp_path, model__config='{"model_type": "none-such"}'), ModelPlace(CPU))
    with pytest.raises(UsageError, match="has no model_type"):
        path = tmp_path / "bad.json"
        path.write_text("{}")
        config_text(str(path))
    with pytest.raises(UsageError, match=r"has no \.safetensors files"):
        weights_sha256(tmp_path)


def make_bigram(config: Any) -> nn.Module:
    """A factory, as a researcher has it."""
    return Bigram(config.vocab_size)


class Bigram(nn.Module):
    """The simplest language model."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.table(tokens)
        if targets is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_factory_makes_the_model_if_the_user_trusts_it(tmp_path: Path) -> None:
    """A run may name code, which is called only when its user said so."""
    name = f"{__name__}:make_bigram"
    manifest = quick_manifest(model__kind="factory", model__name=name, train__lr=0.1)
    with pytest.raises(UsageError, match=f"type --trust-code {name}"):
        build_model(manifest, ModelPlace(CPU))
    shapes = FlatParameters(build_model(manifest, ModelPlace(CPU, trusted=name))).shapes
    with swarm_of(manifest, tmp_path, shapes=shapes) as threads:
        threads.start("a", max_rounds=4, trusted=name)
        threads.join()
        losses = [e["loss"] for e in threads.events("a", "round")]
        assert losses[-1] < losses[0] - 0.3
    for wrong in ("no_such_module:f", f"{__name__}:nothing"):
        other = quick_manifest(model__kind="factory", model__name=wrong)
        with pytest.raises(UsageError, match="cannot be imported"):
            build_model(other, ModelPlace(CPU, trusted=wrong))


@pytest.mark.xdist_group("processes")
@pytest.mark.timeout(400)
def test_from_swarm_to_transformers_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three processes train a Llama from its config; exported, the library alone computes the same; then three others
    train adapters on that, and send kilobytes."""
    flags = ("--model", str(config_file(tmp_path)), *QUICK, "--start-workers", "3", "--eval-every", "3")
    with swarm("whole", tmp_path) as workers:
        for name in ("a", "b", "c"):
            workers.start(name, *flags)
        assert [worker.wait() for worker in workers.workers] == [0, 0, 0]
        digests = [worker.digests() for worker in workers.workers]
        assert digests[0].keys() == {1, 2, 3} and digests[0] == digests[1] == digests[2]
    folder, out = str(tmp_path / "a"), tmp_path / "out"
    assert main(["export", "--folder", folder, "--format", "hf", "--out", str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = theta_of(tmp_path / "a")
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=tokens).logits, ours(tokens))
    card = (out / "README.md").read_text()
    digest = digests[0][3]
    assert digest in card and "- `" in card and ": 3 rounds" in card
    capsys.readouterr()
    assert main(["generate", "--folder", folder, "--prompt", "def f(", "--tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("def f(")
    assert main(["eval", "--folder", folder, "--json"]) == 0
    assert '"bits_per_byte"' in capsys.readouterr().out

    base = {name: tensor.clone() for name, tensor in load_file(out / "model.safetensors").items()}
    adapters = ("--model", str(out), "--method", "lora", "--lora-rank", "4", *QUICK, "--start-workers", "3")
    (tmp_path / "lora").mkdir()
    with swarm("adapters", tmp_path / "lora") as workers:
        for name in ("a", "b", "c"):
            workers.start(name, *adapters)
        assert [worker.wait() for worker in workers.workers] == [0, 0, 0]
        num_params = workers.workers[0].events("start")[0]["num_params"]
        assert num_params < 0.2 * sum(tensor.numel() for tensor in base.values())
        for worker in workers.workers:
            assert worker.digests() == workers.workers[0].digests()
            assert all(e["payload_bytes"] < 4 * num_params for e in worker.events("round"))
            assert worker.events("round")[-1]["bytes_up"] < 40 * num_params
    lora = tmp_path / "lora" / "a"
    adapted = tmp_path / "adapted"
    flags = ("--folder", str(lora), "--model", str(out), "--format", "hf")
    assert main(["export", *flags, "--out", str(adapted)]) == 0
    assert all("lora_" in name for name in load_file(adapted / "adapter_model.safetensors"))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(out)
    again = peft.PeftModel.from_pretrained(fresh, adapted)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, theta_of(lora, out)(tokens))
    assert equal(base, load_file(out / "model.safetensors"))


def theta_of(folder: Path, base: Path | None = None) -> nn.Module:
    from argparse import Namespace

    from dtrain.trainer.trained import load

    flags = Namespace(
        folder=folder, run_id=None, device="cpu", model=str(base) if base else None, trust_code=""
    )
    model = load(flags).model
    assert isinstance(model, CausalLM)
    return model


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
