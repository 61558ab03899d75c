"""`rkcached gc`: what serves nobody goes, what a prompt needs stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Workspace

from rkcached.store import Store
from tests.waiting import wait_until


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


def test_a_running_daemon_does_it(two_prompts: Workspace) -> None:
    """It is the single writer of its store. The command prints the same as without it, and what is fresh stays."""
    two_prompts.write("cache/m/notes.txt", "x" * 100)
    two_prompts.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 1000)
    assert "notes.txt" in two_prompts.cli("gc", "--dry-run").stdout
    removed = json.loads(two_prompts.cli("gc", "--json").stdout)
    assert (removed["removed"], removed["size_bytes"]) == (True, 1100)
    assert [one["reason"] for one in removed["items"]] == ["quarantined", "not a file of the store"]
    assert files(two_prompts) == KEPT | {"m/b.bin", "m/b.json", "m/b.memory_cache"}
    assert two_prompts.cli("gc").stdout == "removed 0, 0 B\n"
    assert [two_prompts.ask(f"m/{name}")["rkcached"]["state"] for name in "ab"] == ["hit", "hit"]
    assert two_prompts.built() == ["a", "b"]


def test_asked_over_http(two_prompts: Workspace) -> None:
    """On the admin socket only; a dry run changes nothing; the status tells what there is to gain."""
    two_prompts.write("cache/m/notes.txt", "x" * 100)
    two_prompts.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 1000)
    with two_prompts.http() as client:
        assert client.post("/v1/gc", json={}).status_code == 403
    with two_prompts.http(admin=True) as client:
        dry = client.post("/v1/gc", json={"dry_run": True}).json()
        shown = two_prompts.status()["cache"]
        assert (shown["foreign_bytes"], shown["quarantine_bytes"], shown["orphan_bytes"]) == (100, 1000, 0)
        assert "100 B foreign, 1.0 kB quarantine" in two_prompts.cli("status").stdout
        assert (dry["object"], dry["removed"], dry["size_bytes"]) == ("cache.collected", False, 1100)
        assert (two_prompts.cache / "m/notes.txt").exists()
        wet = client.post("/v1/gc", json={"dry_run": False}).json()
        assert wet == {**dry, "removed": True}
    assert not (two_prompts.cache / "m/notes.txt").exists()
    shown = two_prompts.status()["cache"]
    assert (shown["max_bytes"], shown["used_bytes"]) == (None, sum(p.stat().st_size for p in caches(two_prompts)))


def caches(space: Workspace) -> list[Path]:
    return list((space.cache / "m").glob("*.memory_cache"))


def test_another_store_than_the_daemons_is_not_its_business(two_prompts: Workspace) -> None:
    """A store that another process has is refused as before, whatever daemon answers."""
    other = Store(two_prompts.root / "other")
    other.open()
    try:
        refused = two_prompts.cli("gc", "--cache-dir", str(other.root), code=75)
        assert "belongs to another daemon" in refused.stderr
    finally:
        other.close()


def with_1_mib(space: Workspace, **models: str) -> None:
    """A manifest with a budget, and of each model the prompts, a letter each."""
    declared = {
        model: {
            "path": "m.model",
            "params": {"max_context_len": 200_000},
            "prompts": {name: f"{name}.md" for name in names},
        }
        for model, names in models.items()
    }
    manifest = {"version": 1, "engine": {"kind": "memory"}, "cache": {"max_bytes": "1 MiB"}, "models": declared}
    space.write("manifest.yaml", json.dumps(manifest))


def test_foreign_files_count_and_gc_gives_their_room_back(workspace: Workspace) -> None:
    """What does not fit beside them is blocked with both numbers, in manifest order, and fresh when they are gone.

    The quarantine never keeps a prompt from its room: it yields.
    """
    text = "You are a prompt of some length. " * 1000
    for name in "ab":
        workspace.write(f"{name}.md", name + text)
    workspace.memory_model(context_tokens=200_000)
    workspace.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 900_000)
    with_1_mib(workspace, m="ab")
    workspace.start()
    workspace.wait_settled()
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "fresh"]
    size_bytes = workspace.prompt("b")["artifact"]["size_bytes"]
    workspace.hang_up()
    assert workspace.status()["cache"]["quarantine_bytes"] == 0
    foreign = workspace.write("cache/m/notes.txt", "x" * 500_000)
    workspace.hang_up()
    assert workspace.prompt("a")["state"] == "fresh"
    blocked = workspace.wait_state("b", "blocked")
    left = (1 << 20) - size_bytes - 500_000
    assert blocked["reason"] == f"needs {size_bytes:,} bytes, {left:,} of cache.max_bytes 1,048,576 are left"
    assert "500,000 bytes are taken by files that are not the store's: `rkcached gc`" in blocked["hint"]
    assert workspace.status()["cache"]["used_bytes"] == size_bytes + 500_000
    workspace.cli("gc")
    assert not foreign.exists()
    workspace.wait_state("b", "fresh", 20)


def test_an_edit_beside_a_prompt_that_does_not_fit(workspace: Workspace) -> None:
    """It is built once, in the room that it had; the other one, whose size is known, is not tried again.

    The edited one is all that its folder holds, and stays until the new one is there.
    """
    workspace.memory_model(context_tokens=200_000, prefill_us_per_token=10)
    workspace.write("a.md", "a" * 80_000)
    workspace.write("b.md", "b" * 50_000)
    with_1_mib(workspace, m="ab")
    workspace.start()
    workspace.wait_settled()
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "blocked"]
    before = workspace.log_text()
    for edition in "12":
        workspace.write("a.md", edition * 80_000)
        wait_until(lambda text=edition * 80_000: text in (workspace.cache / "m/a.bin").read_text(), "it is built", 30)
        workspace.wait_settled()
        workspace.hang_up()
    assert workspace.built() == ["a", "a", "a"]
    said = workspace.log_text().removeprefix(before)
    assert "prompt=b" not in said
    assert "artifact removed" not in said
    assert "build failed" not in said
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "blocked"]


def test_the_budget_follows_the_order_of_the_manifest(workspace: Workspace) -> None:
    """Nothing but the order changes, of prompts or of models: the one that was moved up is fresh."""
    workspace.memory_model(context_tokens=200_000)
    for name in "ab":
        workspace.write(f"{name}.md", name * 72_000)
    with_1_mib(workspace, m="ab", n="")
    workspace.start()
    workspace.wait_settled()
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "blocked"]
    with_1_mib(workspace, m="ba", n="")
    workspace.wait_state("b", "fresh", 30)
    assert workspace.prompt("a")["state"] == "blocked"
    with_1_mib(workspace, m="b", n="a")
    workspace.wait_settled()
    with_1_mib(workspace, n="a", m="b")
    wait_until(lambda: workspace.prompt("a", "n").get("state") == "fresh", "the other model comes first", 30)
    assert workspace.prompt("b")["state"] == "blocked"


def test_a_directory_that_is_no_store_is_left_alone(workspace: Workspace) -> None:
    """A wrong --cache-dir must not cost anybody's files."""
    workspace.memory_model()
    workspace.declare("{}")
    workspace.write("cache/thesis.txt", "years of work")
    assert "is no store" in workspace.cli("gc", code=66).stderr
    assert files(workspace) == {"thesis.txt"}
