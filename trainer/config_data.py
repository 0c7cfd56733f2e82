"""The data section of a run's manifest: what the run is trained on, and how text becomes tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dtrain.trainer.config import added, require, settle_types
from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import without_login

DATA_SOURCES = ("stdlib", "file", "files", "hub")
STREAMED = ("files", "hub")
BYTES = "bytes"
BYTE_VALUES = 256
DEFAULT_LANES, MAX_LANES = 256, 1 << 20


@dataclass(frozen=True)
class PartConfig:
    """One source of a mixture; the data section itself is one where there is no mixture."""

    SECTION: ClassVar[str] = "data.mix"

    source: str = "files"
    """"files" or "hub", as data.source."""
    name: str = ""
    """See data.name."""
    sha256: str = ""
    """See data.sha256."""
    subset: str = ""
    """See data.subset."""
    split: str = "train"
    """See data.split."""
    revision: str = ""
    """See data.revision."""
    column: str = "text"
    """See data.column."""
    weight: float = 1.0
    """Share of the sequences that come from this part, in proportion to the others'."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        require(self.source in STREAMED, "data.mix.source", f"be one of {', '.join(STREAMED)}", self.source)
        require(bool(self.name), "data.mix.name", "name files or a data set", self.name)
        require(self.weight > 0, "data.mix.weight", "be above 0", self.weight)
        _refuse_login("data.mix.name", self.name)
        check_sha256("data.mix.sha256", self.sha256, needed=self.source == "files" and "://" not in self.name)


@dataclass(frozen=True)
class DataConfig:
    """What the run is trained on. Workers read it from their own disk or from where it is published; nobody of the
    run serves it."""

    SECTION: ClassVar[str] = "data"

    source: str = "stdlib"
    """"stdlib": the sources of the worker's own Python standard library. "file": one local text file. "files": text,
    JSONL, Parquet or Arrow, one file or a folder of them, local or at a URL. "hub": a data set by its name on the
    Hugging Face hub, streamed."""
    name: str = ""
    """Base name of the file or folder, or its URL; the data set's name; "" for stdlib and mixtures."""
    sha256: str = ""
    """Lower-case hex SHA-256 of local files, so that nobody trains on others by mistake; "" for the rest."""
    tokenizer: str = BYTES
    """How text becomes tokens: "bytes" = one token per byte, or a tokenizer by its name on the hub, by the base name of
    its file, or by its URL."""
    eval_fraction: float = 0.05
    """Share of the text kept out of training, for evaluation."""
    eval_tokens: int = 16384
    """Tokens per evaluation, at most; fixed windows spread evenly over the evaluation text."""
    tokenizer_sha256: str = added("")
    """Fingerprint of what the tokenizer does, see `tokenizer.fingerprint`; "" for bytes."""
    lanes: int = added(0)
    """Disjoint parts that each epoch is cut into; a worker trains on one of them, so that no two train on the same
    text. 0 = 256, or for "stdlib" and "file" at random places instead. Have several times the workers expected."""
    subset: str = added("")
    """Configuration of a hub data set, such as "sample-10BT"; "" = its default."""
    split: str = added("train")
    """Split of a hub data set."""
    revision: str = added("")
    """Commit of the hub data set, so that all workers read the same; "" = its newest."""
    column: str = added("text")
    """Column (JSON key) that holds the text."""
    mix: tuple[PartConfig, ...] = added(())
    """Several sources in place of one: tables with source, name, weight and so on, as [[data.mix]]."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        object.__setattr__(self, "mix", tuple(map(_part, _listed(self.mix))))
        choices = ", ".join(DATA_SOURCES)
        require(self.source in DATA_SOURCES, "data.source", f"be one of {choices}", self.source)
        share = self.eval_fraction
        require(0 < share <= 0.5, "data.eval_fraction", "be above 0 and at most 0.5", share)
        require(self.eval_tokens >= 1, "data.eval_tokens", "be at least 1", self.eval_tokens)
        if self.is_streamed and not self.lanes:
            object.__setattr__(self, "lanes", DEFAULT_LANES)
        require(0 <= self.lanes <= MAX_LANES, "data.lanes", f"be between 0 and {MAX_LANES}", self.lanes)
        require(bool(self.tokenizer), "data.tokenizer", "name a tokenizer, or be bytes", self.tokenizer)
        _refuse_login("data.tokenizer", self.tokenizer)
        rule = "be the tokenizer's fingerprint, 64 lower-case hex digits (dtrain tokenizer show prints it)"
        is_bytes = self.tokenizer == BYTES
        fits = not self.tokenizer_sha256 if is_bytes else _is_sha256(self.tokenizer_sha256)
        require(
            fits, "data.tokenizer_sha256", "be empty for bytes" if is_bytes else rule, self.tokenizer_sha256
        )
        if self.mix:
            return
        if self.source == "file":
            require(bool(self.name), "data.name", "be the file's base name", self.name)
        if self.source in STREAMED:
            require(bool(self.name), "data.name", "name files or a data set", self.name)
        needed = self.source == "file" or (self.source == "files" and "://" not in self.name)
        _refuse_login("data.name", self.name)
        check_sha256("data.sha256", self.sha256, needed=needed)

    @property
    def is_streamed(self) -> bool:
        """Whether documents are read as they are needed, rather than one text held as a whole."""
        return bool(self.mix) or self.source in STREAMED

    @property
    def parts(self) -> tuple[PartConfig, ...]:
        """The sources of a streamed run."""
        assert self.is_streamed
        if self.mix:
            return self.mix
        shared = {f.name for f in fields(PartConfig)} - {"weight"}
        return (PartConfig(**{name: getattr(self, name) for name in shared}),)

    @property
    def title(self) -> str:
        """What the run is trained on, in a few words."""
        if self.mix:
            return " and ".join(part.name for part in self.mix)
        return "Python's own library sources" if self.source == "stdlib" else self.name


def check_sha256(key: str, value: str, *, needed: bool) -> None:
    """Refuse what is no SHA-256; "" will do where none is needed."""
    require(_is_sha256(value) or not (needed or value), key, "be 64 lower-case hex digits", value)


def _refuse_login(key: str, url: str) -> None:
    shown = without_login(url)
    rule = "have no user name or password in its URL, as everybody in the run reads it"
    require(shown == url, key, rule, shown)


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _listed(value: Any) -> Any:
    require(isinstance(value, (list, tuple)), "data.mix", "be a list of tables: [[data.mix]]", value)
    return value


def _part(value: Any) -> PartConfig:
    if isinstance(value, PartConfig):
        return value
    require(isinstance(value, Mapping), "data.mix", "be a list of tables: [[data.mix]]", value)
    known = [f.name for f in fields(PartConfig)]
    for key in value:
        if key not in known:
            raise UsageError(f"unknown setting data.mix.{key}; known ones: {', '.join(known)}")
    return PartConfig(**value)
