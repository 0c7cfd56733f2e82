"""The manifest: a run's settings that all peers share. Its hash is the run's identity.

The canonical form is sorted, compact JSON of every field: equal settings give equal bytes on every machine,
and a changed setting is a new run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dtrain.compression.errors import CompressionError
from dtrain.compression.spec import CodecSpec
from dtrain.trainer.config import (
    ExchangeConfig,
    ModelConfig,
    StrategyConfig,
    TrainConfig,
    require,
)
from dtrain.trainer.config_data import BYTE_VALUES, BYTES, DataConfig
from dtrain.trainer.config_trust import AdmissionConfig, DefenceConfig
from dtrain.trainer.errors import UsageError
from dtrain.trainer.presets import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DataConfig",
    "ExchangeConfig",
    "Manifest",
    "ModelConfig",
    "StrategyConfig",
    "TrainConfig",
    "diff",
    "manifest_from_toml",
    "preset_manifest",
    "validate_run_id",
]

SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "strategy": StrategyConfig,
    "codec": CodecSpec,
    "exchange": ExchangeConfig,
    "admission": AdmissionConfig,
    "defence": DefenceConfig,
}
FORMAT = 1
# Inner rates for weights that were trained before: transformers' default, and for adapters QLoRA's (arXiv 2305.14314).
TRAINED_LR, ADAPTERS_LR = 5e-5, 2e-4
"""Version of the manifest's own layout."""


