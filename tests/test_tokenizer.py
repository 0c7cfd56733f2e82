"""Tokenizers: made here, bound to the run by what they do, and shown with the data before anybody trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stream_data_tools import QUICK, TEXTS, manifest_for, write

from dtrain.trainer.cli import main
from dtrain.trainer.cli_propose import tokenizer_of_model
from dtrain.trainer.data import open_data
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.streamed import StreamedCorpus
from dtrain.trainer.tokenizer import ByteTokenizer, load, open_tokenizer

pytest.importorskip("tokenizers")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.jsonl and a tokenizer of 400 tokens trained on it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    assert main(["tokenizer", "train", "--data", "a.jsonl", "--vocab", "400", "--out", "t.json"]) == 0
    return tmp_path


def of_run(folder: Path, **overrides: object) -> Manifest:
    found = load(str(folder / "t.json"))
    named = {
        "data__tokenizer": "t.json",
        "data__tokenizer_sha256": found.fingerprint,
        "model__vocab_size": 448,
    }
    return manifest_for(folder / "a.jsonl", **{**named, **overrides})


def test_a_trained_tokenizer_gives_back_what_it_got(made: Path) -> None:
    """Byte-level BPE: every text comes back, in fewer tokens than bytes; none is added at its ends."""
    tokenizer = load(str(made / "t.json"))
    assert 257 < tokenizer.size <= 400
    texts = [*TEXTS[:20], "äß 🙂\n\t"]
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(tokens.tolist()) == text
        assert tokenizer.end not in tokens
    assert len(tokenizer.encode([TEXTS[39]])[0]) < len(TEXTS[39]) / 1.5


def test_a_run_on_its_tokens_trains_and_other_tokenizers_are_refused(made: Path) -> None:
    """Streamed and plain data go through the tokenizer; one that does otherwise is refused by its fingerprint."""
    manifest = of_run(made)
    data = open_data(manifest, made / "a.jsonl", made / "t.json")
    assert isinstance(data, StreamedCorpus)
    x, _ = next(data.batches(seed=0, run_id="r", round=0, peer_id="p", batch_size=2, seq_len=32))
    assert "Document" in data.tokenizer.decode(x.flatten().tolist())
    data.close()
    (made / "a.txt").write_text("\n".join(TEXTS))
    source = manifest_for(made / "a.txt").data
    plain = {"data__source": "file", "data__name": "a.txt", "data__sha256": source.sha256}
    corpus = open_data(of_run(made, **plain), made / "a.txt", made / "t.json")
    assert "Document" in corpus.tokenizer.decode(corpus.prompt(0, 100))

    tree = json.loads((made / "t.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:-5]
    (made / "u.json").write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=r"u\.json is not this run's t\.json, whose fingerprint begins"):
        open_data(manifest, made / "a.jsonl", made / "u.json")
    with pytest.raises(UsageError, match=r"type --tokenizer PATH with your copy"):
        open_tokenizer(replace(manifest.data, tokenizer="elsewhere.json"))
    with pytest.raises(UsageError, match=r"set model\.vocab_size to"):
        open_data(of_run(made, model__vocab_size=300), made / "a.jsonl", made / "t.json")
    with pytest.raises(UsageError, match="tokens are bytes: leave out --tokenizer"):
        open_tokenizer(preset_manifest("r").data, made / "t.json")
    with pytest.raises(UsageError, match=r"data\.tokenizer_sha256 must be the tokenizer's fingerprint"):
        preset_manifest("r", "tiny", {**QUICK, "data.tokenizer": "t.json"})


def test_a_broken_file_and_an_unknown_name_are_explained(made: Path) -> None:
    """One line each."""
    (made / "broken.json").write_text("{}")
    with pytest.raises(UsageError, match=r"broken\.json cannot be read"):
        load(str(made / "broken.json"))
    (made / "endless.json").write_text((made / "t.json").read_text().replace("<|endoftext|>", "<|x|>"))
    with pytest.raises(UsageError, match="no token that ends a document"):
        load(str(made / "endless.json"))


def test_bytes_are_a_tokenizer_too() -> None:
    """Every text, also with lone surrogates as JSON may hold them, becomes bytes and comes back."""
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(["aé", "\ud800"])
    assert tokenizer.decode(tokens[0].tolist()) == "aé"
    assert len(tokens[1]) == 3


def test_data_can_be_looked_at_before_training(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dtrain data check` shows samples, tokens and speed; `assign` says what a peer gets; mistakes have a line."""
    flags = ["--data", "a.jsonl", "--tokenizer", "t.json"]
    assert main(["data", "check", *flags, "--seconds", "0.1", "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "a.jsonl: 1 files" in shown and "tokens/s" in shown and shown.count(" tokens, ") >= 2
    assert main(["data", "assign", *flags, "--peer-id", "x", "--round", "3"]) == 0
    first = capsys.readouterr().out
    assert "lane" in first and "piece" in first
    assert main(["data", "assign", *flags, "--peer-id", "x", "--round", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main(["data", "check", "--data", "a.jsonl", "--column", "body"]) == 2
    assert "no column 'body'" in capsys.readouterr().err
    assert main(["data", "check", "--data", "a.jsonl", "--dataset", "b"]) == 2
    assert "type one of them" in capsys.readouterr().err
    assert main(["create", "--run-id", "ours", *flags]) == 0
    assert main(["data", "check", "--run-id", "ours", *flags, "--seconds", "0.1"]) == 0
    assert "in tokens of t.json" in capsys.readouterr().out


def test_a_trained_model_brings_its_tokenizer(made: Path) -> None:
    """From its folder, or under its name on the hub; a config, a factory and a folder without one bring none."""
    (made / "model").mkdir()
    assert tokenizer_of_model("model") is None
    (made / "model" / "tokenizer.json").write_text((made / "t.json").read_text())
    assert tokenizer_of_model("model") == "model"
    assert tokenizer_of_model("org/name") == "org/name"
    assert [tokenizer_of_model(name) for name in (None, "c.json", "package.module:make")] == [
        None,
        None,
        None,
    ]
