"""What may go wrong with watching, against the running daemon.

Nothing is missed for longer than one rescan.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Workspace, need

from rkcached.reconcile.loop import RESCAN_S
from tests.waiting import wait_until

SOON_S = RESCAN_S / 4
"""A change that is noticed within this time was not noticed by the rescan."""

EVENTS = 100_000
PROMPTS = int(os.environ.get("RKCACHED_WATCH_PROMPTS", "300"))
"""Files in one prompts_from folder; 10,000 of them take some minutes to build."""


def in_namespace(setup: str) -> list[str]:
    """What runs a daemon as root of a user namespace of its own.

    Where limits and mounts are nobody else's.
    """
    unshare = [need("unshare"), "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs user namespaces: sysctl user.max_user_namespaces")
    return [*unshare, "sh", "-e", "-c", f'{setup}\nexec "$@"', "sh"]


def inside(space: Workspace, command: str) -> None:
    """Run a shell command in the daemon's namespaces."""
    assert space.process is not None
    there = [
        "nsenter",
        "--target",
        str(space.process.pid),
        "--user",
        "--mount",
        "--preserve-credentials",
    ]
    subprocess.run([*there, "sh", "-e", "-c", command], check=True)


def edit(space: Workspace, name: str, deadline_s: float = SOON_S, file: str = "") -> float:
    """Edit a prompt and wait until its present text was built; returns how long that took."""
    text = f"You are {name}, edition {time.monotonic_ns()}."
    started = time.monotonic()
    space.write(file or f"prompts/{name}.md", text)
    built = space.cache / f"m/{name}.bin"
    wait_until(
        lambda: built.exists() and text in built.read_text(),
        f"the edit of {name} was built",
        deadline_s,
    )
    return time.monotonic() - started


def resident_mb(space: Workspace) -> float:
    assert space.process is not None
    return psutil.Process(space.process.pid).memory_info().rss / 1e6


