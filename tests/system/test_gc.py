"""`rkcached gc`: what serves nobody goes, what a prompt needs stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Workspace, need

from rkcached.store.store import Store
from tests.waiting import BEFORE_RESCAN_S, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def littered(two_prompts: Workspace) -> Workspace:
    """A store that nobody has open: `a` and `b`, of which `b` is declared no more.

    In it are also things that are not its own.
    """
    space = two_prompts
    space.stop()
    space.declare("{a: prompts/a.md}")
    space.write("cache/m/notes.txt", "x" * 100)
    space.write("cache/lost", "x" * 10)
    space.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 1000)
    space.write("elsewhere", "kept")
    space.write("cache/m/sub/deep.txt", "years")
    (space.cache / "m/link.txt").symlink_to(space.root / "elsewhere")
    return space


def files(space: Workspace) -> set[str]:
    return {
        str(path.relative_to(space.cache)) for path in space.cache.rglob("*") if not path.is_dir()
    }


KEPT = {".lock", ".digests.json", "CACHEDIR.TAG", "m/a.bin", "m/a.json", "m/a.memory_cache"}
STRANGERS = {"lost", "m/notes.txt", "m/link.txt", "m/sub/deep.txt"}
ASK = "not the store's: --strangers removes it"


def test_it_removes_what_serves_nobody_and_says_how_much(littered: Workspace) -> None:
    """Orphans and the quarantine.

    What is not the store's is listed with its size, and stays. The second time, too.
    """
    before = files(littered)
    planned = json.loads(littered.cli("gc", "--dry-run", "--json").stdout)
    assert files(littered) == before
    assert planned["removed"] is False
    removed = json.loads(littered.cli("gc", "--json").stdout)
    assert removed == {**planned, "removed": True}
    assert removed["store"] == str(littered.cache)
    assert {(Path(item["path"]).name, item["reason"]) for item in removed["items"]} == {
        ("b.json", "not in the manifest"),
        ("m--a--0011", "quarantined"),
    }
    assert removed["size_bytes"] == sum(item["size_bytes"] for item in removed["items"]) > 1000
    sizes = {
        str(Path(item["path"]).relative_to(littered.cache)): item["size_bytes"]
        for item in removed["strangers"]
    }
    link = (littered.cache / "m/link.txt").lstat().st_size
    assert sizes == {"lost": 10, "m/notes.txt": 100, "m/link.txt": link, "m/sub": 5}
    assert {item["reason"] for item in removed["strangers"]} == {ASK}
    assert files(littered) == KEPT | STRANGERS
    again = littered.cli("gc").stdout
    assert (
        f"removed 0 items, 0 B; 4 that are not the store's stay, {115 + link} B; store "
        f"{littered.cache}\n" in again
    )


def test_strangers_go_when_it_is_said(littered: Workspace) -> None:
    """Files, a folder, a link; not what it leads to. Nothing of the store's."""
    planned = json.loads(littered.cli("gc", "--strangers", "--dry-run", "--json").stdout)
    assert files(littered) >= STRANGERS
    removed = json.loads(littered.cli("gc", "--strangers", "--json").stdout)
    assert removed == {**planned, "removed": True}
    assert len(removed["items"]) == 6
    assert removed["strangers"] == []
    assert files(littered) == KEPT
    assert (littered.root / "elsewhere").read_text() == "kept"
    assert littered.cli("gc").stdout == f"removed 0 items, 0 B; store {littered.cache}\n"


def test_a_running_daemon_does_it(two_prompts: Workspace) -> None:
    """It is the single writer of its store.

    The command prints the same as without it, and what is fresh stays.
    """
    two_prompts.write("cache/m/notes.txt", "x" * 100)
    two_prompts.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 1000)
    assert "notes.txt" in two_prompts.cli("gc", "--dry-run").stdout
    removed = json.loads(two_prompts.cli("gc", "--json").stdout)
    assert (removed["removed"], removed["size_bytes"]) == (True, 1000)
    assert [one["reason"] for one in removed["items"]] == ["quarantined"]
    assert [(one["size_bytes"], one["reason"]) for one in removed["strangers"]] == [(100, ASK)]
    fresh = KEPT | {"m/b.bin", "m/b.json", "m/b.memory_cache"}
    assert files(two_prompts) == fresh | {"m/notes.txt"}
    removed = json.loads(two_prompts.cli("gc", "--strangers", "--json").stdout)
    assert [one["reason"] for one in removed["items"]] == ["not the store's"]
    assert files(two_prompts) == fresh
    assert [two_prompts.ask(f"m/{name}")["rkcached"]["state"] for name in "ab"] == ["hit", "hit"]
    assert two_prompts.built() == ["a", "b"]


