"""What a user installs is the whole of the project, under names that no other package can shadow."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compression", "dht", "experiments", "trainer")
SHIPPED = (*FOLDERS, "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
OTHERS = ("*.proto", "*.pyi")  # the control service as others read it, and its types
MODULES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
PAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "experiments" / "dashboard_static").rglob("*")
    if path.is_file()
}
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
IMPORT_NAMES = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "llvmlite": "numba",
    "triton": "torch",
}  # the rest are called what they are
EXTRAS = {
    "adamw8bit": ("trainer/optimizers.py", "trainer/models_hf.py"),
    "dashboard": "experiments/dashboard",
    "hf": "trainer/",
    "simulate": "experiments/",
    "tasks": "trainer/harness.py",
    "wandb": "trainer/wandb_log",
}
"""Extra -> where its libraries may be imported, by commands that tell who lacks them what to install."""
INSTALLER = "pip"  # is there before anything is pinned; pip-audit asks for it
OF_NVIDIA = ("nvidia-", "cuda-", "triton")  # torch pins them itself, where it needs them


def python(*args: str, cwd: Path, path: Path | None = None) -> str:
    """Standard output of this Python, with `path` before everything else that it can import from."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist that was built from the tree, without a network."""
    pytest.importorskip("setuptools", minversion="77")
    base = tmp_path_factory.mktemp("build")
    source = base / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, source)
    python("-c", BUILD, "build_sdist", str(base), cwd=source)
    (sdist,) = base.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert {member.partition("/")[2] for member in archive.getnames()} >= MODULES | {
            "README.md",
            "LICENSE",
        }
        archive.extractall(
            base / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    (unpacked,) = (base / "unpacked").iterdir()
    python("-c", BUILD, "build_wheel", str(base), cwd=unpacked)
    (built,) = base.glob("*.whl")
    return built


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    """Each source file and the dashboard's page are in the wheel below `dtrain/`; else only the metadata and OTHERS."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    others = {path.relative_to(ROOT).as_posix() for kind in OTHERS for path in (ROOT / "trainer").glob(kind)}
    assert names == {f"dtrain/{name}" for name in MODULES | PAGE | others}


def test_the_wheel_brings_the_command(wheel: Path) -> None:
    """Installing it gives the user a `dtrain` command."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert "dtrain = dtrain.trainer.cli:main" in archive.read(name).decode()


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked anywhere, it imports and runs from there."""
    place = tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(place)
    code = (
        "import dtrain.compression.spec as s, dtrain.trainer.cli as c; print(s.__file__); c.main(['--help'])"
    )
    printed = python("-c", code, cwd=tmp_path, path=place)
    assert Path(printed.splitlines()[0]).is_relative_to(place)
    assert "usage: dtrain" in printed


def test_the_installed_project_imports_from_anywhere(tmp_path: Path) -> None:
    """The install, not the current folder, is what makes `import dtrain...` work."""
    code = "import dtrain.compression.spec, dtrain.trainer.errors as m; print(m.__file__)"
    assert Path(python("-c", code, cwd=tmp_path).strip()).name == "errors.py"


def test_a_standard_library_package_named_compression_wins(tmp_path: Path) -> None:
    """With the project's own folder first in sys.path, Python 3.14's `compression` is still what others import."""
    package = tmp_path / "stdlib" / "compression"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("standard = True\n")
    code = f"import sys; sys.path.append({str(package.parent)!r})\n"
    if sys.version_info >= (3, 14):
        code = "import compression; compression.standard = bool(compression.__file__)\n"
    code += "import compression, gzip, tarfile, zipfile, dtrain.compression.spec; assert compression.standard"
    python("-c", code, cwd=ROOT, path=ROOT)


def test_what_is_imported_is_declared() -> None:
    """A fresh install has everything that the code imports: each outside library is in install_requires, or in the
    extra of its part of the code."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = {normal(line) for line in config["options"]["install_requires"].split("\n") if line.strip()}
    assert "torch" in declared
    extras = config["options.extras_require"]
    missing = []
    for name in sorted(MODULES):
        of_extras = {
            normal(line)
            for extra, place in EXTRAS.items()
            for line in extras[extra].split("\n")
            if line.strip() and name.startswith(place)
        }
        for module in outside_imports(ROOT / name):
            if normal(IMPORT_NAMES.get(module, module)) not in declared | of_extras:
                missing.append(f"{name}: {module}")
    assert not missing


def test_the_constraints_pin_what_is_declared() -> None:
    """Two people who run `make setup` get the same versions: each dependency, and theirs, has one pin per Python."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; python_version (>=|<) \"3\.11\")?", line) for line in pins)
    assert len(set(pins)) == len(pins)
    pinned = {normal(line) for line in pins}
    missing, ahead, wanted = set(), ["dtrain"], {"dtrain"}
    while ahead:
        parent = ahead.pop()
        for line in metadata.requires(parent) or ():
            requirement, name = Requirement(line), normal(line)
            extra = {"extra": "dev" if parent == "dtrain" else ""}
            if name in wanted or (requirement.marker and not requirement.marker.evaluate(extra)):
                continue
            if name == INSTALLER or name.startswith(OF_NVIDIA):
                continue
            wanted.add(name)
            ahead.append(name)
            if name not in pinned:
                missing.add(name)
    assert not missing


def outside_imports(path: Path) -> set[str]:
    """Top-level names of the modules a file imports that are neither Python's nor ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"dtrain"}


def normal(requirement: str) -> str:
    """The name in a requirement, spelt the one way in which names are compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0].lower())
