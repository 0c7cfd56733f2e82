"""Streamed data: every format end to end, mixtures, assignment from the manifest alone, and bad data."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stream_data_tools import QUICK, TEXTS, manifest_for, opened, write
from test_assignment import settled
from test_worker import MODEL, assert_one_theta, swarm_of

from dtrain.experiments.range_server import serving
from dtrain.trainer import streamed
from dtrain.trainer.config_data import DataConfig, PartConfig
from dtrain.trainer.data import Corpus, Data, open_data
from dtrain.trainer.documents import documents
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.manifest import Manifest, manifest_from_toml, preset_manifest
from dtrain.trainer.prefetch import Ahead
from dtrain.trainer.run_file import write_run_file
from dtrain.trainer.sources import cut, local_files

pytest.importorskip("fsspec")
NAMES = ["a.txt", "a.jsonl", "a.parquet", "a.arrow", "stream.arrow"]


def take(
    data: Data, num: int, manifest: Manifest, round: int = 0, lane: int | None = None
) -> list[torch.Tensor]:
    train = manifest.train
    batches = data.batches(
        seed=train.seed,
        run_id=manifest.run_id,
        round=round,
        peer_id="peer",
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        lane=lane,
    )
    return [torch.cat((x, y[:, -1:]), 1) for x, y in itertools.islice(batches, num)]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_hold_every_document_once(name: str, tmp_path: Path) -> None:
    """However a file is cut, its pieces have all its documents, in order, each in one piece."""
    (file,) = local_files(write(tmp_path / name))
    for piece_bytes in (1_500, 10_000, 10**9):
        pieces = cut([file], piece_bytes)
        found = [text for piece in pieces for text in documents(piece, "text", pytest.fail)]
        assert "\n".join(found).replace("\n\n", "\n") == "\n".join(TEXTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_trains_and_evaluates(name: str, tmp_path: Path) -> None:
    """x and y are one token apart, sequences follow the documents with an end between them, evaluation is held out."""
    path = write(tmp_path / name)
    manifest = manifest_for(path)
    data = opened(manifest, path)
    joined = "\n".join(TEXTS) if name.endswith(".txt") else "\0".join(TEXTS)
    held = torch.cat([x for x, _ in data.eval_batches(batch_size=4, seq_len=32, max_tokens=320)])
    assert held.shape == (10, 32)
    trained = torch.cat(take(data, 6, manifest))
    assert trained.shape == (24, 33)
    for row in trained:
        for text in data.tokenizer.decode(row.tolist()).split("\0"):
            assert text in joined
    seen = {data.tokenizer.decode(row.tolist()) for row in trained}
    assert not seen & {data.tokenizer.decode(row.tolist()) for row in held}
    data.close()


def test_documents_end_with_an_end_token(tmp_path: Path) -> None:
    """Packed tokens are the documents, each followed by the end token, and nothing else."""
    path = write(tmp_path / "a.jsonl")
    data = opened(manifest_for(path), path)
    part = data.parts[0]
    packed = list(data._packed(iter(part.train), part, 32))
    tokens = np.concatenate([row[:-1] for row in packed]).tolist()
    texts = [text for piece in part.train for text in documents(piece, "text", pytest.fail)]
    whole = "".join(text + "\0" for text in texts).encode()
    assert bytes(tokens) == whole[: len(tokens)] and len(whole) - len(tokens) <= 33


def test_no_two_workers_train_on_the_same_sequence_within_an_epoch(tmp_path: Path) -> None:
    """50 rounds of 8 peers, by the manifest alone: within an epoch every piece falls to one of them, and so every
    sequence (here no two are alike)."""
    texts = [f"{i:06d}" * 5 for i in range(12000)]
    path = write(tmp_path / "a.jsonl", texts)
    manifest = manifest_for(path, data__lanes=32)
    data, again = opened(manifest, path), opened(manifest, path)
    part = data.parts[0]
    lanes = settled([f"peer-{i}" for i in range(8)], 32).values()
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for round, lane in itertools.product(range(50), lanes):
        assigned = data.assigned(part, round, lane)
        assert assigned == again.assigned(again.parts[0], round, lane)
        for epoch_and_piece in assigned:
            assert owner.setdefault(epoch_and_piece, (round, lane)) == (round, lane)
    epochs: dict[int, dict[bytes, tuple[int, int]]] = {}
    for (epoch, unit), who in list(owner.items())[:300]:
        for row in data._packed(iter([part.train[unit]]), part, 32):
            assert epochs.setdefault(epoch, {}).setdefault(row.tobytes(), who) == who


def test_a_stream_is_a_function_of_its_arguments_and_needs_no_past(tmp_path: Path) -> None:
    """Round 7 gives the same batches to who has just begun as to who was there all along; other rounds, other data."""
    path = write(tmp_path / "a.parquet")
    manifest = manifest_for(path)
    veteran, newcomer = opened(manifest, path), opened(manifest, path)
    for round in range(8):
        last = take(veteran, 3, manifest, round)
    fresh = take(newcomer, 3, manifest, 7)
    assert all(map(torch.equal, last, fresh))
    assert not torch.equal(last[0], take(newcomer, 1, manifest, 6)[0])
    assert not torch.equal(last[0], take(newcomer, 1, manifest, 7, lane=9)[0])


def test_windows_of_a_text_are_dealt_out_too(tmp_path: Path) -> None:
    """With lanes a plain text's sequences do not overlap, and those of two lanes are others."""
    path = tmp_path / "book.txt"
    path.write_bytes(np.arange(60_000, dtype="<u2").tobytes())
    sha256 = manifest_for(path).data.sha256
    named = {"data.source": "file", "data.name": "book.txt", "data.sha256": sha256, "data.lanes": 16}
    manifest = preset_manifest("lanes", "tiny", {**QUICK, **named})
    data = open_data(manifest, path)
    assert isinstance(data, Corpus) and data.windows_per_round == 8
    rows = [tuple(r.tolist()) for lane in range(16) for b in take(data, 2, manifest, 0, lane) for r in b]
    assert len(set(rows)) == len(rows) == 16 * 8
    again = take(data, 5, manifest, 0, 3)  # more than the round's share: from rounds that nobody reaches
    assert len({tuple(r.tolist()) for batch in again for r in batch}) == 20


