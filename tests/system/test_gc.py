"""`rkcached gc`: what serves nobody goes, what a prompt needs stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Workspace


@pytest.fixture
def littered(two_prompts: Workspace) -> Workspace:
    """A store that nobody has open: `a` and `b`, of which `b` is declared no more, and things that are not its own."""
    space = two_prompts
    space.stop()
    space.declare("{a: prompts/a.md}")
    space.write("cache/m/notes.txt", "x" * 100)
    space.write("cache/lost", "x" * 10)
    space.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 1000)
    space.write("elsewhere", "kept")
    (space.cache / "m/link.txt").symlink_to(space.root / "elsewhere")
    return space


def files(space: Workspace) -> set[str]:
    return {str(path.relative_to(space.cache)) for path in space.cache.rglob("*") if not path.is_dir()}


KEPT = {".lock", ".digests.json", "m/a.bin", "m/a.json", "m/a.memory_cache"}


def test_it_removes_what_serves_nobody_and_says_how_much(littered: Workspace) -> None:
    """Orphans, the quarantine, foreign files; a link, but not what it leads to. The second time there is nothing."""
    before = files(littered)
    planned = json.loads(littered.cli("gc", "--dry-run", "--json").stdout)
    assert files(littered) == before
    assert planned["removed"] is False
    removed = json.loads(littered.cli("gc", "--json").stdout)
    assert removed == {**planned, "removed": True}
    assert {(Path(item["path"]).name, item["reason"]) for item in removed["items"]} == {
        ("b.json", "not in the manifest"),
        ("m--a--0011", "quarantined"),
        ("notes.txt", "not a file of the store"),
        ("link.txt", "not a file of the store"),
        ("lost", "not a file of the store"),
    }
    assert removed["size_bytes"] == sum(item["size_bytes"] for item in removed["items"]) > 1110
    assert files(littered) == KEPT
    assert (littered.root / "elsewhere").read_text() == "kept"
    assert littered.cli("gc").stdout == "removed 0, 0 B\n"


def test_beside_a_daemon_it_only_says_what_could_go(two_prompts: Workspace) -> None:
    """The daemon is the single writer of its store."""
    two_prompts.write("cache/m/notes.txt", "x")
    assert "notes.txt" in two_prompts.cli("gc", "--dry-run").stdout
    assert "belongs to another daemon" in two_prompts.cli("gc", code=75).stderr
    assert (two_prompts.cache / "m/notes.txt").exists()


def test_a_directory_that_is_no_store_is_left_alone(workspace: Workspace) -> None:
    """A wrong --cache-dir must not cost anybody's files."""
    workspace.memory_model()
    workspace.declare("{}")
    workspace.write("cache/thesis.txt", "years of work")
    assert "is no store" in workspace.cli("gc", code=66).stderr
    assert files(workspace) == {"thesis.txt"}
