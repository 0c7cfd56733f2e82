"""The sections of a run's manifest: everything that all peers of a run must share, one frozen dataclass each.

Machine settings (device, folder, name) are in `settings.py`: they are each computer's own business.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from dtrain.trainer.errors import UsageError

GPT_KIND = "gpt"
MODEL_KINDS = (GPT_KIND, "transformers", "factory")
METHODS = ("full", "lora", "qlora")
OVERLAPS = ("none", "eager")
MAX_WHOLE = 2**53  # what every reader of JSON holds exactly
PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
FLAGS = {
    "model.preset": "--preset",
    "train.inner_steps": "--inner-steps",
    "train.optimizer": "--optimizer",
    "strategy.name": "--strategy",
    "exchange.start_workers": "--start-workers",
    "exchange.overlap": "--overlap",
    "exchange.round_tokens": "--round-tokens",
    "data.name": "--data",
    "data.tokenizer": "--tokenizer",
    "train.method": "--method",
    "model.name": "--model",
    "admission.mode": "--admission",
}
"""Command-line flags of the keys that have one; error lines name both."""


def label(key: str) -> str:
    """How an error line names a dotted key: the key, and its flag where there is one."""
    return f"{key} ({FLAGS[key]})" if key in FLAGS else key


def require(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise UsageError "<key> must <rule>, not <value>" unless `condition` holds."""
    if not condition:
        raise UsageError(f"{label(key)} must {rule}, not {value!r:.200}")


def added(default: Any) -> Any:
    """A field that came after the manifest's format: at its default it is left out of the canonical form, so that
    older runs keep their hash."""
    return field(default=default, metadata={"added": True})


def settle_types(section: Any, prefix: str) -> None:
    """Check all fields' types. Ints become floats where floats are meant: equal settings hash alike."""
    hints = get_type_hints(type(section))
    for entry in fields(section):
        value, wanted, key = getattr(section, entry.name), hints[entry.name], f"{prefix}.{entry.name}"
        if wanted not in PLAIN:
            continue
        if isinstance(value, int):  # a hostile manifest may hold any
            require(abs(value) <= MAX_WHOLE, key, "be at most 2^53", value)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
            object.__setattr__(section, entry.name, value)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise UsageError(f"{label(key)} must be {PLAIN[wanted]}, not {value!r:.200}")
        if wanted is float:
            require(math.isfinite(value), key, "be finite", value)


@dataclass(frozen=True)
class ModelConfig:
    """The model: the built-in GPT (`model.py`) in some shape, or one of another kind (`models.py`), whose shape is then
    for display."""

    SECTION: ClassVar[str] = "model"

    preset: str
    """Name of the preset that the shape began from; for display only."""
    vocab_size: int
    """Number of distinct tokens."""
    dim: int
    """Width of the residual stream; a multiple of 64, as the codec cuts matrices into 64x64 blocks."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads per block; dim / num_heads must be even, for the rotary embedding."""
    hidden_dim: int
    """Inner width of each feed-forward layer; a multiple of 64."""
    seq_len: int
    """Longest context, in tokens."""
    kind: str = added("gpt")
    """"gpt": the built-in one. "transformers": a causal language model of that library. "factory": what a Python
    function makes."""
    name: str = added("")
    """For transformers: the model's name on the hub, or its folder's base name. For a factory: package.module:function,
    which is called with this section."""
    config: str = added("")
    """For transformers: the model's config.json as text."""
    weights_sha256: str = added("")
    """SHA-256 of the weights to begin with (see `models.weights_sha256`); "" = from scratch."""
    revision: str = added("")
    """Commit of the model on the hub."""
    params: int = added(0)
    """Number of trained parameters, for other kinds than gpt; for display."""

    @property
    def title(self) -> str:
        """The model in a word."""
        return self.preset if self.kind == GPT_KIND else self.name

    @property
    def num_params(self) -> int:
        """Number of scalars in all trained parameters, known without building the model."""
        if self.kind != GPT_KIND:
            return self.params
        return self.vocab_size * self.dim + self.num_layers * self.dim * (4 * self.dim + 2 * self.hidden_dim)

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        for name in ("vocab_size", "num_layers", "num_heads", "seq_len"):
            require(getattr(self, name) >= 1, f"model.{name}", "be at least 1", getattr(self, name))
        require(self.kind in MODEL_KINDS, "model.kind", f"be one of {', '.join(MODEL_KINDS)}", self.kind)
        if self.kind != GPT_KIND:
            self._check_named()
            return
        for name in ("dim", "hidden_dim"):
            value = getattr(self, name)
            require(value >= 64 and value % 64 == 0, f"model.{name}", "be a multiple of 64", value)
        require(
            self.dim % self.num_heads == 0 and self.dim // self.num_heads % 2 == 0,
            "model.num_heads",
            f"divide model.dim = {self.dim} into heads of even width",
            self.num_heads,
        )

    def _check_named(self) -> None:
        if self.kind == "factory":
            rule = "be package.module:function"
            require(
                re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.name) is not None,
                "model.name",
                rule,
                self.name,
            )
            return
        try:
            is_config = isinstance(json.loads(self.config), dict)
        except ValueError:
            is_config = False
        require(is_config, "model.config", "be the text of a config.json", self.config[:80])
        well_formed = re.fullmatch(r"([0-9a-f]{64})?", self.weights_sha256) is not None
        require(
            well_formed, "model.weights_sha256", "be 64 lower-case hex digits or empty", self.weights_sha256
        )


