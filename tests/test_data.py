"""Data: what a worker trains on is a function of run, round and peer id, and wrong files are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.trainer import data
from dtrain.trainer.config_data import DataConfig
from dtrain.trainer.data import END_OF_DOCUMENT, Corpus, file_sha256, open_corpus
from dtrain.trainer.errors import UsageError

TEXT = bytes(itertools.islice(itertools.cycle(range(32, 127)), 5000))


def text_file(folder: Path, content: bytes = TEXT) -> tuple[Path, DataConfig]:
    path = folder / "book.txt"
    path.write_bytes(content)
    return path, DataConfig(source="file", name=path.name, sha256=file_sha256(path))


def take(corpus: Corpus, num: int = 3, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    arguments = {"seed": 0, "run_id": "r", "round": 1, "peer_id": "p", "batch_size": 4, "seq_len": 16}
    return list(itertools.islice(corpus.batches(**(arguments | changes)), num))  # type: ignore[arg-type]


def test_a_stream_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    """Equal arguments give equal batches; a change of any of run, round, peer and seed gives others."""
    path, config = text_file(tmp_path)
    corpus, again = open_corpus(config, path), open_corpus(config, path)
    first = take(corpus)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, take(again), strict=True))
    for change in ({"seed": 1}, {"run_id": "q"}, {"round": 2}, {"peer_id": "o"}):
        other = take(corpus, **change)
        assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True)), change


def test_a_stream_is_the_same_on_every_machine() -> None:
    """Places come from Philox's raw output, which no version of numpy may change; some are written here."""
    corpus = Corpus(train=np.arange(256, dtype=np.uint8), eval=np.zeros(64, np.uint8))
    (x, _), *_ = take(corpus, 1)
    assert x[:, 0].tolist() == [82, 231, 40, 225]


def test_targets_are_one_token_ahead(tmp_path: Path) -> None:
    """y[i] is the token that follows x[i], in training and evaluation alike; both are int64."""
    path, config = text_file(tmp_path)
    corpus = open_corpus(config, path)
    batches = take(corpus) + list(corpus.eval_batches(batch_size=4, seq_len=16, max_tokens=200))
    for x, y in batches:
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal((x - 32 + 1) % 95, y - 32)  # the file counts upwards


def test_evaluation_text_is_never_trained_on(tmp_path: Path) -> None:
    """The tail of a file is kept for evaluation; the two parts make up the whole file."""
    path, config = text_file(tmp_path)
    corpus = open_corpus(config, path)
    assert bytes(corpus.train) + bytes(corpus.eval) == TEXT
    assert len(corpus.eval) == 250


def test_evaluation_windows_are_fixed_and_spread_over_the_whole_text() -> None:
    """From the first token to the last, no more tokens than asked for."""
    corpus = Corpus(train=np.zeros(64, np.uint8), eval=np.arange(200, dtype=np.uint8))
    windows = torch.cat([x for x, _ in corpus.eval_batches(batch_size=3, seq_len=10, max_tokens=100)])
    assert windows.shape == (10, 10)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 198


def test_the_standard_library_is_a_corpus_split_by_documents() -> None:
    """Nothing to download: the interpreter's own sources, with whole files held out."""
    corpus = open_corpus(DataConfig())
    assert len(corpus.train) > 3_000_000
    assert 0.01 < len(corpus.eval) / (len(corpus.train) + len(corpus.eval)) < 0.25
    documents = bytes(corpus.train).split(END_OF_DOCUMENT)
    held_out = {text for text in bytes(corpus.eval).split(END_OF_DOCUMENT) if len(text) > 200}
    assert held_out.isdisjoint(documents)
    again = open_corpus(DataConfig())
    assert np.array_equal(corpus.train, again.train)


def test_tests_and_packages_are_no_part_of_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs between installations of one Python stays out."""
    kept = [f"{folder}{number}.py" for folder in ("", "a/") for number in range(8)]
    left_out = ["test/t.py", "a/tests/t.py", "site-packages/p.py", "a/__pycache__/c.py", "d.txt"]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(data, "stdlib_folder", lambda: tmp_path)
    corpus = open_corpus(DataConfig(eval_fraction=0.5))
    documents = (bytes(corpus.train) + bytes(corpus.eval)).decode().split(END_OF_DOCUMENT.decode())
    assert sorted(documents) == sorted(["", *kept])


def test_a_python_without_sources_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripped installations exist; the way out is --data."""
    monkeypatch.setattr(data, "stdlib_folder", lambda: tmp_path)
    with pytest.raises(UsageError, match="type --data PATH"):
        open_corpus(DataConfig())


def test_wrong_files_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """Missing, unreadable, empty, other and superfluous files each have their line."""
    path, config = text_file(tmp_path)
    with pytest.raises(UsageError, match=r"book\.txt: type --data PATH"):
        open_corpus(config)
    with pytest.raises(UsageError, match=r"cannot read .*nowhere: No such file"):
        open_corpus(config, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"cannot read .*Is a directory"):
        open_corpus(config, tmp_path)
    with pytest.raises(UsageError, match=r"leave out --data"):
        open_corpus(DataConfig(), path)
    path.write_bytes(TEXT + b"x")
    with pytest.raises(UsageError, match=r"is not this run's book\.txt"):
        open_corpus(config, path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        file_sha256(path)


def test_a_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    """The line gives both lengths."""
    path, config = text_file(tmp_path, b"too short")
    with pytest.raises(UsageError, match=r"too short: a part of 8 tokens"):
        take(open_corpus(config, path), 1)
