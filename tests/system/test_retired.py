"""Prompts that go away and come back: nothing that was prefilled once is prefilled again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Workspace, need, tmpfs

from tests.waiting import wait_until


@pytest.fixture
def folder(workspace: Workspace) -> Path:
    """Of the prompts `one` and `two`, which a running daemon has built."""
    start_extra(workspace)
    return workspace.root / "extra"


def start_extra(space: Workspace) -> None:
    space.memory_model()
    space.write("extra/one.md", "Extra one.\n")
    space.write("extra/two.md", "Extra two.\n")
    space.declare("{}", model="    prompts_from: extra/*.md\n")
    space.start()
    all_fresh(space, "one", "two")


def all_fresh(space: Workspace, *names: str) -> None:
    """Exactly these are declared, fresh, and used by a request."""

    def states() -> dict[str, str]:
        return {one["prompt"]: one["state"] for one in space.status()["prompts"]}

    wait_until(
        lambda: states() == dict.fromkeys(names, "fresh"), f"{names} are fresh, but {states()}"
    )
    for name in names:
        assert space.ask(f"m/{name}")["rkcached"]["state"] == "hit"


def retired(space: Workspace) -> list[str]:
    return sorted(one["prompt"] for one in space.status()["retired"])


def none_left(space: Workspace) -> None:
    wait_until(lambda: retired(space) == ["one", "two"], "both are retired")
    assert space.status()["prompts"] == []


def test_a_folder_that_is_empty_for_a_while(workspace: Workspace, folder: Path) -> None:
    """What was made of it is kept and shown, and used again when the files are back; no prefill."""
    away = workspace.root / "away"
    away.mkdir()
    for path in folder.iterdir():
        path.rename(away / path.name)
    none_left(workspace)
    shown = workspace.status()
    notice = (
        f"{folder}/*.md matches no file any more, but matched 2 files before: is the folder "
        "mounted?"
    )
    assert shown["notices"] == [notice]
    assert shown["cache"]["retired"] == 2
    assert shown["cache"]["used_bytes"] == shown["cache"]["retired_bytes"] > 0
    printed = workspace.cli("status", "--exit-code", code=2).stdout
    assert "matches no file any more" in printed
    for names in ((), ("m",)):
        waited = workspace.cli("wait", *names, "--timeout", "9", code=os.EX_DATAERR).stderr
        assert f"error: model m: {notice}\nhint: mount the folder or put its files back" in waited
    assert "retired: 2 (m/" in printed
    assert f": warning: {folder}/*.md matches no file\n" in workspace.cli("check").stderr
    checks = json.loads(workspace.cli("doctor", "--json", code=None).stdout)["checks"]
    [about] = [check for check in checks if check["name"] == "prompts"]
    assert about["outcome"] == "warn"
    assert about["finding"] == f"0 prompts, all readable; {folder}/*.md matches no file"
    for path in away.iterdir():
        path.rename(folder / path.name)
    all_fresh(workspace, "one", "two")
    assert retired(workspace) == []
    assert sorted(workspace.built()) == ["one", "two"]
    workspace.cli("status", "--exit-code")
    workspace.cli("wait", "--timeout", "9")


def test_a_folder_for_prompts_to_come(workspace: Workspace) -> None:
    """Beside prompts that are named it may be empty from the start: a notice, and no failure."""
    (workspace.root / "extra").mkdir()
    workspace.write("prompts/a.md", "You are prompt A.")
    workspace.memory_model()
    workspace.declare("{a: prompts/a.md}", model="    prompts_from: extra/*.md\n")
    workspace.start()

    workspace.cli("wait", "--timeout", "30")
    assert "matches no file" in workspace.cli("status", "--exit-code").stdout


@pytest.fixture
def mounted(workspace: Workspace) -> Iterator[Path]:
    """A prompts folder on a file system of its own."""
    folder = workspace.root / "extra"
    with tmpfs(folder, "size=1m"):
        yield folder


def test_a_folder_that_is_unmounted(workspace: Workspace, mounted: Path) -> None:
    """It is empty then and on another file system, which is said.

    Other files in its place change nothing of that.
    """
    start_extra(workspace)
    subprocess.run(["umount", "-l", mounted], check=True)
    workspace.hang_up()
    none_left(workspace)
    assert "on another file system than when the daemon started" in workspace.cli("status").stdout
    workspace.write("extra/two.md", "Extra two.\n")
    workspace.write("extra/one.md", "Extra one.\n")
    all_fresh(workspace, "one", "two")
    assert sorted(workspace.built()) == ["one", "two"]


def test_across_a_restart(workspace: Workspace, folder: Path) -> None:
    """What is retired is on the disk, not in memory."""
    text = (folder / "one.md").read_text()
    (folder / "one.md").unlink()
    wait_until(lambda: retired(workspace) == ["one"], "it is retired")
    workspace.stop()
    workspace.start()
    assert retired(workspace) == ["one"]
    (folder / "one.md").write_text(text)
    all_fresh(workspace, "one", "two")
    assert sorted(workspace.built()) == ["one", "two"]


def test_another_branch_and_back(workspace: Workspace, folder: Path) -> None:
    """`git checkout other && git checkout -`.

    The other branch's prompts are built once, and no prompt twice.
    """

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run([need("git"), *who, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "--initial-branch=main", ".")
    git("add", ".")
    git("commit", "-m", "two prompts")
    git("checkout", "-b", "other")
    (folder / "one.md").write_text("Another one.\n")
    git("rm", "-q", "two.md")
    git("commit", "-a", "-m", "another one, and no second")
    all_fresh(workspace, "one")
    built = ["one", "one", "two"]
    assert sorted(workspace.built()) == built
    for branch, names in (("main", ("one", "two")), ("other", ("one",)), ("main", ("one", "two"))):
        git("checkout", "-q", branch)
        all_fresh(workspace, *names)
    assert sorted(workspace.built()) == built


def test_a_renamed_and_a_copied_prompt(workspace: Workspace, folder: Path) -> None:
    """`mv` and `cp` cost no prefill, and the copy has a file of its own."""
    (folder / "one.md").rename(folder / "first.md")
    all_fresh(workspace, "first", "two")
    shutil.copy(folder / "first.md", folder / "copy.md")
    all_fresh(workspace, "copy", "first", "two")
    assert sorted(workspace.built()) == ["one", "two"]
    assert retired(workspace) == []
    files = [workspace.cache / f"m/{name}.memory_cache" for name in ("first", "copy")]
    assert not files[0].samefile(files[1])
    assert workspace.cli("verify").returncode == 0


def test_an_edit_that_is_undone(workspace: Workspace, folder: Path) -> None:
    """A -> B -> A -> B: two builds; and the plan says what it would do."""
    first, second = "Extra one.\n", "Extra one, edited.\n"
    (folder / "one.md").write_text(second)
    wait_until(lambda: workspace.built().count("one") == 2, "the edit was built")
    all_fresh(workspace, "one", "two")
    workspace.stop()
    (folder / "one.md").write_text(first)
    (action,) = json.loads(workspace.cli("plan", "--json").stdout)["actions"]
    assert (action["action"], action["prompt"], action["source"]) == ("adopt", "one", None)
    assert "1 to adopt" in workspace.cli("plan").stdout
    assert "adopts" in workspace.cli("explain", "m/one").stdout
    workspace.start()
    all_fresh(workspace, "one", "two")
    (folder / "one.md").write_text(second)
    wait_until(lambda: workspace.log_text().count("artifact adopted") == 2, "it was adopted")
    all_fresh(workspace, "one", "two")
    assert workspace.built().count("one") == 2


def test_two_prompts_of_one_text_are_one_prefill(workspace: Workspace) -> None:
    """The second adopts what was built for the first."""
    workspace.memory_model()
    for name in ("a", "b", "c"):
        workspace.write(f"prompts/{name}.md", "The same text.\n")
    workspace.declare("{a: prompts/a.md, b: prompts/b.md, c: prompts/c.md}")
    workspace.start()
    all_fresh(workspace, "a", "b", "c")
    assert workspace.built() == ["a"]


def test_a_stored_text_that_a_client_deletes(workspace: Workspace) -> None:
    """It was deleted on purpose: nothing of it is kept."""
    workspace.memory_model()
    workspace.declare("{}")
    workspace.start()
    with workspace.http() as client, workspace.http(admin=True) as admin:
        for text in ("My secret.", "My other secret."):
            stored = admin.post("/v1/cache/m", json={"cache_name": "mine", "content": text})
            assert stored.status_code == 200, stored.text
        wait_until(lambda: retired(workspace) == ["mine"], "the first text is retired")
        assert admin.delete("/v1/cache/m/mine").status_code == 200
        assert client.get("/v1/cache/m").json()["data"] == []
    assert retired(workspace) == []
    left = [
        path
        for path in workspace.cache.rglob("*")
        if path.is_file() and b"secret" in path.read_bytes()
    ]
    assert left == []


def test_nothing_is_kept_where_the_manifest_says_so(workspace: Workspace) -> None:
    """keep_retired_s: 0, also for what was retired before."""
    workspace.memory_model()
    workspace.write("extra/one.md", "Extra one.\n")
    workspace.write("extra/two.md", "Extra two.\n")
    declare = {"model": "    prompts_from: extra/*.md\n"}
    workspace.declare("{}", **declare)
    workspace.start()
    all_fresh(workspace, "one", "two")
    (workspace.root / "extra/one.md").unlink()
    wait_until(lambda: retired(workspace) == ["one"], "it is retired")
    workspace.declare("{}", top="cache: {keep_retired_s: 0}", **declare)
    wait_until(lambda: retired(workspace) == [], "it is removed")
    (workspace.root / "extra/two.md").unlink()
    files = [workspace.cache / "m" / f"two{end}" for end in (".json", ".bin", ".memory_cache")]
    wait_until(lambda: not any(path.exists() for path in files), "it is removed at once")
    assert retired(workspace) == []


def test_retired_artifacts_make_room_for_declared_ones(workspace: Workspace) -> None:
    """The budget is for what is declared; the oldest retired artifact goes first."""
    workspace.memory_model(context_tokens=200_000)
    workspace.declare(
        "{}",
        params="{max_context_len: 200000}",
        top="cache: {max_bytes: 1MiB}",
        model="    prompts_from: extra/*.md\n",
    )
    (workspace.root / "extra").mkdir()
    workspace.start()
    for letter, name in zip("abcd", ("one", "two", "six", "ten"), strict=True):
        for file in (workspace.root / "extra").iterdir():
            file.unlink()
        workspace.write(f"extra/{name}.md", letter * 50_000)
        all_fresh(workspace, name)
    wait_until(
        lambda: retired(workspace) == ["six"],
        lambda: f"only what fits is kept, not {retired(workspace)}",
    )
    assert workspace.prompt("ten")["artifact"]["size_bytes"] * 2 < 1 << 20
    assert workspace.status()["cache"]["used_bytes"] < 1 << 20


def test_gc_removes_what_is_retired(workspace: Workspace, folder: Path) -> None:
    """Somebody asks for the room."""
    (folder / "one.md").unlink()
    wait_until(lambda: retired(workspace) == ["one"], "it is retired")
    planned = json.loads(workspace.cli("gc", "--dry-run", "--json").stdout)
    assert [item["reason"] for item in planned["items"]] == [
        "retired: built for m/one, and no prompt uses it now"
    ]
    assert retired(workspace) == ["one"]
    workspace.cli("gc")
    assert (retired(workspace), list(workspace.cache.rglob("one*"))) == ([], [])
    all_fresh(workspace, "two")


def test_limits_that_are_tightened_and_loosened_again(workspace: Workspace, folder: Path) -> None:
    """What was too short for a moment is not prefilled again."""
    assert folder.exists()
    for limit, state in ((5000, "uncached"), (0, "fresh")):
        workspace.declare(
            "{}", model="    prompts_from: extra/*.md\n", top=f"cache: {{min_tokens: {limit}}}"
        )
        for name in ("one", "two"):
            workspace.wait_state(name, state)
    all_fresh(workspace, "one", "two")
    assert sorted(workspace.built()) == ["one", "two"]


def test_a_folder_that_cannot_be_listed(workspace: Workspace, folder: Path) -> None:
    """Its prompts are not known, which is no reason to call all of them fresh; nothing is lost."""
    folder.rename(workspace.root / "away")
    folder.symlink_to("extra")  # a link to itself
    wait_until(lambda: workspace.status()["models"][0]["trouble"], "the model is in trouble")
    assert "cannot be listed" in workspace.cli("status", "--exit-code", code=2).stdout
    for names in ((), ("m",), ("m/one",)):
        refused = workspace.cli("wait", "--timeout", "60", *names, code=65)
        assert "cannot be listed" in refused.stderr
    answer = workspace.ask("m/one", status=503)
    assert "cannot be listed" in answer["error"]["message"]
    workspace.logged("cannot be listed")
    folder.unlink()
    (workspace.root / "away").rename(folder)
    all_fresh(workspace, "one", "two")
    assert sorted(workspace.built()) == ["one", "two"]


def test_a_store_that_is_unmounted(workspace: Workspace, mounted: Path) -> None:
    """It is not begun anew on the disk below, and is used again when it is back."""
    workspace.cache = mounted
    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.")
    workspace.declare("{a: prompts/a.md}")
    workspace.start()
    all_fresh(workspace, "a")
    below = workspace.root / "below"
    below.mkdir()
    subprocess.run(["mount", "--move", mounted, below], check=True)
    try:
        workspace.hang_up()
        blocked = workspace.wait_state("a", "blocked")
        assert "on another file system than when the store was opened" in blocked["reason"]
        assert list(mounted.iterdir()) == []
    finally:
        subprocess.run(["mount", "--move", below, mounted], check=True)
    workspace.hang_up()
    all_fresh(workspace, "a")
    assert workspace.built() == ["a"]


def test_a_file_that_the_manifest_names_is_no_artifact(workspace: Workspace) -> None:
    """Whatever its name is: it is neither removed nor reported as removed, again and again."""
    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.")
    workspace.declare("{a: prompts/a.md}")
    workspace.start()
    all_fresh(workspace, "a")
    workspace.stop()
    named = workspace.write("cache/m/notes.memory_cache", "You are prompt X.")
    workspace.declare("{a: prompts/a.md, x: cache/m/notes.memory_cache}")
    workspace.start()
    all_fresh(workspace, "a", "x")
    workspace.hang_up()
    assert "artifact removed" not in workspace.log_text()
    items = json.loads(workspace.cli("gc", "--strangers", "--json").stdout)["items"]
    assert items == []
    assert named.read_text() == "You are prompt X."
