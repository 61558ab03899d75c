"""What the documents say of the code, and of each other, is so."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

import msgspec
import pytest

from rkcached.host.settings import Settings
from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.records import VerdictKind
from rkcached.reconcile.failures import QUARANTINE_AFTER
from rkcached.store.quarantine import MAX_QUARANTINED
from rkcached.store.sidecar import Figures, Sidecar
from tests.documents import DOCS, PAGES, README, ROOT

STORE = (DOCS / "store.md").read_text()
COMMANDS = (DOCS / "commands.md").read_text()
KINDS = {
    "For users": "*For users. ",
    "For those who change rkcached": "*For those who change rkcached. ",
}
"""The two lists at the end of README, and how a page of each begins."""


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of the project leads to one that is there, and to a real heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_have_at_most_120_letters(page: Path) -> None:
    """But for the rows of tables."""
    long = [
        line
        for line in page.read_text().splitlines()
        if len(line) > 120 and not line.startswith(("|", "!["))
    ]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_are_there(page: Path) -> None:
    """A test file that a page sends its reader to exists, and so does the test that it names."""
    for name, _, test in re.findall(r"(tests/[\w/]+\.py)(::(\w+))?", page.read_text()):
        assert (ROOT / name).is_file(), name
        assert not test or test in functions(ROOT / name), f"{name}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    """A page names a file or a folder of the project by its path from the top."""
    for name in re.findall(
        r"`((?:rkcached|tests|bench|packaging|scripts)/[\w./]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


def functions(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_readme_is_short() -> None:
    """One page: what else there is to say has a document of its own."""
    assert len(README.read_text().splitlines()) <= 130


def test_every_document_is_in_one_list_of_the_index() -> None:
    """README ends with two lists, and each page begins with whom it is for."""
    index = README.read_text().partition("\n## Documents\n")[2]
    listed = {}
    for kind, words in KINDS.items():
        (line,) = [part for part in index.split("\n\n") if part.strip().startswith(f"**{kind}:**")]
        for name in re.findall(r"\]\(docs/([\w-]+\.md)\)", line):
            assert name not in listed
            listed[name] = words
    assert set(listed) == {page.name for page in DOCS.glob("*.md")}
    for name, words in listed.items():
        title, blank, first = (DOCS / name).read_text().splitlines()[:3]
        assert title.startswith("# ")
        assert blank == ""
        assert first == f"{words}[All documents](../README.md#documents).*", name


def test_every_promise_has_its_test_and_its_largest_run() -> None:
    """They are numbered, and each has at least one test and says what was tried most."""
    text = (DOCS / "reliability.md").read_text().partition("\n## Longer runs\n")[0]
    promises = re.findall(r"^\*\*(\d+)\. .*?(?=^\*\*\d|^## |\Z)", text, re.DOTALL | re.MULTILINE)
    bodies = re.split(r"^\*\*\d+\. ", text, flags=re.MULTILINE)[1:]
    assert [int(number) for number in promises] == list(range(1, len(bodies) + 1))
    assert len(bodies) >= 15
    for body in bodies:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", body), body
        assert "\nLargest run: " in body, body


def test_pictures_are_small_and_shown() -> None:
    """Every clone has them, and `make pictures` draws those of the page and the terminal."""
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *DOCS.glob("*.md")))
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name}" in pages
        assert picture.stat().st_size < 150_000


def test_exit_codes_and_variables_are_those_of_the_manual() -> None:
    """docs/commands.md lists each exit code that rkcached(1) has, and each setting."""
    manual = re.findall(r"^\.It (\d+)$", (ROOT / "man/rkcached.1").read_text(), re.MULTILINE)
    assert re.findall(r"^\| (\d+) \|", COMMANDS, re.MULTILINE) == manual
    named = re.findall(r"^\| `--([\w-]+)` \| `(RKCACHED_\w+)` \|", COMMANDS, re.MULTILINE)
    assert [variable for _, variable in named] == [
        f"RKCACHED_{option.upper().replace('-', '_')}" for option, _ in named
    ]
    assert {f"RKCACHED_{name.upper()}" for name in Settings.model_fields} == {
        variable for _, variable in named
    }


def test_the_sidecar_is_as_the_page_shows_it() -> None:
    """The same fields in the same order."""
    (shown,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", STORE, re.DOTALL)]
    assert list(Sidecar.__struct_fields__) == list(shown)
    assert list(Figures.__struct_fields__) == list(shown["figures"])
    msgspec.convert(shown, Sidecar)


def test_the_fingerprint_is_what_the_page_says() -> None:
    """Computed by hand, from the page's words alone."""
    data = b"rkcached fingerprint\0" + (1).to_bytes(4, "little")
    for name, value in sorted(
        {"engine": "rkllm", "prefix.bytes": "12", "thinking": "unset"}.items()
    ):
        for text in (name.encode(), value.encode()):
            data += len(text).to_bytes(8, "little") + text
    wanted = fingerprint({"thinking": None, "prefix.bytes": 12, "engine": "rkllm"})
    assert hashlib.sha256(data).hexdigest() == wanted.digest


def test_verdicts_and_numbers_are_those_of_the_page() -> None:
    """Every kind of verdict is explained, and the numbers are the program's."""
    for kind in VerdictKind:
        assert f"`{kind}`" in STORE
    assert f"the last {MAX_QUARANTINED} artifacts" in STORE
    assert f"after {QUARANTINE_AFTER} failures" in STORE
