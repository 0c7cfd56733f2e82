"""How text becomes tokens and back: bytes, or a tokenizer of the `tokenizers` library by file, URL or name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dtrain.trainer.config_data import BYTE_VALUES, BYTES, DataConfig
from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import one_line

if TYPE_CHECKING:
    import tokenizers

END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
"""How tokenizers call the token that ends a document."""
PROBES = (
    "The quick brown fox",
    "  two  spaces\n\ttab",
    "3.14159 + x[0] = {}",
    "ÄÖÜ äöü ß é",
    "日本語 и русский",
    "🙂",
)
NEEDS_HF = "type pip install 'dtrain[hf]'"


class Tokenizer(Protocol):
    """What training and sampling need."""

    size: int
    """Number of distinct tokens."""
    end: int
    """The token that ends a document."""

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """Each text's tokens, without any at its ends."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; what is no UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """One token per byte of UTF-8. A zero byte ends a document."""

    size = BYTE_VALUES
    end = 0

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """See Tokenizer."""
        return [np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return bytes(token for token in tokens if token < BYTE_VALUES).decode("utf-8", "replace")


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str) -> None:
        self.inner = inner
        ends = [inner.token_to_id(token) for token in END_NAMES]
        end = next((token for token in ends if token is not None), None)
        if end is None:
            raise UsageError(
                f"the tokenizer {name} has no token that ends a document: give it one of {', '.join(END_NAMES)}"
            )
        self.end: int = end
        self.size: int = 1 + max(inner.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer[Any]]]:
        """See Tokenizer."""
        dtype = np.uint16 if self.size <= 1 << 16 else np.int32
        found = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=dtype) for encoding in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """See Tokenizer."""
        return self.inner.decode([token for token in tokens if token < self.size], skip_special_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what it does: its vocabulary, and what becomes of each token's own text and of some others.

        Unlike the bytes of its file, that stays the same when a version of the library writes the file in another way.
        """
        vocabulary = sorted(self.inner.get_vocab(with_added_tokens=True).items())
        texts = [*PROBES, *(self.inner.decode([token], skip_special_tokens=False) for _, token in vocabulary)]
        tokens = [array.tolist() for array in self.encode(texts)]
        return hashlib.sha256(json.dumps([vocabulary, tokens, self.end]).encode()).hexdigest()


def open_tokenizer(config: DataConfig, path: Path | None = None) -> Tokenizer:
    """The tokenizer that a manifest's data section names; `path` is this machine's copy of its file, if it has one.

    UsageError if it cannot be had, or is another one.
    """
    if config.tokenizer == BYTES:
        if path is not None:
            raise UsageError(f"this run's tokens are bytes: leave out --tokenizer {path}")
        return ByteTokenizer()
    found = load(str(path) if path is not None else config.tokenizer)
    if found.fingerprint != config.tokenizer_sha256:
        raise UsageError(
            f"the tokenizer {path or config.tokenizer} is not this run's {config.tokenizer}, whose fingerprint begins "
            f"{config.tokenizer_sha256[:16]}: type --tokenizer with the same file as the others"
        )
    return found


def load(name: str) -> LibraryTokenizer:
    """A tokenizer by its file, folder, URL or name on the hub. UsageError if it cannot be had."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores are for the training
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError(f"the tokenizer {name} needs the tokenizers library: {NEEDS_HF}") from None
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        if "://" in name:
            import fsspec

            with fsspec.open(name, "rb") as file:
                return LibraryTokenizer(Tokenizer.from_buffer(file.read()), name)
        if path.exists():
            return LibraryTokenizer(Tokenizer.from_file(str(path)), name)
    except UsageError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"the tokenizer {name} cannot be read: {one_line(error)}") from None
    if name.endswith(".json"):
        raise UsageError(
            f"this run's tokenizer is the file {name}: type --tokenizer PATH with your copy of it"
        )
    try:
        return LibraryTokenizer(Tokenizer.from_pretrained(name), name)
    except UsageError:
        raise
    except Exception as error:  # no such name, no network, no fast tokenizer
        raise UsageError(
            f"the tokenizer (--tokenizer) {name} is no file here, and cannot be had from the hub: {one_line(error)}"
        ) from None