def test_a_mixture_follows_its_weights(tmp_path: Path) -> None:
    """Sequences come from each part in proportion; each part has its own column."""
    write(tmp_path / "a.jsonl", ["a" * 100] * 600)
    write(tmp_path / "b.parquet", ["b" * 100] * 600, column="body")
    parts = [
        PartConfig(name="a.jsonl", sha256=manifest_for(tmp_path / "a.jsonl").data.sha256, weight=3),
        PartConfig(name="b.parquet", sha256=manifest_for(tmp_path / "b.parquet").data.sha256, column="body"),
    ]
    manifest = preset_manifest("mix", "tiny", {**QUICK, "data.mix": parts})
    data = opened(manifest, tmp_path)
    rows = torch.cat(take(data, 100, manifest))
    share = float((rows[:, 5] == ord("a")).float().mean())
    assert 0.68 < share < 0.82
    held = torch.cat([x for x, _ in data.eval_batches(batch_size=4, seq_len=32, max_tokens=320)])
    assert {chr(c) for c in held[:, 5].tolist()} <= {"a", "b", "\0"} and len(set(held[:, 5].tolist())) > 1
    path = tmp_path / "run.toml"
    path.write_text(write_run_file(manifest, str(path)))
    assert manifest_from_toml(path) == manifest
    assert Manifest.from_dict(manifest.to_dict()).hash == manifest.hash