def watches(space: Workspace) -> int:
    assert space.process is not None
    count = 0
    for info in Path(f"/proc/{space.process.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += info.read_text().count("inotify wd")
    return count


def burst(folder: Path) -> None:
    """So many events of names that nobody watches.

    No two in a row are the same, so the kernel keeps each.
    """
    one, other = folder / "noise.one", folder / "noise.other"
    one.write_bytes(b"")
    for _ in range(EVENTS // 4):  # a rename is two events
        os.rename(one, other)  # noqa: PTH104 - quick
        os.rename(other, one)  # noqa: PTH104
    one.unlink()


def test_more_events_than_the_kernel_keeps(two_prompts: Workspace) -> None:
    """After an overflow, which tells nothing of an edit behind it, there is one look.

    The edit is in it.
    """
    assert two_prompts.process is not None
    looks = two_prompts.status()["reconcile"]["looks"]
    two_prompts.process.send_signal(signal.SIGSTOP)
    try:
        burst(two_prompts.root / "prompts")
        two_prompts.write("prompts/a.md", "You are behind the burst.\n")
    finally:
        two_prompts.process.send_signal(signal.SIGCONT)
    wait_until(
        lambda: "behind" in (two_prompts.cache / "m/a.bin").read_text(),
        "the edit was built",
        SOON_S,
    )
    two_prompts.wait_settled()
    assert two_prompts.log_text().count("file events lost") == 1
    # One that the overflow asks for, and one after the build; and perhaps the one after the
    # fixture's last build.
    wait_until(
        lambda: two_prompts.status()["reconcile"]["looks"] >= looks + 2, "there were two looks"
    )
    found = two_prompts.status()["reconcile"]["looks"] - looks
    print(f"{found} looks")
    assert found <= 3


def test_a_burst_leaves_nothing_in_memory(two_prompts: Workspace) -> None:
    """While the daemon reads them, or fails to.

    Memory is what it was, and so is the time until an edit is noticed.
    """
    edit(two_prompts, "a")
    before = resident_mb(two_prompts)
    for _ in range(2):
        burst(two_prompts.root / "prompts")
        took = edit(two_prompts, "a")
        print(f"edit after {EVENTS:,} events built in {took:.2f} s")
    after = resident_mb(two_prompts)
    print(f"resident {before:.1f} MB before the bursts, {after:.1f} MB after")
    assert after < before + 8


def test_a_burst_of_the_prompt_itself(two_prompts: Workspace) -> None:
    """Events that do matter are a few looks, not one each, and leave nothing in memory either."""
    edit(two_prompts, "a")
    before, looks = resident_mb(two_prompts), two_prompts.status()["reconcile"]["looks"]
    path = two_prompts.root / "prompts/a.md"
    for number in range(EVENTS // 10):
        os.utime(path, (number, number))
        path.with_name("b.md").touch()
    edit(two_prompts, "a")
    two_prompts.wait_settled()
    assert resident_mb(two_prompts) < before + 8
    assert two_prompts.status()["reconcile"]["looks"] - looks < 10


@pytest.mark.parametrize(
    ("limit", "value"), [("max_inotify_instances", 0), ("max_inotify_watches", 3)]
)
def test_no_room_for_inotify(workspace: Workspace, limit: str, value: int) -> None:
    """Out of inotify instances, or watches: it polls, and says so.

    With room again, the next look ends that.
    """
    workspace.launcher = [
        *in_namespace(f"echo {value} > /proc/sys/user/{limit}"),
        *workspace.launcher,
    ]
    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.\n")
    workspace.write("more/b.md", "You are prompt B.\n")
    workspace.declare("{a: prompts/a.md}", model="    prompts_from: more/*.md\n")
    workspace.start()
    workspace.wait_settled()
    assert workspace.status()["watching"] == "polling"
    assert "polling instead" in workspace.cli("status").stdout
    took = [
        edit(workspace, "a"),
        edit(workspace, "b", file="more/b.md"),
        edit(workspace, "c", file="more/c.md"),
    ]
    print(f"while polling, edits were built in {', '.join(f'{t:.2f}' for t in took)} s")
    assert workspace.log_text().count("polling instead of inotify") == 1, (
        "said once, not at each look"
    )
    inside(workspace, f"echo 100 > /proc/sys/user/{limit}")
    workspace.hang_up()
    wait_until(lambda: workspace.status()["watching"] == "inotify", "it uses inotify again")
    workspace.logged("inotify instead of polling")
    assert "polling" not in workspace.cli("status").stdout
    edit(workspace, "a")
    edit(workspace, "b", file="more/b.md")


def test_room_is_lost_while_it_runs(workspace: Workspace) -> None:
    """A prompt that needs one watch more than there are makes it poll; nothing is missed."""
    workspace.launcher = [*in_namespace("true"), *workspace.launcher]
    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.\n")
    workspace.declare("{a: prompts/a.md}")
    workspace.start()
    workspace.wait_settled()
    assert workspace.status()["watching"] == "inotify"
    inside(workspace, f"echo {watches(workspace)} > /proc/sys/user/max_inotify_watches")
    workspace.write("elsewhere/b.md", "You are prompt B.\n")
    workspace.declare("{a: prompts/a.md, b: elsewhere/b.md}")
    workspace.wait_state("b", "fresh", SOON_S)
    assert workspace.status()["watching"] == "polling"
    edit(workspace, "a")
    edit(workspace, "b", file="elsewhere/b.md")


def test_a_file_system_without_events(workspace: Workspace) -> None:
    """A file that is changed beneath an overlay causes no event in it.

    The rescan finds it, here after 3 s.
    """
    lower, merged = workspace.root / "lower", workspace.root / "merged"
    for folder in (lower, merged, workspace.root / "empty"):
        folder.mkdir()
    mount = f"mount -t overlay overlay -o lowerdir={lower}:{workspace.root}/empty {merged}"
    workspace.hurry(reconcile__loop__RESCAN_S=3.0)
    workspace.launcher = [*in_namespace(mount), *workspace.launcher]
    workspace.memory_model()
    workspace.write("lower/a.md", "You are prompt A.\n")
    workspace.declare("{a: merged/a.md}")
    workspace.start()
    workspace.wait_settled()
    workspace.hang_up()
    took = edit(workspace, "a", file="lower/a.md")
    print(f"edit beneath an overlay built in {took:.2f} s")
    assert took > 1.5, "else there was an event, and this shows nothing"


def test_a_file_system_that_other_machines_change(workspace: Workspace) -> None:
    """Its files are polled, long before the rescan.

    An overlay, changed beneath, stands for NFS and its like here.
    """
    lower, merged = workspace.root / "lower", workspace.root / "merged"
    for folder in (lower, merged, workspace.root / "empty"):
        folder.mkdir()
    mount = f"mount -t overlay overlay -o lowerdir={lower}:{workspace.root}/empty {merged}"
    workspace.hurry(host__trails__REMOTE={"overlay"}, host__watch__REMOTE_POLL_S=1.0)
    workspace.launcher = [*in_namespace(mount), *workspace.launcher]
    workspace.memory_model()
    workspace.write("lower/a.md", "You are prompt A.\n")
    workspace.declare("{a: merged/a.md}")
    workspace.start()
    workspace.wait_settled()
    for _ in range(2):
        took = edit(workspace, "a", file="lower/a.md")
        print(f"edit beneath an overlay that is polled built in {took:.2f} s")
    assert workspace.status()["watching"] == "inotify", (
        "what is changed on this machine causes events"
    )


def moved_away(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    folder.rename(folder.with_name("old"))
    folder.with_name("copy").rename(folder)


def made_again(folder: Path) -> None:
    """Until it has the inode number that it had.

    Where the file system gives numbers again, as ext4 does.
    """
    shutil.copytree(folder, folder.with_name("copy"))
    before = folder.stat().st_ino
    for _ in range(20):
        shutil.rmtree(folder)
        folder.mkdir()
        if folder.stat().st_ino == before:
            break
    shutil.copytree(folder.with_name("copy"), folder, dirs_exist_ok=True)


@pytest.fixture
def on_disk() -> Iterator[Workspace]:
    """Two prompts, deep down in a folder that is on a disk.

    A tmpfs never gives an inode number again.
    """
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rkcached-") as folder:
        space = Workspace(Path(folder))
        space.memory_model()
        for name in "ab":
            space.write(f"x/y/prompts/{name}.md", f"You are prompt {name}.\n")
        space.declare("{a: x/y/prompts/a.md}", model="    prompts_from: x/y/prompts/b*.md\n")
        space.start()
        space.wait_settled()
        yield space
        assert space.stop() == 0


@pytest.mark.parametrize("replace", [moved_away, made_again])
@pytest.mark.parametrize(
    "folder", ["x/y/prompts", pytest.param("x/y", marks=pytest.mark.long), "x"]
)
def test_a_folder_on_the_way_is_replaced(
    on_disk: Workspace, folder: str, replace: Callable[[Path], None]
) -> None:
    """The prompts' folder, its parent, and the parent of that.

    The new one is watched, twice in a row.
    """
    for _ in range(2):
        replace(on_disk.root / folder)
        for leftover in ("old", "copy"):
            shutil.rmtree((on_disk.root / folder).with_name(leftover), ignore_errors=True)
        for name in "ab":
            edit(on_disk, name, file=f"x/y/prompts/{name}.md")


def test_a_replaced_ancestor_is_noticed_without_another_event(on_disk: Workspace) -> None:
    """A whole tree that is exchanged for another, far above the prompts.

    Its texts count at once.
    """
    shutil.copytree(on_disk.root / "x", on_disk.root / "new")
    on_disk.write("new/y/prompts/a.md", "You come from afar.\n")
    (on_disk.root / "x").rename(on_disk.root / "old")
    (on_disk.root / "new").rename(on_disk.root / "x")
    wait_until(
        lambda: "afar" in (on_disk.cache / "m/a.bin").read_text(), "the new tree was seen", SOON_S
    )


def test_links_in_a_folder(workspace: Workspace) -> None:
    """A loop of links is one prompt in trouble; mended, it is built.

    Then the file that it leads to is watched.
    """
    workspace.memory_model()
    workspace.write("prompts/plain.md", "You are plain.\n")
    (workspace.root / "prompts/one.md").symlink_to("two.md")
    (workspace.root / "prompts/two.md").symlink_to("one.md")
    (workspace.root / "loop").symlink_to("loop")
    workspace.declare(
        "{deep: loop/deep.md, link: prompts/one.md}", model="    prompts_from: prompts/*.md\n"
    )
    workspace.start()
    workspace.wait_state("plain", "fresh")
    for name in ("deep", "link", "two"):
        assert "a link that leads back to itself" in workspace.wait_state(name, "blocked")["reason"]
    workspace.write("far/text.md", "You are far away.\n")
    workspace.write("far/deep.md", "You are deep.\n")
    for link, target in (("prompts/two.md", "../far/text.md"), ("loop", "far")):
        (workspace.root / link).unlink()
        (workspace.root / link).symlink_to(target)
    for name in ("deep", "link", "two"):
        workspace.wait_state(name, "fresh", SOON_S)
    edit(workspace, "two", file="far/text.md")
    edit(workspace, "deep", file="far/deep.md")
    (workspace.root / "far").rename(workspace.root / "away")
    workspace.wait_state("two", "blocked", SOON_S)
    assert (workspace.cache / "m/two.memory_cache").exists(), "nobody said that the prompt is gone"
    (workspace.root / "away").rename(workspace.root / "far")
    workspace.wait_state("two", "fresh", SOON_S)


@pytest.mark.long
def test_many_prompts_in_a_folder(workspace: Workspace) -> None:
    """Folders are watched, not files; an edit and a new file among many are noticed.

    Nothing else is built.
    """
    workspace.memory_model()
    for number in range(PROMPTS):
        workspace.write(f"prompts/p{number}.md", f"You are prompt {number}.\n")
    workspace.declare("{}", top="cache: {verify: off}\n", model="    prompts_from: prompts/*.md\n")
    workspace.start()
    wait_until(lambda: len(workspace.built()) >= PROMPTS, "all were built", 60 + PROMPTS / 5)
    workspace.wait_settled()
    assert workspace.process is not None
    process, before = psutil.Process(workspace.process.pid), resident_mb(workspace)
    print(
        f"{watches(workspace)} watches, {process.num_fds()} descriptors, {before:.1f} MB resident"
    )
    assert watches(workspace) < 20
    for name in ("p0", f"p{PROMPTS - 1}", "new"):
        print(f"edit of one of {PROMPTS:,} built in {edit(workspace, name):.2f} s")
    for path in (workspace.root / "prompts").iterdir():
        path.touch()
    edit(workspace, "new")
    workspace.wait_settled()
    assert sorted(workspace.built()[PROMPTS:]) == sorted(["p0", f"p{PROMPTS - 1}", "new", "new"])
    print(f"{resident_mb(workspace):.1f} MB resident after {PROMPTS:,} touches")
    assert resident_mb(workspace) < before * 1.25