def test_files_that_only_look_like_caches_wait_for_gc(two_prompts: Workspace) -> None:
    """A running daemon removes no file by its name alone, and no copy of a folder of its own.

    They are strangers: listed, and removed if that is said.
    """
    space = two_prompts
    shutil.copytree(space.cache / "m", space.cache / "m-backup")
    shutil.copy(space.cache / "m/a.memory_cache", space.cache / "m/copied.memory_cache")
    space.write("cache/m/vendor.rkllm_cache", "of the vendor")
    precious = f"cache/.retired/{'0' * 64}/precious.txt"
    space.write(precious, "years")
    theirs = files(space) - KEPT - {".digests.json.tmp", "m/b.bin", "m/b.json", "m/b.memory_cache"}
    assert len(theirs) == 9

    for name in "ab":  # each is a look
        space.write(f"prompts/{name}.md", f"Another text of {name}.")
        wait_until(lambda name=name: space.built().count(name) == 2, f"a second build of {name}")

    assert theirs <= files(space)
    assert (space.root / precious).read_text() == "years"
    shown = json.loads(space.cli("gc", "--dry-run", "--json").stdout)
    listed = {str(Path(one["path"]).relative_to(space.cache)) for one in shown["strangers"]}
    assert listed == {
        "m-backup",
        "m/copied.memory_cache",
        "m/vendor.rkllm_cache",
        precious.removeprefix("cache/"),
    }
    space.cli("gc", "--strangers")
    assert not theirs & files(space)


def test_asked_over_http(two_prompts: Workspace) -> None:
    """On the admin socket only; a dry run changes nothing.

    The status tells what there is to gain.
    """
    two_prompts.write("cache/m/notes.txt", "x" * 100)
    two_prompts.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 1000)
    assert two_prompts.request("POST", "/v1/gc", json={}).status_code == 403
    with two_prompts.http(admin=True) as client:
        dry = client.post("/v1/gc", json={"dry_run": True}).json()
        shown = two_prompts.status()["cache"]
        assert (shown["foreign_bytes"], shown["quarantine_bytes"], shown["orphan_bytes"]) == (
            100,
            1000,
            0,
        )
        assert "100 B not the store's, 1.0 kB quarantine" in two_prompts.cli("status").stdout
        assert (dry["object"], dry["removed"], dry["size_bytes"]) == (
            "cache.collected",
            False,
            1000,
        )
        assert (two_prompts.cache / ".quarantine/m--a--0011").exists()
        wet = client.post("/v1/gc", json={"dry_run": False}).json()
        assert wet == {**dry, "removed": True}
        assert [Path(one["path"]).name for one in wet["strangers"]] == ["notes.txt"]
        assert (two_prompts.cache / "m/notes.txt").exists()
        wet = client.post("/v1/gc", json={"strangers": True}).json()
        assert (wet["size_bytes"], wet["strangers"]) == (100, [])
    assert not (two_prompts.cache / "m/notes.txt").exists()
    shown = two_prompts.status()["cache"]
    assert (shown["max_bytes"], shown["used_bytes"]) == (
        None,
        sum(p.stat().st_size for p in caches(two_prompts)),
    )


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
    manifest = {
        "version": 1,
        "engine": {"kind": "memory"},
        "cache": {"max_bytes": "1 MiB"},
        "models": declared,
    }
    space.write("manifest.yaml", json.dumps(manifest))


def test_foreign_files_count_and_gc_gives_their_room_back(workspace: Workspace) -> None:
    """What does not fit beside them is blocked with both numbers, in manifest order.

    It becomes fresh when they are gone.

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
    assert (
        blocked["reason"]
        == f"needs {size_bytes:,} bytes, {left:,} of cache.max_bytes 1,048,576 are left"
    )
    assert (
        "500,000 bytes are taken by files that are not the store's: `rkcached gc --strangers`"
        in blocked["hint"]
    )
    wait_until(  # it is shown as blocked a moment before its cache has gone
        lambda: workspace.status()["cache"]["used_bytes"] == size_bytes + 500_000,
        "the cache that does not fit is removed",
    )
    workspace.cli("gc", "--strangers")
    assert not foreign.exists()
    workspace.wait_state("b", "fresh", BEFORE_RESCAN_S)


@pytest.mark.long
def test_an_edit_beside_a_prompt_that_does_not_fit(workspace: Workspace) -> None:
    """It is built once, in the room that it had.

    The other one, whose size is known, is not tried again.

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
        wait_until(
            lambda text=edition * 80_000: text in (workspace.cache / "m/a.bin").read_text(),
            "it is built",
            BEFORE_RESCAN_S,
        )
        workspace.wait_settled()
        workspace.hang_up()
    assert workspace.built() == ["a", "a", "a"]
    said = workspace.log_text().removeprefix(before)
    assert "prompt=b" not in said
    assert "artifact removed" not in said.replace("retired artifact removed", "")
    assert "build failed" not in said
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "blocked"]