def test_a_hub_data_set_is_found_by_name_subset_and_split(tmp_path: Path) -> None:
    """Through `datasets`, here from a folder laid out as on the hub: two configurations, two splits."""
    pytest.importorskip("datasets")
    for subset in ("one", "two"):
        (tmp_path / subset).mkdir()
        for split in ("train", "test"):
            write(tmp_path / subset / f"{split}.parquet", [f"{subset} {split} {i}" for i in range(300)])
    configs = "\n".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "\n".join(f"  - split: {split}\n    path: {subset}/{split}.parquet" for split in ("train", "test"))
        for subset in ("one", "two")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    hub = {"data.source": "hub", "data.name": str(tmp_path), "data.subset": "two"}
    manifest = preset_manifest("hub", "tiny", {**QUICK, **hub, "data.split": "test"})
    data = opened(manifest, None)
    texts = data.tokenizer.decode(torch.cat(take(data, 2, manifest)).flatten().tolist())
    assert "two test 1" in texts and "train" not in texts and "one" not in texts
    with pytest.raises(UsageError, match="has no split dev: it has"):
        opened(preset_manifest("hub", "tiny", {**QUICK, **hub, "data.split": "dev"}), None)
    with pytest.raises(UsageError, match="cannot get at the data set"):
        opened(preset_manifest("hub", "tiny", {**QUICK, **hub, "data.subset": "three"}), None)


# ---------------------------------------------------------------------- from a server


def url_manifest(url: str, **overrides: object) -> Manifest:
    return preset_manifest("http", "tiny", {**QUICK, "data.source": "files", "data.name": url, **overrides})


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_server_is_streamed_from_as_a_disk_is(name: str, tmp_path: Path) -> None:
    """The same pieces come over HTTP as from the file."""
    pytest.importorskip("aiohttp")
    path = write(tmp_path / name)
    with serving(tmp_path) as (url, _):
        remote = opened(url_manifest(f"{url}/{name}"), None)
        local = opened(manifest_for(path), path)
        files = [remote.parts[0].train[0].file], [local.parts[0].train[0].file]
        for far, near in zip(cut(files[0], 4000)[:6], cut(files[1], 4000)[:6], strict=True):
            assert list(documents(far, "text", pytest.fail)) == list(documents(near, "text", pytest.fail))
        assert len(take(remote, 3, url_manifest(f"{url}/{name}"))) == 3
        remote.close()


