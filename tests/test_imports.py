# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, those inside of functions too. Read from the sources: what a module loads
says nothing of who asked for it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each room imports of fastrec: rooms listed before it, the extension, the folder of recipes.
MAY = {
    "tensors": set(),
    "backend": {"_C"},
    "random": {"tensors"},
    "ops": {"backend", "random", "tensors"},
    "kernels": {"backend", "ops"},
    "data": {"backend", "random"},
    "nn": {"data", "ops", "random"},
    "objectives": {"data", "nn", "ops", "random"},
    "evaluation": {"data", "nn", "objectives", "ops", "random"},
    "training": {"backend", "data", "evaluation", "nn", "objectives", "ops", "random", "recipes"},
}


def imported(source: str) -> set[str]:
    """The parts of fastrec, files or folders, that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            module = node.module or ""
            whole = [f"{module}.{alias.name}" for alias in node.names]
            names.update(whole if module == "fastrec" else [module])
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    parts = (name.split(".") for name in names)
    return {(*part, "all of it")[1] for part in parts if part[0] == "fastrec"}


def of_room(room: str) -> set[str]:
    place = ROOT / ("kernels" if room == "kernels" else f"fastrec/{room}")
    files = [*place.rglob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
    return set().union(*(imported(file.read_text()) for file in files)) - {room}


def test_the_reader_finds_imports():
    text = "def f():\n from fastrec.nn.pool import a\nimport fastrec.data\nfrom fastrec import b"
    assert imported(text) == {"nn", "data", "b"}
    assert imported("import torch\nfrom torch import nn\nimport fastrec") == {"all of it"}


@pytest.mark.parametrize("room", MAY)
def test_what_a_room_imports(room):
    assert of_room(room) == MAY[room]


@pytest.mark.parametrize("room", MAY)
def test_rooms_point_one_way(room):
    behind = [*MAY][[*MAY].index(room) :]
    assert not MAY[room] & set(behind)
