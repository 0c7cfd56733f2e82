"""Small data in the formats of the real sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dtrain.trainer.data import open_data
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.sources import local_files, local_sha256
from dtrain.trainer.streamed import StreamedCorpus

QUICK = {"train.batch_size": 4, "train.seq_len": 32, "train.inner_steps": 2, "data.eval_tokens": 320}
TEXTS = [f"Document {i}: " + " ".join(f"w{(i * j) % 97}" for j in range(3 + i % 40)) for i in range(600)]


def write(path: Path, texts: Sequence[str] = TEXTS, column: str = "text") -> Path:
    """The texts in the format that the path's suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: t}) + "\n" for i, t in enumerate(texts)))
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"id": list(range(len(texts))), column: list(texts)})
        if path.suffix == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, path, row_group_size=50)
        else:
            kind = pa.ipc.new_stream if "stream" in path.stem else pa.ipc.new_file
            with kind(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
    return path


def manifest_for(path: Path, **overrides: object) -> Manifest:
    """A run on a local file or folder; double underscores stand for dots."""
    sha256 = local_sha256(path, local_files(path))
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    local = {"data.source": "files", "data.name": path.name, "data.sha256": sha256}
    return preset_manifest("streamed", "tiny", {**QUICK, **local, **dotted})


def opened(manifest: Manifest, path: Path | None, lines: list[str] | None = None) -> StreamedCorpus:
    data = open_data(manifest, path, None, (lines if lines is not None else []).append)
    assert isinstance(data, StreamedCorpus)
    return data