@dataclass(frozen=True)
class TrainConfig:
    """Inner training: what one worker does between two exchanges."""

    SECTION: ClassVar[str] = "train"

    inner_steps: int
    """Inner steps per round (H)."""
    batch_size: int
    """Sequences per inner step."""
    seq_len: int
    """Tokens per sequence; at most model.seq_len."""
    lr: float
    """Peak learning rate of the inner optimizer."""
    min_lr_ratio: float = 0.1
    """Learning rate at and after the end of the schedule, as a share of `lr`."""
    warmup_steps: int = 20
    """Inner steps of linear warm-up, counted from the run's beginning."""
    total_steps: int = 3000
    """Horizon of the cosine schedule, in inner steps of one worker; training may go on after it."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors have none."""
    clip: float = 1.0
    """Gradients are scaled down to this norm when they exceed it."""
    optimizer: str = "adamw"
    """Inner optimizer, a key of `optimizers.OPTIMIZERS`."""
    seed: int = 0
    """Seed of theta's initial value and of every worker's data stream."""
    method: str = added("full")
    """"full": all weights are trained. "lora": adapters of low rank beside frozen weights (arXiv 2106.09685). "qlora":
    the same, with the frozen weights in few bits (arXiv 2305.14314). For models of the transformers library."""
    lora_rank: int = added(16)
    """Rank of the adapters."""
    lora_alpha: float = added(32.0)
    """Adapters count alpha / rank times."""
    lora_targets: str = added("all-linear")
    """Layers that get adapters: "all-linear", or names such as "q_proj,v_proj"."""
    base_bits: int = added(4)
    """With qlora: bits of the frozen weights, 4 (NF4) or 8."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        for name in ("inner_steps", "batch_size", "seq_len", "total_steps"):
            require(getattr(self, name) >= 1, f"train.{name}", "be at least 1", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}", "be at least 0", getattr(self, name))
        for name in ("lr", "clip"):
            require(getattr(self, name) > 0, f"train.{name}", "be above 0", getattr(self, name))
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", "be at least 0 and below 1", value)
        require(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio", "be between 0 and 1", self.min_lr_ratio)
        require(self.seed < 2**63, "train.seed", "be below 2**63", self.seed)
        require(self.method in METHODS, "train.method", f"be one of {', '.join(METHODS)}", self.method)
        require(1 <= self.lora_rank <= 1024, "train.lora_rank", "be between 1 and 1024", self.lora_rank)
        require(self.lora_alpha > 0, "train.lora_alpha", "be above 0", self.lora_alpha)
        require(self.base_bits in (4, 8), "train.base_bits", "be 4 or 8", self.base_bits)


@dataclass(frozen=True)
class StrategyConfig:
    """How the workers' deltas become one outer step."""

    SECTION: ClassVar[str] = "strategy"

    name: str = "sparseloco"
    """A key of `strategies.STRATEGIES`."""
    outer_lr: float = 1.0
    """Step size of the outer step (alpha); strategies that collect gradients multiply it with the inner schedule's."""
    outer_momentum: float = 0.0
    """Nesterov momentum of the outer step (mu), for the strategies that have one."""
    feedback_decay: float = 0.95
    """Share of the error feedback that each round keeps (beta)."""
    min_outer_lr_ratio: float = added(1.0)
    """What is left of outer_lr at train.total_steps, to which it falls by a cosine; 1 = it does not."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        require(self.outer_lr > 0, "strategy.outer_lr", "be above 0", self.outer_lr)
        mu, beta, ratio = self.outer_momentum, self.feedback_decay, self.min_outer_lr_ratio
        require(0 <= mu < 1, "strategy.outer_momentum", "be at least 0 and below 1", mu)
        require(0 <= beta <= 1, "strategy.feedback_decay", "be between 0 and 1", beta)
        require(0 < ratio <= 1, "strategy.min_outer_lr_ratio", "be above 0 and at most 1", ratio)


@dataclass(frozen=True)
class ExchangeConfig:
    """How workers meet, and how long they wait for one another."""

    SECTION: ClassVar[str] = "exchange"

    start_workers: int = 1
    """Workers that must be visible before round 0 begins."""
    matchmaking_s: float = 15.0
    """Longest wait for missing workers once one worker is ready, in seconds."""
    round_timeout_s: float = 30.0
    """Longest time from a group's meeting to its last aggregate, in seconds."""
    sender_timeout_s: float = 10.0
    """How long a reducer waits for a silent sender before it goes on without it, in seconds."""
    heartbeat_s: float = 2.0
    """Seconds between two heartbeats of a worker."""
    heartbeat_ttl_s: float = 10.0
    """Age at which a heartbeat counts no more and its worker as gone, in seconds."""
    overlap: str = "none"
    """"none": train, exchange, train. "eager": exchange under the next round's inner steps; every worker applies its
    own delta at once and swaps the average in one round late (arXiv 2502.12996)."""
    round_tokens: int = 0
    """A round ends when all workers together have trained this many tokens; 0 = after train.inner_steps steps each."""
    round_deadline_s: float = 600.0
    """With round_tokens: a round's inner steps end after this many seconds at the latest."""
    max_round_tokens: int = 0
    """Most tokens that one worker can be credited with per round; 0 = 64 times a fixed round's. More is no weight."""
    exact_up_to: int = 4
    """Groups of up to this many workers exchange the exact union; larger ones compress each sum again."""
    screens: bool = added(True)
    """Whether, in those larger groups, a reducer leaves out or counts less what stands out from the others' updates:
    far too long, empty, copied, pointed away from them (`compression/screen.py`)."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        require(self.start_workers >= 1, "exchange.start_workers", "be at least 1", self.start_workers)
        require(
            self.overlap in OVERLAPS, "exchange.overlap", f"be one of {', '.join(OVERLAPS)}", self.overlap
        )
        require(self.round_tokens >= 0, "exchange.round_tokens", "be at least 0", self.round_tokens)
        require(
            self.max_round_tokens >= 0, "exchange.max_round_tokens", "be at least 0", self.max_round_tokens
        )
        require(self.exact_up_to >= 0, "exchange.exact_up_to", "be at least 0", self.exact_up_to)
        for name in (entry.name for entry in fields(self) if entry.name.endswith("_s")):
            require(getattr(self, name) > 0, f"exchange.{name}", "be above 0 seconds", getattr(self, name))
        sender, ttl = self.sender_timeout_s, self.heartbeat_ttl_s
        rule = f"be at most exchange.round_timeout_s = {self.round_timeout_s}"
        require(sender <= self.round_timeout_s, "exchange.sender_timeout_s", rule, sender)
        rule = f"be more than exchange.heartbeat_s = {self.heartbeat_s}"
        require(ttl > self.heartbeat_s, "exchange.heartbeat_ttl_s", rule, ttl)
