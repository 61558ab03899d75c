"""What the documents say of the code, and of each other, is so."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import msgspec
import pytest

from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.planner import VerdictKind
from rkcached.reconcile.verdicts import QUARANTINE_AFTER
from rkcached.store.sidecar import Figures, Sidecar
from rkcached.store.store import MAX_QUARANTINED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STORE = (ROOT / "docs" / "store.md").read_text()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of the project leads to one that is there, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_are_as_long_as_the_code_s(page: Path) -> None:
    """But for the rows of tables."""
    long = [
        line
        for line in page.read_text().splitlines()
        if len(line) > 120 and not line.startswith(("|", "!["))
    ]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_are_there(page: Path) -> None:
    """A test file that a page sends its reader to exists."""
    for name in re.findall(r"tests/[\w/]+\.py", page.read_text()):
        assert (ROOT / name).is_file(), name


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