def validate_run_id(text: str) -> str:
    """Return `text` if it can name a run; UsageError otherwise. Run ids become folder names and DHT keys."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", text) is None:
        raise UsageError(
            f"run id (--run-id) {text[:80]!r} will not do: use 1 to 64 letters, digits, '-' or '_', "
            "beginning with a letter or digit"
        )
    return text


@dataclass(frozen=True)
class Manifest:
    """All shared settings of one run."""

    run_id: str
    """Name of the run, see `validate_run_id`."""
    model: ModelConfig
    """Shape of the model."""
    data: DataConfig
    """What it is trained on."""
    train: TrainConfig
    """Inner training."""
    strategy: StrategyConfig
    """The outer step."""
    codec: CodecSpec
    """How a delta becomes a payload."""
    exchange: ExchangeConfig
    """How workers meet."""
    admission: AdmissionConfig
    """Who may take part."""
    defence: DefenceConfig
    """What is done against members that do not do what they say."""
    organizer: str = ""
    """Ed25519 public key of who made the run, 64 lower-case hex digits; "" until signed."""
    format: int = FORMAT
    """Version of this layout."""

    def __post_init__(self) -> None:
        validate_run_id(self.run_id)
        require(self.format == FORMAT, "format", f"be {FORMAT} (this dtrain knows no other)", self.format)
        well_formed = re.fullmatch(r"([0-9a-f]{64})?", self.organizer) is not None
        require(well_formed, "organizer", "be 64 lower-case hex digits or empty", self.organizer)
        if self.data.tokenizer == BYTES:
            rule = f"be at least {BYTE_VALUES} for data.tokenizer = {BYTES}"
            require(self.model.vocab_size >= BYTE_VALUES, "model.vocab_size", rule, self.model.vocab_size)
        if self.train.method != "full":
            rule = f"be transformers for train.method = {self.train.method}"
            require(self.model.kind == "transformers", "model.kind", rule, self.model.kind)
            rule = "be those of a trained model (--model), as adapters go beside frozen weights"
            require(bool(self.model.weights_sha256), "model.weights_sha256", rule, "")
        rule = f"be at most model.seq_len = {self.model.seq_len}"
        require(self.train.seq_len <= self.model.seq_len, "train.seq_len", rule, self.train.seq_len)

    def to_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Plain values, nested by section. Fields that were added to the format later are left out at their default,
        unless the `whole` is asked for."""
        sections = {}
        for name, kind in SECTIONS.items():
            section = getattr(self, name)
            values = section.to_dict() if kind is CodecSpec else asdict(section)
            usual = {} if whole else _added(kind)
            told = {key: v for key, v in values.items() if key not in usual or v != usual[key]}
            if told or usual.keys() != values.keys() or whole:  # a section may have been added whole
                sections[name] = told
        return {"run_id": self.run_id, **sections, "organizer": self.organizer, "format": self.format}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """What `to_dict` gave; UsageError names a key that is unknown, missing or of the wrong type."""
        known = [field.name for field in fields(cls)]
        refuse_unknown(values, known, prefix="")
        for key in [*known, *_dotted_keys()]:
            name, _, inner = key.partition(".")
            section, added = values.get(name), _added(SECTIONS.get(name))
            may_lack = name in SECTIONS and added.keys() == _keys(name)  # a section that was added whole
            if inner in added or (name not in values and may_lack):
                continue
            if name not in values or (inner and isinstance(section, Mapping) and inner not in section):
                raise UsageError(f"the manifest lacks {key}: get it again from the run's organizer")
        for name in ("run_id", "organizer"):
            require(isinstance(values[name], str), name, "be text", values[name])
        require(type(values["format"]) is int, "format", "be a whole number", values["format"])
        sections = {name: _section(name, kind, values.get(name, {})) for name, kind in SECTIONS.items()}
        return cls(
            run_id=values["run_id"], organizer=values["organizer"], format=values["format"], **sections
        )

    def canonical_bytes(self) -> bytes:
        """What is hashed and signed: sorted compact JSON, ASCII only."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode(
            "ascii"
        )

    @property
    def hash(self) -> bytes:
        """SHA-256 of the canonical bytes (32 bytes): the run's identity."""
        return hashlib.sha256(self.canonical_bytes()).digest()

    @property
    def max_weight(self) -> float:
        """Most tokens that one worker can be credited with per round."""
        train = self.train
        most = self.exchange.max_round_tokens or 64 * train.inner_steps * train.batch_size * train.seq_len
        return float(max(most, self.exchange.round_tokens))

    @property
    def round_tokens_each(self) -> int:
        """Tokens that one worker trains on in a round: by its fixed steps, or twice its share of the round's."""
        if self.exchange.round_tokens:
            return max(1, 2 * self.exchange.round_tokens // self.exchange.start_workers)
        return self.train.inner_steps * self.train.batch_size * self.train.seq_len

    @property
    def run_tag(self) -> bytes:
        """First 8 bytes of the hash; every payload carries them."""
        return self.hash[:8]


def preset_manifest(
    run_id: str, preset: str = "tiny", overrides: Mapping[str, object] | None = None
) -> Manifest:
    """A preset's manifest with some values replaced.

    `overrides` maps dotted keys ("train.lr") to values; None values are passed over, so flags fit as parsed. A strategy
    that is named there changes the preset's other values to what suits it, and so does a model of another kind.
    """
    if preset not in PRESETS:
        close = _did_you_mean(preset, PRESETS)
        raise UsageError(
            f"there is no preset (--preset) {preset!r}{close}: choose one of {', '.join(PRESETS)}"
        )
    tree: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    for name, section in PRESETS[preset].items():
        tree[name].update(section)
    tree["model"].update(preset=preset, vocab_size=256)
    given = overrides or {}
    values = {key: value for key, value in given.items() if value is not None}
    suited = {**_model_defaults(values), **_strategy_defaults(values.get("strategy.name"))}
    for key, value in {**suited, **values}.items():
        section_name, _, field_name = key.partition(".")
        if section_name not in SECTIONS or not field_name:
            refuse_unknown([key], _dotted_keys(), prefix="")
        tree[section_name][field_name] = value
    sections = {name: _section(name, kind, tree[name]) for name, kind in SECTIONS.items()}
    return Manifest(run_id=run_id, **sections)


def _model_defaults(values: Mapping[str, object]) -> Mapping[str, object]:
    """What models have that the presets were not made for."""
    if values.get("model.kind", ModelConfig.kind) == ModelConfig.kind:
        return {}
    suited: dict[str, object] = {"train.optimizer": TrainConfig.optimizer}
    if values.get("model.weights_sha256"):  # a preset's rate, made to begin from nothing, would undo them
        whole = values.get("train.method", TrainConfig.method) == TrainConfig.method
        suited["train.lr"] = TRAINED_LR if whole else ADAPTERS_LR
    return suited


def _strategy_defaults(name: object) -> Mapping[str, object]:
    """What a strategy wants otherwise than the presets have it; they are made for the default one."""
    if name is None or not isinstance(name, str) or name == StrategyConfig.name:
        return {}
    from dtrain.trainer.strategies import find  # only now: it imports torch

    return find(name).defaults


def manifest_from_toml(path: Path | str, overrides: Mapping[str, object] | None = None) -> Manifest:
    """Read a run file: `run_id` and any keys of the sections, on top of the preset that it names.

    `overrides` (dotted keys, and "run_id") win over the file; None values are passed over.
    """
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read the run file (--config) {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the run file (--config) {path} is no valid TOML: {error}") from None
    values: dict[str, object] = {}
    for name, value in tree.items():
        if name in SECTIONS:
            require(isinstance(value, Mapping), name, "be a table such as [train]", value)
            values.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            refuse_unknown([name], ["run_id", *SECTIONS], prefix="")
            values[name] = value
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    run_id, preset = values.pop("run_id", None), values.pop("model.preset", "tiny")
    if run_id is None:
        raise UsageError(f'the run needs a name: type --run-id NAME, or put run_id = "NAME" into {path}')
    require(isinstance(run_id, str), "run_id", "be text", run_id)
    require(isinstance(preset, str), "model.preset", "be text", preset)
    return preset_manifest(str(run_id), str(preset), values)


def diff(a: Manifest, b: Manifest) -> list[tuple[str, object, object]]:
    """Every (dotted key, value in `a`, value in `b`) in which the two differ."""
    left, right = _flatten(a.to_dict(whole=True)), _flatten(b.to_dict(whole=True))
    return [(key, left[key], right[key]) for key in left if left[key] != right[key]]


def _flatten(tree: Mapping[str, Any]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def _added(kind: type[Any] | None) -> dict[str, Any]:
    """{name: default} of a section's fields that came after the format."""
    return {f.name: f.default for f in fields(kind) if f.metadata.get("added")} if kind else {}


def _keys(name: str) -> set[str]:
    return {field.name for field in fields(SECTIONS[name])} if name in SECTIONS else set()


def _section(name: str, kind: type[Any], values: object) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"{name} must be a table of settings, not {values!r}")
    known = [field.name for field in fields(kind)]
    refuse_unknown(values, known, prefix=f"{name}.")
    try:
        return kind(**values)
    except CompressionError as error:
        raise UsageError(f"codec: {error}") from None
    except TypeError as error:  # a field without default is missing
        raise UsageError(f"{name} is incomplete: {error}") from None


def refuse_unknown(given: Iterable[str], known: Iterable[str], prefix: str) -> None:
    """UsageError for the first of the given keys that is not known, with a guess at what was meant."""
    known = list(known)
    for key in given:
        if key not in known:
            close = _did_you_mean(key, known)
            raise UsageError(f"unknown setting {prefix}{key}{close}; known ones: {', '.join(known)}")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _dotted_keys() -> list[str]:
    return [f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind)]
