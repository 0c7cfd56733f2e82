"""Dockerfile and compose.yaml: what they copy exists, what they type is understood, the linters do not complain."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.dht.invite import Invite
from dtrain.trainer.cli import parse

ROOT = Path(__file__).parent.parent
PEER = "12D3KooWAFrq41GtRiDSGeKvjd3UycrWzVWjDf5p6PBXbiPpzMeK"
INVITE = Invite("our-model", bytes(32), bytes(32), (f"/ip4/10.0.0.1/tcp/31337/p2p/{PEER}",)).encode()


def copied() -> set[str]:
    """Top-level files and folders that the image is built from."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return {word for line in lines for word in line.split()[:-1]}


def test_the_image_is_built_from_all_that_the_package_needs() -> None:
    """The packages' folders and the build's files are copied, exist, and are not hidden from the builder."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {
        line.split(" = ")[1].split("/")[0] for line in config["options"]["package_dir"].split("\n")[1:]
    }
    assert copied() >= folders | {"setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    shown = (ROOT / ".dockerignore").read_text().split()
    for name in copied():
        assert (ROOT / name).exists() and f"!{name}" in shown, name


def typed() -> list[list[str]]:
    """Every command of compose.yaml and of the comments above both files, as dtrain gets it."""
    compose = (ROOT / "compose.yaml").read_text()
    found = [re.findall(r'"([^"]*)"', words) for words in re.findall(r"command: \[(.*)\]", compose)]
    found += [
        shlex.split(line.split("dtrain ", 1)[1])
        for line in re.findall(
            r"docker run .* (dtrain join .*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
        )
    ]
    values = {"DTRAIN_INVITE": INVITE, "DTRAIN_PORT": "31337", "DTRAIN_RUN_ID": "our-model"}
    filled = [re.sub(r"\$\{(\w+):-[^}]*\}", lambda m: values[m[1]], "\n".join(words)) for words in found]
    return [words.replace("dtrain://...", INVITE).split("\n") for words in filled]


def test_what_compose_types_is_understood() -> None:
    """Every flag exists, and the ports agree with those that are published."""
    assert {words[0] for words in typed()} == {"join", "bootstrap"} and len(typed()) == 4
    for words in typed():
        assert parse(words).port == 31337


@pytest.mark.docker
def test_the_linters_have_no_complaint(tmp_path: Path) -> None:
    """hadolint on the Dockerfile; the Compose specification's schema on compose.yaml; both do find mistakes."""
    tools = Path(sys.executable).parent
    lint = [str(tools / "hadolint"), "--no-color"]
    schema = [str(tools / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    for command, name, right, wrong in (
        (lint, "Dockerfile", "USER 1000", "USER root"),
        (schema, "compose.yaml", "restart: on-failure", "restart: [1]"),
    ):
        sound = subprocess.run([*command, str(ROOT / name)], capture_output=True, text=True, check=False)
        assert sound.returncode == 0, sound.stdout + sound.stderr
        spoiled = tmp_path / name
        spoiled.write_text((ROOT / name).read_text().replace(right, wrong))
        assert subprocess.run([*command, str(spoiled)], capture_output=True, check=False).returncode != 0, (
            name
        )
