"""The layout of the package: its pages name what is there, and each room says what it is for."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tests.documents import DOCS, ROOT

PACKAGE = ROOT / "rkcached"
PAGES = [DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"]
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

FILE = re.compile(r"`([\w.-]+/(?:[\w./-]*)|[\w-]+\.(?:py|toml))`")
"""A file or a folder in a page: it has a slash, or the ending of a module."""


MADE = {"dist/", "build/", "build/fuzz/findings", "build/fuzz/corpus", ".venv/corpus"}
"""By `make`."""


def layers() -> list[str]:
    """The rooms as import-linter has them, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = settings["tool"]["importlinter"]["contracts"][0]
    return [room for layer in contract["layers"] for room in layer.split(" | ")]


def rows(page: Path, heading: str) -> list[str]:
    """The rows of the first table below a heading."""
    below = page.read_text().split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"^\| (?!you want|room |---)(.*) \|$", below, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_in_the_tree(page: Path) -> None:
    """By their place in the package, or from the top of the repository."""
    named = set(FILE.findall(page.read_text())) - MADE
    assert len(named) > 20
    for name in sorted(named):
        assert any((top / name).exists() for top in (PACKAGE, ROOT, ROOT / "packaging")), name


def test_the_table_of_rooms_is_that_of_the_linter() -> None:
    """In the same order: a room uses those below it."""
    named = [
        row.split("`")[1].rstrip("/").removesuffix(".py") for row in rows(PAGES[0], "The rooms")
    ]
    assert len(named) == 13
    assert sorted(named) == sorted([*ROOMS, "daemon", "errors"])
    order = [room for room in layers() if room != "__main__"]
    assert set(named) == set(order)
    above = {"sources", "worker"}  # side by side in the linter's contract
    assert [r for r in named if r not in above] == [r for r in order if r not in above]


def test_each_kind_of_change_has_a_row() -> None:
    """Sixteen rows, each with the files to look in; together they reach every room."""
    table = rows(PAGES[1], "Where to change what")
    assert len(table) == 16
    assert all("`" in row for row in table)
    assert {name.split("/")[0] for row in table for name in FILE.findall(row)} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_does_and_who_calls_it(room: str) -> None:
    """In a paragraph, not in a line."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    assert len(lines) >= 2, text
    assert re.search(r"\bcalls?\b|\buses?\b", text), "who may call it"


def test_no_import_points_up() -> None:
    """But for those that are on the list, which only gets shorter."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignored = settings["tool"]["importlinter"]["contracts"][0].get("ignore_imports", [])
    rooms = {"sources", "plan", "store", "reconcile", "engines"}
    assert not [line for line in ignored if line.split(".")[1] in rooms]
