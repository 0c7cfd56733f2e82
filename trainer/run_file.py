"""The run file that `dtrain create` writes: every setting of a run, with what it means beside it."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from dtrain.trainer.manifest import SECTIONS, Manifest

WIDTH = 100
HEAD = """\
# The settings of the run {run_id}: the same for all of its workers. A changed setting is a new run.
# Check it with:  dtrain create --check {path}
"""


def write_run_file(manifest: Manifest, path: str) -> str:
    """The manifest as TOML that `manifest_from_toml` reads back to the same settings."""
    lines = [HEAD.format(run_id=manifest.run_id, path=path), f"run_id = {json.dumps(manifest.run_id)}"]
    for name, kind in SECTIONS.items():
        lines += ["", f"[{name}]"]
        meanings, section = field_docs(kind), getattr(manifest, name)
        for field in fields(kind):
            text = " ".join(meanings.get(field.name, "").split())
            lines += ["", *(f"# {line}" for line in textwrap.wrap(text, WIDTH))]
            lines.append(f"{field.name} = {_toml(getattr(section, field.name))}")
    return "\n".join(lines) + "\n"


def field_docs(kind: type[Any]) -> dict[str, str]:
    """{field: the docstring below it} of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:]):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[node.target.id] = str(after.value.value)
    return found


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in asdict(value).items()) + " }"
    return json.dumps(value)