def test_a_dropped_connection_is_tried_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a flaky server sends in the end is what it should have sent; the user is told, once a try."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(streamed, "FIRST_RETRY_S", 0.05)
    write(tmp_path / "a.jsonl")
    lines: list[str] = []
    with serving(tmp_path) as (url, faults):
        manifest = url_manifest(f"{url}/a.jsonl")
        good = take(opened(manifest, None), 4, manifest)
        data = opened(manifest, None, lines)
        faults.cut_after = 500
        reader = Ahead(lambda: iter(take(data, 4, manifest)), threading.Event())
        while not any("does not answer" in line for line in lines):
            pass
        faults.cut_after = None
        assert all(map(torch.equal, good, itertools.islice(reader, 4)))
        reader.close()
        data.close()
    assert any(line.endswith("answers again.") for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_shard_that_vanishes_is_left_out_and_said(tmp_path: Path) -> None:
    """One file of two goes away while the run is on: one line, and training goes on with the other."""
    pytest.importorskip("aiohttp")
    lines: list[str] = []
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(folder / name, [f"{name} {i} " * 5 for i in range(300)])
    with serving(folder) as (url, faults):
        parts = [PartConfig(name=f"{url}/{name}", weight=1) for name in ("a.jsonl", "b.jsonl")]
        manifest = preset_manifest("mix", "tiny", {**QUICK, "data.mix": parts, "train.inner_steps": 40})
        data = opened(manifest, None, lines)
        first = data.parts[0]
        both = replace(first, train=[*first.train, *data.parts[1].train])
        assert next(data._packed(iter(both.train), both, 32)) is not None
        faults.gone.add("a.jsonl")
        rows = list(data._packed(iter(both.train), both, 32))
        assert all("b.jsonl" in data.tokenizer.decode(row.tolist()) for row in rows)
    assert lines == [f"Data: {url}/a.jsonl is gone: training goes on without it."]


# ---------------------------------------------------------------------- bad data


def test_bad_lines_and_bytes_cost_one_line_each(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, lines that are no JSON, texts that are none: named once, and the rest is used."""
    path = tmp_path / "a.jsonl"
    good = b"".join(b'{"text": "good %d"}\n' % i for i in range(200))
    path.write_bytes(
        good + b'{"text": "bad \xff\xfe"}\n{"text": \n[1]\n{"text": 7}\n{"text": null}\n' * 3 + good
    )
    said: list[str] = []
    (piece,) = cut(local_files(path), 10**9)
    found = list(documents(piece, "text", said.append))
    assert len(found) == 403 and found.count("bad \ufffd\ufffd") == 3
    assert {line.partition(":")[0].partition(" (")[0] for line in said} == {
        "a.jsonl has bytes that are no UTF-8",
        "a.jsonl has lines that are no JSON",
        "a.jsonl has 'text' that is no text but int",
    }


def test_undecodable_parquet_is_left_out_or_replaced(tmp_path: Path) -> None:
    """A string column with bytes that are no UTF-8 trains; a file that is no Parquet is left out with a line."""
    pa = pytest.importorskip("pyarrow")
    path = write(tmp_path / "a.parquet", ["fine"] * 100)
    column = pa.array([b"bad \xff"] * 100, pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"text": column}), path)
    said: list[str] = []
    (piece,) = cut(local_files(path), 10**9)
    assert list(documents(piece, "text", said.append)) == ["bad \ufffd"] * 100
    assert set(said) == {"a.parquet has bytes that are no UTF-8: each becomes U+FFFD"}
    path.write_bytes(b"no parquet at all, though its name says so")
    (piece,) = cut(local_files(path), 10**9)
    assert list(documents(piece, "text", said.append)) == []
    assert "it is left out" in said[-1]


def test_what_can_be_known_before_is_refused_before(tmp_path: Path) -> None:
    """Empty sets, wrong columns, other files, unknown formats: one line each, before anything begins."""
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"no column 'body': set data\.column to one of id, text"):
        opened(manifest_for(path, data__column="body"), path)
    manifest = manifest_for(path)
    write(path, TEXTS[:-1])
    with pytest.raises(UsageError, match=r"is not this run's a\.jsonl"):
        opened(manifest, path)
    with pytest.raises(UsageError, match=r"a\.jsonl: type --data PATH"):
        opened(manifest, None)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match=r"empty\.jsonl is empty"):
        local_files(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="No such file"):
        local_files(tmp_path / "nowhere")
    (tmp_path / "a.parquet").write_bytes(b"none")
    with pytest.raises(UsageError, match="cannot be read as parquet"):
        opened(manifest_for(tmp_path / "a.parquet"), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"in no known format"):
        opened(url_manifest("http://127.0.0.1:1/a.bin"), None)
    with pytest.raises(UsageError, match=r"data\.sha256 must be 64"):
        DataConfig(source="files", name="a.jsonl")
    with pytest.raises(UsageError, match=r"data\.mix\.source must be one of"):
        preset_manifest("mix", "tiny", {"data.mix": [{"source": "stdlib", "name": "x"}]})


def test_data_without_text_ends_with_a_line(tmp_path: Path) -> None:
    """A set of nothing but empty texts would spin for ever."""
    path = write(tmp_path / "a.jsonl", [""] * 500)
    manifest = manifest_for(path)
    with pytest.raises(RunError, match="no text in its column 'text'"):
        take(opened(manifest, path), 1, manifest)


def test_a_swarm_trains_on_streamed_data(tmp_path: Path) -> None:
    """Three workers, each in a lane of its own, hold one theta; the wait for data is in their metrics."""
    path = write(tmp_path / "a.jsonl")
    model = {key.replace(".", "__"): value for key, value in MODEL.items()}
    manifest = manifest_for(
        path, exchange__start_workers=3, exchange__heartbeat_s=0.05, data__lanes=4, **model
    )
    with swarm_of(manifest, tmp_path) as threads:
        for name in ("a", "b", "c"):
            threads.start(name, max_rounds=8, eval_every=4, data=path)
        threads.join()
        assert_one_theta(threads, 8)
        assert len({worker.feed.lane for worker in threads.workers.values()}) == 3
        rounds = threads.events("a", "round")
        assert rounds[-1]["loss"] < rounds[0]["loss"]
        assert 0.0 <= rounds[-1]["data_wait_s"] <= 120.0
