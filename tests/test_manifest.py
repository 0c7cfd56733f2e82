"""The manifest: what peers share has one canonical form, and every mistake in it is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import (
    ADAPTERS_LR,
    TRAINED_LR,
    Manifest,
    diff,
    manifest_from_toml,
    preset_manifest,
    validate_run_id,
)
from dtrain.trainer.presets import PRESETS
from dtrain.trainer.settings import MachineSettings, resolve_device


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_the_round_trip(preset: str) -> None:
    """A manifest read back from its own JSON is the same manifest with the same hash."""
    manifest = preset_manifest("demo", preset)
    again = Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    assert again == manifest
    assert again.hash == manifest.hash
    assert manifest.run_tag == manifest.hash[:8]


def test_the_hash_does_not_depend_on_how_a_number_was_typed() -> None:
    """1 and 1.0 for a field that is a fraction are equal settings, so they must be the same run."""
    whole = preset_manifest("demo", overrides={"strategy.outer_lr": 1})
    fraction = preset_manifest("demo", overrides={"strategy.outer_lr": 1.0})
    assert whole.hash == fraction.hash


def test_any_change_of_a_shared_setting_is_another_run() -> None:
    """Each field of each section is part of the identity."""
    base = preset_manifest("demo")
    other = preset_manifest("demo", overrides={"train.inner_steps": 16, "data.eval_tokens": 99})
    assert base.hash != other.hash
    assert diff(base, other) == [("data.eval_tokens", 16384, 99), ("train.inner_steps", 15, 16)]
    assert replace(base, run_id="demo2").hash != base.hash


def test_a_key_with_a_typo_is_refused_by_name_with_a_suggestion() -> None:
    """Unknown keys never pass silently: a typo in a run file would train something else."""
    tree = preset_manifest("demo").to_dict()
    tree["train"]["inner_step"] = 3
    with pytest.raises(UsageError, match=r"train\.inner_step \(did you mean inner_steps\?\)"):
        Manifest.from_dict(tree)
    with pytest.raises(UsageError, match=r"trian\.lr \(did you mean train\.lr\?\)"):
        preset_manifest("demo", overrides={"trian.lr": 1.0})


def test_a_missing_key_is_refused_by_name() -> None:
    """A manifest from elsewhere must be whole; defaults are for run files."""
    tree = preset_manifest("demo").to_dict()
    del tree["exchange"]
    with pytest.raises(UsageError, match="lacks exchange"):
        Manifest.from_dict(tree)
    tree = preset_manifest("demo").to_dict()
    del tree["train"]["seed"]
    with pytest.raises(UsageError, match=r"lacks train\.seed"):
        Manifest.from_dict(tree)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.inner_steps", 0, r"train\.inner_steps \(--inner-steps\) must be at least 1, not 0"),
        ("train.inner_steps", 1.5, r"train\.inner_steps \(--inner-steps\) must be a whole number, not 1\.5"),
        ("train.inner_steps", True, r"must be a whole number, not True"),
        ("train.lr", "fast", r"train\.lr must be a number, not 'fast'"),
        ("train.lr", float("nan"), r"train\.lr must be finite"),
        ("train.seq_len", 100_000, r"train\.seq_len must be at most model\.seq_len"),
        ("model.dim", 100, r"model\.dim must be a multiple of 64"),
        ("model.vocab_size", 100, r"model\.vocab_size must be at least 256 for data\.tokenizer = bytes"),
        ("model.num_heads", 7, r"model\.num_heads must divide model\.dim"),
        ("data.source", "web", r"data\.source must be one of stdlib, file, files, hub"),
        ("data.source", "hub", r"data\.name \(--data\) must name files or a data set"),
        ("data.source", "file", r"data\.name \(--data\) must be the file's base name"),
        ("exchange.start_workers", 0, r"exchange\.start_workers \(--start-workers\) must be at least 1"),
        (
            "exchange.heartbeat_ttl_s",
            1.0,
            r"exchange\.heartbeat_ttl_s must be more than exchange\.heartbeat_s",
        ),
        ("codec.value_bits", 3, r"codec: value_bits must be one of"),
        ("strategy.feedback_decay", 1.5, r"strategy\.feedback_decay must be between 0 and 1"),
    ],
)
def test_bad_values_are_named_with_the_rule_they_break(key: str, value: object, message: str) -> None:
    """One line says which key (and flag) is wrong, what holds for it, and what was given."""
    with pytest.raises(UsageError, match=message) as caught:
        preset_manifest("demo", overrides={key: value})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("run_id", ["", "-a", "_a", "a b", "a/b", "ä", "a\n", "x" * 65, "../up"])
def test_strange_run_ids_are_refused(run_id: str) -> None:
    """Run ids become folder names and keys, so only plain names pass."""
    with pytest.raises(UsageError, match="--run-id"):
        validate_run_id(run_id)


@pytest.mark.parametrize("run_id", ["a", "Z9", "a-b_c", "x" * 64])
def test_plain_run_ids_pass(run_id: str) -> None:
    """Letters, digits, '-' and '_' are fine."""
    assert validate_run_id(run_id) == run_id


def test_an_unknown_preset_lists_the_choices() -> None:
    """The error says what could have been typed."""
    with pytest.raises(UsageError, match=r"'tinny' \(did you mean tiny\?\): choose one of tiny, small"):
        preset_manifest("demo", "tinny")


def test_a_run_file_sits_between_the_preset_and_the_flags(tmp_path: Path) -> None:
    """Preset, then file, then flags: the later wins, and flags that were not given change nothing."""
    path = tmp_path / "run.toml"
    path.write_text('run_id = "mine"\n[model]\npreset = "small"\n[train]\nlr = 0.5\nbatch_size = 4\n')
    manifest = manifest_from_toml(path, {"train.batch_size": 2, "train.inner_steps": None})
    assert manifest.run_id == "mine"
    assert manifest.model.preset == "small"
    assert (manifest.train.lr, manifest.train.batch_size, manifest.train.inner_steps) == (0.5, 2, 30)
    assert manifest_from_toml(path, {"run_id": "other"}).run_id == "other"


@pytest.mark.parametrize(
    ("more", "lr"),
    [
        ({}, 1e-2),  # from scratch: the preset's
        ({"model.weights_sha256": "ab" * 32}, TRAINED_LR),
        ({"model.weights_sha256": "ab" * 32, "train.method": "lora"}, ADAPTERS_LR),
        ({"model.weights_sha256": "ab" * 32, "train.lr": 0.5}, 0.5),
    ],
)
def test_trained_weights_have_a_rate_that_does_not_undo_them(more: dict[str, object], lr: float) -> None:
    """A preset's is made to begin from nothing."""
    other = {"model.kind": "transformers", "model.name": "a", "model.config": "{}", "model.params": 1000}
    manifest = preset_manifest("demo", "tiny", {**other, **more})
    assert (manifest.train.lr, manifest.train.optimizer) == (lr, "adamw")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_id = ", "is no valid TOML"),
        ("[train]\nlr = 1.0", "--run-id NAME"),
        ('run_id = "a"\ntrain = 3', "train must be a table"),
        ('run_id = "a"\n[trian]\nlr = 1.0', r"unknown setting trian \(did you mean train\?\)"),
        ('run_id = "a"\n[train]\nlrr = 1.0', r"unknown setting train\.lrr"),
    ],
)
def test_a_bad_run_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    """Run files are typed by people: every mistake has its line."""
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        manifest_from_toml(path)


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    """The path that was typed is in the line."""
    with pytest.raises(UsageError, match=r"--config\) .*nowhere\.toml: No such file"):
        manifest_from_toml(tmp_path / "nowhere.toml")


def test_machine_settings_are_checked(tmp_path: Path) -> None:
    """Machine settings name the flag that is wrong."""
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="--name"):
        MachineSettings(name="a b", folder=tmp_path)
    with pytest.raises(UsageError, match=r"--device\) 'gpu'"):
        MachineSettings(name="a", folder=tmp_path, device="gpu")
    with pytest.raises(UsageError, match="--keep-checkpoints must be at least 1"):
        MachineSettings(name="a", folder=tmp_path, keep_checkpoints=0)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, "much", float("nan")])
def test_the_share_of_one_origin_is_a_share(share: object) -> None:
    """Above 0, up to 1; whoever types something else reads which setting it is."""
    with pytest.raises(UsageError, match="max_share"):
        preset_manifest("demo", overrides={"admission.max_share": share})


def test_the_usual_share_of_one_origin_leaves_older_runs_their_hash() -> None:
    """It was added to the format; another one is another run."""
    usual = preset_manifest("demo")
    assert "admission" not in usual.to_dict()
    other = preset_manifest("demo", overrides={"admission.max_share": 1})
    assert Manifest.from_dict(other.to_dict()).admission.max_share == 1.0
    assert other.hash != usual.hash
