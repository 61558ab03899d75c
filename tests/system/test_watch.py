"""Every way a prompt, a manifest or a model can change, against the running daemon.

Exactly the right rebuilds.

Where a change must cause no build, a later edit of another prompt is awaited: what was built by
then is all there is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Workspace, need

from tests.waiting import BEFORE_RESCAN_S, wait_until


def edit_other(space: Workspace) -> None:
    """Edit prompt b and wait for its build: whatever was caused before has been built by then."""
    before = len(space.built())
    space.write("prompts/b.md", f"You are prompt B, edition {before}.\n")
    wait_until(lambda: space.built()[before:].count("b"), "b was built")
    space.wait_settled()


def built_since(space: Workspace, before: int) -> list[str]:
    space.wait_settled()
    return space.built()[before:]


def wait_build(space: Workspace, name: str, before: int) -> None:
    wait_until(lambda: name in space.built()[before:], f"{name} was built", BEFORE_RESCAN_S)


def test_in_place_write(two_prompts: Workspace) -> None:
    """Writing into the file rebuilds its prompt cache, and no other."""
    before = len(two_prompts.built())
    for number in range(3):
        two_prompts.write("prompts/a.md", f"You are prompt A, rewritten {number} times.\n")
        wait_build(two_prompts, "a", before + number)
        two_prompts.wait_settled()
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["a", "a", "a", "b"]


def test_rename_over(two_prompts: Workspace) -> None:
    """A temporary file renamed over the prompt is one change."""
    before = len(two_prompts.built())
    temporary = two_prompts.write("prompts/.a.md.tmp", "You are prompt A, renamed over.\n")
    temporary.rename(two_prompts.root / "prompts/a.md")
    wait_build(two_prompts, "a", before)
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["a", "b"]


def test_steps_of_vim(two_prompts: Workspace) -> None:
    """A save of vim is one change: probe file 4913, backup by rename, new file, backup deleted."""
    before = len(two_prompts.built())
    folder = two_prompts.root / "prompts"
    probe = folder / "4913"
    probe.write_bytes(b"")
    probe.unlink()
    (folder / "a.md").rename(folder / "a.md~")
    (folder / "a.md").write_text("You are prompt A, by vim.\n")
    (folder / "a.md~").unlink()
    wait_build(two_prompts, "a", before)
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["a", "b"]


def test_vim_itself(two_prompts: Workspace) -> None:
    """A real vim that keeps backups edits the prompt."""
    before = len(two_prompts.built())
    commands = ["set backup writebackup backupcopy=no", "%s/prompt A/prompt A of vim/", "wq"]
    arguments = [part for command in commands for part in ("-c", command)]
    vim = need("vim")
    subprocess.run(
        [vim, "-u", "NONE", "-es", *arguments, str(two_prompts.root / "prompts/a.md")], check=True
    )
    wait_build(two_prompts, "a", before)
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["a", "b"]
    assert "prompt A of vim" in (two_prompts.cache / "m/a.bin").read_text()


def test_sed_in_place(two_prompts: Workspace) -> None:
    """`sed -i` replaces the file; the new one is seen."""
    before = len(two_prompts.built())
    subprocess.run(
        ["sed", "-i", "s/prompt A/prompt A of sed/", str(two_prompts.root / "prompts/a.md")],
        check=True,
    )
    wait_build(two_prompts, "a", before)
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["a", "b"]


def test_link_retargeted(workspace: Workspace) -> None:
    """A prompt that is a link follows the link when it is pointed elsewhere.

    It also follows when its target is edited.
    """
    workspace.memory_model()
    workspace.write("texts/one.md", "Text one.\n")
    workspace.write("texts/two.md", "Text two.\n")
    (workspace.root / "prompts").mkdir()
    link = workspace.root / "prompts/a.md"
    link.symlink_to("../texts/one.md")
    workspace.declare("{a: prompts/a.md}")
    workspace.start()
    workspace.wait_settled()
    other = workspace.root / "prompts/new"
    other.symlink_to("../texts/two.md")
    other.rename(link)
    wait_build(workspace, "a", 1)
    assert "Text two" in (workspace.cache / "m/a.bin").read_text()
    workspace.write("texts/two.md", "Text two, edited.\n")
    wait_build(workspace, "a", 2)
    assert "Text two, edited" in (workspace.cache / "m/a.bin").read_text()
    assert built_since(workspace, 0) == ["a", "a", "a"]


def test_data_directory_swapped(workspace: Workspace) -> None:
    """An update as of a ConfigMap swaps the link `..data`, and rebuilds what differs."""
    workspace.memory_model()
    mount = workspace.root / "mount"
    workspace.write("mount/..1/a.md", "Config A.\n")
    workspace.write("mount/..1/b.md", "Config B.\n")
    (mount / "..data").symlink_to("..1")
    for name in ("a.md", "b.md"):
        (mount / name).symlink_to(f"..data/{name}")
    workspace.declare("{a: mount/a.md, b: mount/b.md}")
    workspace.start()
    workspace.wait_settled()
    for number in (2, 3):
        before = len(workspace.built())
        workspace.write(f"mount/..{number}/a.md", f"Config A, version {number}.\n")
        workspace.write(f"mount/..{number}/b.md", "Config B.\n")
        (mount / "..tmp").symlink_to(f"..{number}")
        (mount / "..tmp").rename(mount / "..data")
        shutil.rmtree(mount / f"..{number - 1}")
        wait_build(workspace, "a", before)
        assert built_since(workspace, before) == ["a"]


def test_burst_of_saves(two_prompts: Workspace) -> None:
    """Fifty saves in a row are one or two builds, and the last text wins."""
    before = len(two_prompts.built())
    for number in range(50):
        two_prompts.write("prompts/a.md", f"You are prompt A, draft {number}.\n")
        time.sleep(0.01)  # the pace of the saves, not a wait for anything
    wait_until(
        lambda: "draft 49" in (two_prompts.cache / "m/a.bin").read_text(),
        "the last draft was built",
    )
    assert built_since(two_prompts, before) in (["a"], ["a", "a"])


def test_touch(two_prompts: Workspace) -> None:
    """`touch` changes no content, so nothing is built."""
    before = len(two_prompts.built())
    subprocess.run(["touch", str(two_prompts.root / "prompts/a.md")], check=True)
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["b"]


def test_reverted_before_it_settles(two_prompts: Workspace) -> None:
    """A change that is taken back at once is no change."""
    before = len(two_prompts.built())
    two_prompts.write("prompts/a.md", "A slip of the pen.\n")
    two_prompts.write("prompts/a.md", "You are prompt A.\n")
    edit_other(two_prompts)
    assert two_prompts.built()[before:] == ["b"]


def test_deleted_and_back(two_prompts: Workspace) -> None:
    """A deleted prompt is blocked.

    Its artifact is kept, not served by name, and fresh when the same text returns.
    """
    before = len(two_prompts.built())
    path = two_prompts.root / "prompts/a.md"
    text = path.read_text()
    path.unlink()
    blocked = two_prompts.wait_state("a", "blocked")
    assert "source missing" in blocked["reason"]
    assert (two_prompts.cache / "m/a.memory_cache").exists()
    error = two_prompts.ask("m/a", status=503)["error"]
    assert error["code"] == "prompt_blocked"
    assert "source missing" in error["message"]
    path.write_text(text)
    two_prompts.wait_state("a", "fresh")
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    assert two_prompts.built()[before:] == []


def test_directory_that_does_not_exist_yet(workspace: Workspace) -> None:
    """A prompt in a directory that appears later is built when it appears."""
    workspace.memory_model()
    workspace.declare("{a: later/deep/a.md}")
    workspace.start()
    workspace.wait_state("a", "blocked")
    (workspace.root / "later").mkdir()
    (workspace.root / "later/deep").mkdir()
    workspace.write("later/deep/a.md", "Here I am.\n")
    workspace.wait_state("a", "fresh", BEFORE_RESCAN_S)


def test_directory_replaced(two_prompts: Workspace) -> None:
    """A prompts directory that is moved away and replaced is watched again."""
    before = len(two_prompts.built())
    folder = two_prompts.root / "prompts"
    shutil.copytree(folder, two_prompts.root / "copy")
    folder.rename(two_prompts.root / "old")
    (two_prompts.root / "copy").rename(folder)
    two_prompts.write("prompts/a.md", "You are prompt A in a new directory.\n")
    wait_build(two_prompts, "a", before)
    two_prompts.wait_settled()
    two_prompts.write("prompts/a.md", "You are prompt A in a new directory, again.\n")
    wait_build(two_prompts, "a", before + 1)
    assert built_since(two_prompts, before) == ["a", "a"]


def test_parameter_of_one_prompt(two_prompts: Workspace) -> None:
    """A parameter changed for one prompt rebuilds that one.

    The reason names it, old and new.
    """
    before = len(two_prompts.built())
    two_prompts.declare("{a: {files: prompts/a.md, params: {temperature: 0.2}}, b: prompts/b.md}")
    wait_build(two_prompts, "a", before)
    assert built_since(two_prompts, before) == ["a"]
    two_prompts.logged("params.temperature: 0.8 -> 0.2")


def test_parameter_of_the_model(two_prompts: Workspace) -> None:
    """A parameter changed for the model rebuilds the prompts that do not set their own."""
    two_prompts.declare("{a: {files: prompts/a.md, params: {top_k: 7}}, b: prompts/b.md}")
    wait_build(two_prompts, "a", 2)
    two_prompts.wait_settled()
    before = len(two_prompts.built())
    two_prompts.declare(
        "{a: {files: prompts/a.md, params: {top_k: 7}}, b: prompts/b.md}",
        params="{max_context_len: 4096, top_k: 50}",
    )
    wait_build(two_prompts, "b", before)
    assert built_since(two_prompts, before) == ["b"]


def test_model_replaced(two_prompts: Workspace) -> None:
    """Another model file rebuilds all of its prompts, and answers come from the new model."""
    before = len(two_prompts.built())
    old = two_prompts.ask("m/a")["choices"][0]["message"]["content"]
    new_model = two_prompts.memory_model("new.model", seed="another")
    new_model.rename(two_prompts.root / "m.model")
    wait_until(lambda: sorted(two_prompts.built()[before:]) == ["a", "b"], "both were built")
    two_prompts.wait_settled()
    answer = two_prompts.ask("m/a")
    assert answer["rkcached"]["state"] == "hit"
    assert answer["choices"][0]["message"]["content"] != old


def test_prompt_added_removed_renamed(two_prompts: Workspace) -> None:
    """An added prompt is built, a removed one is put aside.

    A renamed one takes its prompt cache along.
    """
    before = len(two_prompts.built())
    two_prompts.write("prompts/c.md", "You are prompt C.\n")
    two_prompts.declare("{a: prompts/a.md, b: prompts/b.md, c: prompts/c.md}")
    two_prompts.wait_state("c", "fresh")
    two_prompts.declare("{a: prompts/a.md, c: prompts/c.md}")
    wait_until(lambda: not list((two_prompts.cache / "m").glob("b.*")), "b left the disk")
    wait_until(
        lambda: two_prompts.prompt("b") == {}, "b left the status, with the look after its removal"
    )
    two_prompts.declare("{renamed: prompts/a.md, c: prompts/c.md}")
    two_prompts.wait_state("renamed", "fresh")
    wait_until(lambda: not list((two_prompts.cache / "m").glob("a.*")), "a left the disk")
    assert built_since(two_prompts, before) == ["c"]


def test_new_file_of_a_pattern(workspace: Workspace) -> None:
    """A file that matches prompts_from becomes a prompt; deleted, it is none any more.

    Hidden files never are.
    """
    workspace.memory_model()
    workspace.write("extra/one.md", "Extra one.\n")
    workspace.declare("{}", model="    prompts_from: extra/*.md\n")
    workspace.start()
    workspace.wait_state("one", "fresh")
    workspace.write("extra/.two.md.swp", "not this")
    workspace.write("extra/two.md", "Extra two.\n")
    workspace.wait_state("two", "fresh", BEFORE_RESCAN_S)
    (workspace.root / "extra/one.md").unlink()
    wait_until(lambda: not list((workspace.cache / "m").glob("one.*")), "one left the disk")
    assert workspace.built() == ["one", "two"]


def test_pattern_directory_gone(workspace: Workspace) -> None:
    """When a prompts_from directory vanishes, its artifacts are kept.

    Nobody said that the prompts are gone.
    """
    workspace.memory_model()
    workspace.write("extra/one.md", "Extra one.\n")
    workspace.declare("{}", model="    prompts_from: extra/*.md\n")
    workspace.start()
    workspace.wait_state("one", "fresh")
    (workspace.root / "extra").rename(workspace.root / "away")
    workspace.wait_state("one", "orphan", BEFORE_RESCAN_S)
    (workspace.root / "away").rename(workspace.root / "extra")
    workspace.wait_state("one", "fresh", BEFORE_RESCAN_S)
    assert workspace.built() == ["one"]


def test_broken_manifest(two_prompts: Workspace) -> None:
    """A broken manifest changes nothing and is shown with file:line; edits still count.

    Mended, it is applied.
    """
    good = two_prompts.manifest.read_text()
    two_prompts.manifest.write_text(good.replace("max_context_len", "max_contxt_len"))
    (problem,) = wait_until(
        lambda: two_prompts.status()["manifest"]["problems"], "the manifest is rejected"
    )
    line = next(n for n, text in enumerate(good.splitlines(), 1) if "max_context_len" in text)
    assert f"{two_prompts.manifest}:{line}: " in problem
    assert "max_context_len" in problem
    assert f"manifest.yaml:{line}" in two_prompts.cli("status").stdout
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    edit_other(two_prompts)
    two_prompts.manifest.write_text(good.replace("a: prompts/a.md, ", ""))
    wait_until(lambda: two_prompts.status()["manifest"]["ok"], "the mended manifest is applied")
    wait_until(lambda: two_prompts.prompt("a") == {}, "a is no longer declared")


def test_manifest_deleted(two_prompts: Workspace) -> None:
    """Without a manifest file the last good one stays in force."""
    text = two_prompts.manifest.read_text()
    two_prompts.manifest.unlink()
    wait_until(
        lambda: not two_prompts.status()["manifest"]["ok"], "the missing manifest is noticed"
    )
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    two_prompts.manifest.write_text(text)
    wait_until(lambda: two_prompts.status()["manifest"]["ok"], "the manifest is good again")
    assert two_prompts.built() == ["a", "b"]


def test_manifest_becomes_a_pipe(two_prompts: Workspace) -> None:
    """A manifest that is no regular file is a problem that is said, not a read that never ends."""
    text = two_prompts.manifest.read_text()
    two_prompts.manifest.unlink()
    os.mkfifo(two_prompts.manifest)
    (problem,) = wait_until(
        lambda: two_prompts.status()["manifest"]["problems"], "the pipe is refused"
    )
    assert "not a regular file" in problem
    assert "not a regular file" in two_prompts.cli("check", code=os.EX_CONFIG).stderr
    two_prompts.manifest.unlink()
    two_prompts.manifest.write_text(text)
    wait_until(lambda: two_prompts.status()["manifest"]["ok"], "the manifest is good again")
    edit_other(two_prompts)


def test_sighup(two_prompts: Workspace) -> None:
    """SIGHUP means: look again now."""
    looks = two_prompts.status()["reconcile"]["looks"]
    two_prompts.hang_up()
    assert two_prompts.status()["reconcile"]["looks"] > looks


def test_edit_during_a_build(workspace: Workspace) -> None:
    """A build whose text was edited meanwhile is stopped, and the new text is built."""
    workspace.memory_model(prefill_us_per_token=20_000)
    workspace.write("a.md", "A slow prompt, which takes a second or two to read. " * 2)
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "building")
    workspace.write("a.md", "Short now.\n")
    workspace.wait_state("a", "fresh")
    assert workspace.built() == ["a"]
    workspace.logged("build stopped")
    assert "Short now." in (workspace.cache / "m/a.bin").read_text()


@pytest.mark.parametrize("same_time", [True, False])
def test_same_size_rewrite(two_prompts: Workspace, same_time: bool) -> None:
    """A change that keeps size and even modification time is a change."""
    before = len(two_prompts.built())
    path: Path = two_prompts.root / "prompts/a.md"
    info = path.stat()
    path.write_text(path.read_text().replace("prompt A", "prompt Z"))
    if same_time:
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    wait_build(two_prompts, "a", before)
    assert built_since(two_prompts, before) == ["a"]