def test_the_budget_follows_the_order_of_the_manifest(workspace: Workspace) -> None:
    """Nothing but the order changes, of prompts or of models.

    The one that was moved up is fresh.
    """
    workspace.memory_model(context_tokens=200_000)
    for name in "ab":
        workspace.write(f"{name}.md", name * 72_000)
    with_1_mib(workspace, m="ab", n="")
    workspace.start()
    workspace.wait_settled()
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "blocked"]
    with_1_mib(workspace, m="ba", n="")
    workspace.wait_state("b", "fresh", BEFORE_RESCAN_S)
    assert workspace.prompt("a")["state"] == "blocked"
    with_1_mib(workspace, m="b", n="a")
    workspace.wait_settled()
    with_1_mib(workspace, n="a", m="b")
    other = "the other model comes first"
    wait_until(lambda: workspace.prompt("a", "n").get("state") == "fresh", other, BEFORE_RESCAN_S)
    assert workspace.prompt("b")["state"] == "blocked"


def test_a_directory_that_is_no_store_is_left_alone(workspace: Workspace) -> None:
    """A wrong --cache-dir must not cost anybody's files."""
    workspace.memory_model()
    workspace.declare("{}")
    workspace.write("cache/thesis.txt", "years of work")
    for arguments in ((), ("--dry-run",), ("--strangers",)):
        refused = workspace.cli("gc", *arguments, code=66).stderr
        assert f"there is no store at {workspace.cache}: it contains 'thesis.txt'" in refused
    assert files(workspace) == {"thesis.txt"}


def test_a_daemon_takes_no_folder_that_has_something_else_in_it(workspace: Workspace) -> None:
    """Its own project, by `--cache-dir .`.

    It ends with the next step, and neither it nor gc changes anything.
    """
    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.\n")
    workspace.write("src/package.json", "{}")
    workspace.declare("{a: prompts/a.md}")
    before = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")}
    refused = workspace.cli("run", "--cache-dir", ".", code=73).stderr
    assert f"{workspace.root} is not taken as a store: it contains 'm.model' and 3 more" in refused
    assert "--cache-dir" in refused
    assert (
        "there is no store at"
        in workspace.cli("gc", "--strangers", "--cache-dir", ".", code=66).stderr
    )
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")} == before


def test_what_the_manifest_names_stays_whatever_is_said(littered: Workspace) -> None:
    """Model, prompts and their folder, by a link or another name, within a folder.

    The manifest itself, too.
    """
    space = littered
    space.write("cache/things/models/m.model", (space.root / "m.model").read_bytes())
    space.write("cache/things/gone.txt", "x")
    space.write("cache/m/c.md", "You are prompt C.\n")
    space.write("cache/more/d.md", "You are prompt D.\n")
    space.write("cache/more/draft.txt", "not a prompt yet")
    space.write("elsewhere", "You are prompt E.\n")
    space.declare(
        "{a: prompts/a.md, c: cache/m/c.md, e: cache/m/link.txt}\n    prompts_from: cache/more/*.md"
    )
    text = space.manifest.read_text().replace("path: m.model", "path: cache/things/models/m.model")
    space.manifest.unlink()
    space.write("cache/hard.yaml", text)
    space.manifest.hardlink_to(space.cache / "hard.yaml")
    removed = json.loads(space.cli("gc", "--strangers", "--json").stdout)
    assert {
        Path(one["path"]).name for one in removed["items"] if one["reason"] == "not the store's"
    } == {
        "lost",
        "notes.txt",
        "sub",
    }
    named = {
        "hard.yaml",
        "m/c.md",
        "m/link.txt",
        "more/d.md",
        "more/draft.txt",
        "things/models/m.model",
    }
    assert files(space) == KEPT | named | {"things/gone.txt"}
    assert {one["reason"] for one in removed["strangers"]} == {
        "not the store's; it stays, as the manifest names it"
    }


def test_a_model_s_folder_that_is_a_link_is_not_entered(littered: Workspace) -> None:
    """Nor is the quarantine.

    What they lead to stays, with gc, with --strangers and under the daemon.
    """
    space = littered
    for name in ("a.json", "a.bin", "a.memory_cache", "notes.txt"):
        space.write(f"mine/{name}", "kept")
    for number in range(12):
        space.write(f"mine/m--a--00{number:02}/a.json", "kept")
    shutil.rmtree(space.cache / "m")
    shutil.rmtree(space.cache / ".quarantine")
    for name in ("m", ".quarantine", ".verdicts"):
        (space.cache / name).symlink_to(space.root / "mine")
    before = sorted((space.root / "mine").rglob("*"))
    space.cli("gc")
    space.start()
    blocked = space.wait_state("a", "blocked")
    assert f"{space.cache / 'm'} is a link" in blocked["reason"]
    space.cli("gc")
    space.cli("gc", "--strangers")
    space.wait_state("a", "fresh", 30)  # the links were a stranger's, and are gone
    assert not any((space.cache / name).is_symlink() for name in ("m", ".quarantine", ".verdicts"))
    space.stop()
    assert sorted((space.root / "mine").rglob("*")) == before
    assert {path.read_text() for path in before if path.is_file()} == {"kept"}


