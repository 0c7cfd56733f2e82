"""The house keeps its floors: who may import whom, read from the source, not from what happens to be loaded."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("trainer", "compression", "dht", "experiments")
MAY_IMPORT = {
    "compression": {"compression"},
    "dht": {"dht", "compression"},
    "trainer": {"trainer", "compression"},
    "experiments": {"experiments", "trainer", "compression"},
}
# Only files that begin so observe a real network.
DHT_IN_EXPERIMENTS = ("lab", "demo", "dashboard", "bench_exchange", "bench_heartbeats", "bench_join")
MAX_LINES = 330
SUBFOLDERS = {"compression/kernels"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"eval", "exec"}
CODEC_NEEDS = {"torch", "numpy", "numba", "llvmlite", "triton"}
SLOW_TO_LOAD = {"torch", "hivemind", "numpy", "numba", "cryptography", "rich"}

DOTTED = re.compile(r"dtrain(\.\w+)+")

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, lazily, conditionally, for types only or by a name in a string."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.value  # for importlib or `python -m`


def allowed_floors(path: Path) -> set[str]:
    folder = path.relative_to(ROOT).parts[0]
    if folder == "trainer" and path.name.startswith("cli"):
        return set(FOLDERS)  # the composition root
    if folder == "experiments" and path.name.startswith(DHT_IN_EXPERIMENTS):
        return MAY_IMPORT[folder] | {"dht"}
    return MAY_IMPORT[folder]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_run_one_way() -> None:
    """Each folder imports only what lies below it; only the command line puts them together."""
    assert SOURCES
    for path in SOURCES:
        names = set(imported(path))
        floors = {name.split(".")[1] for name in names if name.startswith("dtrain.")}
        assert floors <= allowed_floors(path), name_of(path)
        assert not {name.split(".")[0] for name in names} & {*FOLDERS, "tests"}, (
            f"{name_of(path)}: no dtrain."
        )


def test_only_dht_knows_hivemind() -> None:
    """hivemind can be changed without touching another folder."""
    knowing = {path for path in SOURCES if "hivemind" in {name.split(".")[0] for name in imported(path)}}
    assert knowing and {path.relative_to(ROOT).parts[0] for path in knowing} == {"dht"}


def test_the_codec_needs_little() -> None:
    """compression/ can be used alone: torch, numpy and the compilers of its kernels are all that it needs."""
    for path in SOURCES:
        if path.is_relative_to(ROOT / "compression"):
            tops = {name.split(".")[0] for name in imported(path)}
            assert tops <= CODEC_NEEDS | sys.stdlib_module_names | {"dtrain"}, name_of(path)


def test_nothing_unpickles() -> None:
    """Nothing that can run code while it loads: no pickle in any guise, no torch.load, no yaml, no eval."""
    for path in SOURCES:
        names = set(imported(path))
        assert not {name.split(".")[0] for name in names} & UNSAFE_MODULES, name_of(path)
        loads = [node for node in nodes(path) if isinstance(node, ast.Attribute) and node.attr == "load"]
        used = {ast.unparse(node) for node in loads}
        assert "torch.load" not in names | used, name_of(path)
        for call in (node for node in nodes(path) if isinstance(node, ast.Call)):
            assert not isinstance(call.func, ast.Name) or call.func.id not in UNSAFE_CALLS, (
                f"{name_of(path)}:{call.lineno}"
            )
            assert "allow_pickle" not in {keyword.arg for keyword in call.keywords}, name_of(path)


def test_a_file_is_one_idea() -> None:
    """Files stay short, and say in their first line what they are about."""
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= MAX_LINES, name_of(path)
        assert ast.get_docstring(tree(path)), f"{name_of(path)}: begin with a docstring"


def test_the_folders_stay_flat_and_have_no_init() -> None:
    """With an __init__.py, `compression` beside a script would hide the standard library's package of that name."""
    for path in SOURCES:
        assert path.name != "__init__.py", name_of(path)
        folder = name_of(path.parent)
        assert folder in FOLDERS or folder in SUBFOLDERS, name_of(path)
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_mypy_sees_every_folder() -> None:
    """A broken link in typings/ would make mypy pass without reading anything."""
    for folder in FOLDERS:
        link = ROOT / "typings" / "dtrain" / folder
        assert link.resolve() == ROOT / folder


def test_help_loads_nothing_slow() -> None:
    """`dtrain --help` answers at once: a command's libraries are loaded when it runs."""
    code = "import sys, dtrain.trainer.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "dtrain" in loaded and not loaded & SLOW_TO_LOAD