def test_the_default_store_of_a_checkout(workspace: Workspace) -> None:
    """Its README and .gitignore are the store's own.

    Git sees nothing of what is built there.
    """
    tracked = {"cache/README.md", "cache/.gitignore"}
    for name in (*tracked, ".gitignore"):
        workspace.write(name, (ROOT / name).read_bytes())
    git = [
        need("git"),
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@example.org",
        "-C",
        str(workspace.root),
    ]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "cache"], capture_output=True, text=True, check=True
    ).stdout
    assert set(listed.split()) == tracked

    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    assert workspace.status()["cache"]["foreign_bytes"] == 0
    assert json.loads(workspace.cli("gc", "--strangers", "--json").stdout)["items"] == []
    changed = subprocess.run(
        [*git, "status", "-s", "--", "cache"], capture_output=True, text=True, check=True
    ).stdout
    assert changed == ""
    assert files(workspace) >= {"README.md", ".gitignore", "CACHEDIR.TAG", "m/a.json"}


def test_json_files_of_others_are_no_orphans(two_prompts: Workspace) -> None:
    """A file that is no sidecar and has no prompt cache beside it.

    The daemon leaves it, and so does gc.
    """
    two_prompts.write("cache/web/package.json", "{}")
    two_prompts.write("cache/m/settings.json", "{}")
    two_prompts.write("cache/m/data.other_cache", "x")
    two_prompts.hang_up()
    two_prompts.cli("gc")
    assert {"web/package.json", "m/settings.json", "m/data.other_cache"} <= files(two_prompts)
    assert "artifact removed" not in two_prompts.log_text()


def test_the_quarantine_s_bytes_are_those_that_are_left(workspace: Workspace) -> None:
    """The look that makes room there is the one whose figures are told: the first."""
    workspace.write("a.md", "a")
    workspace.memory_model(context_tokens=200_000)
    workspace.write("cache/.quarantine/m--a--0011/a.memory_cache", "x" * 2_000_000)
    with_1_mib(workspace, m="a")
    workspace.start()
    assert workspace.status()["reconcile"]["looks"] >= 1
    assert workspace.status()["cache"]["quarantine_bytes"] == 0
    assert not (workspace.cache / ".quarantine/m--a--0011").exists()


def test_what_stays_is_not_overwritten_by_a_build(two_prompts: Workspace) -> None:
    """A text of somebody's where a newly declared prompt's would be.

    Blocked, named, built when it went.
    """
    space = two_prompts
    space.write("cache/m/notes.bin", "somebody's notes")
    assert "notes.bin" in space.cli("gc").stdout
    space.write("prompts/notes.md", "You take notes.")
    space.declare("{a: prompts/a.md, b: prompts/b.md, notes: prompts/notes.md}")
    prompt = space.wait_state("notes", "blocked")
    assert f"{space.cache}/m/notes.bin is not the store's" in prompt["reason"]
    assert "rkcached gc --strangers" in prompt["hint"]
    assert (space.cache / "m/notes.bin").read_text() == "somebody's notes"
    space.cli("gc", "--strangers")
    space.wait_state("notes", "fresh")


def test_what_could_not_be_removed_is_said(two_prompts: Workspace) -> None:
    """The daemon cannot retire where its folder is a link.

    Gc says that the orphan stays, with an exit code.
    """
    space = two_prompts
    elsewhere = space.root / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(space.cache / ".retired", ignore_errors=True)
    (space.cache / ".retired").symlink_to(elsewhere)
    space.declare("{a: prompts/a.md}")
    space.wait_state("b", "orphan")
    done = space.cli("gc", code=os.EX_CANTCREAT)
    assert "could not be removed" in done.stdout
    assert "removed 0 items" in done.stdout
    (space.cache / ".retired").unlink()
    assert "could not" not in space.cli("gc").stdout


def test_a_folder_that_the_daemon_refuses_is_promised_nothing(two_prompts: Workspace) -> None:
    """`plan` and `explain` with the wrong --cache-dir: one sentence and an exit code, no plan."""
    folder = two_prompts.root / "prompts"
    for command in (["plan"], ["explain", "m/a"]):
        done = two_prompts.cli(*command, "--cache-dir", str(folder), code=os.EX_NOINPUT)
        assert done.stdout == ""
        assert f"there is no store at {folder}" in done.stderr
