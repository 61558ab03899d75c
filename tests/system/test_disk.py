"""Disks that refuse, under a running daemon: full, out of inodes, read-only, failing, taken away.

Each time: requests are answered rightly, cold if need be; the status says what is wrong, with
numbers and what to do; nothing half is left; and when the disk is well again, all is fresh without
a hand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, need
from test_serving import content, right_answer

from rkcached.errors import ArtifactLoadError, EngineError, NoRoom, VerifyFailed, WorkerDied
from rkcached.plan.records import VerdictKind
from rkcached.reconcile.failures import verdict_on
from rkcached.reconcile.prefills import blame_disk
from tests.waiting import BEFORE_RESCAN_S, wait_until

PAGE = 4096
KEPT = "You are prompt A."


class Disk:
    """A tmpfs of its own, mounted as the cache directory."""

    def __init__(self, root: Path, options: str) -> None:
        self.root = root
        root.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "rkcached-test", root],
            check=True,
            capture_output=True,
        )

    def remount(self, options: str) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,{options}", self.root], check=True, capture_output=True
        )

    def unmount(self) -> None:
        subprocess.run(["umount", self.root], check=True, capture_output=True)

    def leave(self, pages: int) -> None:
        """Fill it up until so many pages are free; they are given back by `make_room`."""
        while (excess := self.free() - pages) > 0:
            with (self.root / ".ballast.tmp").open("ab") as stream:
                stream.write(bytes(excess * PAGE))
        assert self.free() == pages

    def free(self) -> int:
        return os.statvfs(self.root).f_bavail

    def make_room(self) -> None:
        (self.root / ".ballast.tmp").unlink()


@pytest.fixture
def disk(workspace: Workspace, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk of 1 MiB, or of the options that the test gives, in the place of the store."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    try:
        made = Disk(workspace.cache, getattr(request, "param", "size=1m"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', error)!r}")
    yield made
    try:
        if workspace.process is not None:
            assert workspace.stop() == 0, workspace.log_text()
        assert list(workspace.cache.glob("**/.stage-*")) == []
    finally:
        if workspace.process is not None:
            workspace.stop(signal.SIGKILL)
        made.unmount()


def prepare(space: Workspace) -> None:
    space.memory_model()
    space.write("prompts/a.md", KEPT)
    space.declare("{a: prompts/a.md, b: prompts/b.md}")


def answers_rightly(space: Workspace, changed: str, *, hits: bool = True) -> None:
    """The prompt that was built before still hits, if its disk lets it.

    The one that changed is right, but cold.
    """
    kept = space.ask("m/a")
    assert content(kept) == right_answer(space, KEPT)
    if hits:
        assert kept["rkcached"]["state"] == "hit"
    answer = space.ask("m/b")
    assert content(answer) == right_answer(space, changed)
    assert answer["rkcached"]["state"] not in ("hit", "loaded")


def fresh_again(space: Workspace, text: str) -> None:
    """Both prompts hit, and nothing of an attempt is left."""

    def hits(name: str, system: str) -> bool:
        answer = space.ask(f"m/{name}")
        return (content(answer), answer["rkcached"]["state"]) == (
            right_answer(space, system),
            "hit",
        )

    wait_until(lambda: hits("b", text), f"b is fresh, but {space.prompt('b')}", BEFORE_RESCAN_S)
    wait_until(lambda: hits("a", KEPT), f"a is fresh, but {space.prompt('a')}", BEFORE_RESCAN_S)
    assert list(space.cache.rglob(".stage-*")) == []


def says(space: Workspace, name: str, *words: str) -> dict[str, Any]:
    """The prompt is blocked for a reason that has these words, on the terminal, too.

    It has a next step.
    """

    def shown() -> dict[str, Any] | None:
        """A retry in between may have found another reason."""
        found = space.wait_state(name, "blocked", BEFORE_RESCAN_S)
        return found if found["reason"] in " ".join(space.cli("status").stdout.split()) else None

    found: dict[str, Any] = wait_until(
        shown, lambda: f"status shows why {name} is blocked: {space.prompt(name)}"
    )
    for word in words:
        assert word in found["reason"], found
    assert found["hint"]
    return found


def test_a_full_disk_at_each_step_of_a_build(workspace: Workspace, disk: Disk) -> None:
    """With so many pages left that each file of an artifact in turn does not fit.

    The reason has both numbers.
    """
    text_pages = 12
    prepare(workspace)
    text = "b" * (text_pages * PAGE - 200)
    workspace.write("prompts/b.md", "Small.")
    workspace.declare("{a: prompts/a.md, b: prompts/b.md}", params="{max_context_len: 100000}")
    workspace.memory_model(context_tokens=100_000)
    workspace.start()
    workspace.wait_settled()
    files = 9 * text_pages + text_pages
    for step, left in enumerate((9 * text_pages - 1, 9 * text_pages, files)):
        disk.leave(left)
        workspace.write("prompts/b.md", f"{step}{text}")
        found = says(workspace, "b", "bytes", str(disk.root))
        assert sum(letter.isdigit() for letter in found["reason"]) >= 2, found
        assert [path for path in disk.root.rglob("*") if ".stage-" in path.name] == []
        assert not workspace.cli("verify", "m/a").stderr
        answers_rightly(workspace, f"{step}{text}")
        disk.make_room()
        fresh_again(workspace, f"{step}{text}")


def test_what_is_known_not_to_fit_is_not_begun(workspace: Workspace, disk: Disk) -> None:
    """Built anew beside itself an artifact needs its size once more.

    That is known, and costs no prefill.
    """
    prepare(workspace)
    workspace.write("prompts/b.md", "Once.")
    workspace.start()
    workspace.wait_settled()
    disk.leave(2)
    before = workspace.log_text()
    refused = workspace.cli("regenerate", "m/b", code=None)
    assert refused.returncode != 0
    assert "needs " in refused.stderr
    assert f"{2 * PAGE:,} are free on {disk.root}" in refused.stderr
    assert "artifact built" not in workspace.log_text()[len(before) :]
    assert workspace.ask("m/b")["rkcached"]["state"] == "hit"
    disk.make_room()
    fresh_again(workspace, "Once.")


@pytest.mark.parametrize(
    "error",
    [
        EngineError("fwrite"),
        ArtifactLoadError("cut"),
        VerifyFailed("no use"),
        WorkerDied("signal 6"),
    ],
    ids=repr,
)
def test_an_engine_that_fails_on_a_full_disk_is_not_blamed(
    disk: Disk, error: EngineError | WorkerDied
) -> None:
    """One that does not notice leaves a file that it cannot load, or dies of it.

    No reason to give the prompt up.
    """
    staged = disk.root / "m.stage"
    staged.write_bytes(bytes(3 * PAGE))
    blame_disk(staged, error)
    disk.leave(1)
    with pytest.raises(
        NoRoom, match=f"more than the {4 * PAGE:,} bytes that were free on {disk.root}"
    ) as caught:
        blame_disk(staged, error)
    assert caught.value.needed_bytes == 4 * PAGE + 1
    verdict = verdict_on(caught.value, "f", attempts=10)
    assert (verdict.kind, verdict.needed_bytes) == (VerdictKind.FAILED, 4 * PAGE + 1)


@pytest.mark.parametrize("disk", ["size=1m,nr_inodes=60"], indirect=True)
def test_inodes_used_up(workspace: Workspace, disk: Disk) -> None:
    """Room for bytes but for no more files: it says so, and which of the two it is."""
    prepare(workspace)
    workspace.write("prompts/b.md", "One.")
    workspace.start()
    workspace.wait_settled()
    rubbish = disk.root / ".many.tmp.d"
    rubbish.mkdir()
    number = 0
    while os.statvfs(disk.root).f_favail:
        (rubbish / str(number)).touch()
        number += 1
    workspace.write("prompts/b.md", "Two.")
    says(workspace, "b", "no inodes are left", "bytes are free")
    answers_rightly(workspace, "Two.")
    shutil.rmtree(rubbish)
    fresh_again(workspace, "Two.")


def test_mounted_read_only_and_back(workspace: Workspace, disk: Disk) -> None:
    """A daemon has no file open for writing there, so it can be remounted under it.

    What is fresh is still used.
    """
    prepare(workspace)
    workspace.write("prompts/b.md", "One.")
    workspace.start()
    workspace.wait_settled()
    disk.remount("ro")
    workspace.write("prompts/b.md", "Two.")
    says(workspace, "b", f"{disk.root} is mounted read-only")
    answers_rightly(workspace, "Two.")
    disk.remount("rw")
    fresh_again(workspace, "Two.")


def test_a_disk_that_fails_on_fsync(workspace: Workspace) -> None:
    """An I/O error of each fsync, injected by strace.

    Not published, said, and made good when the errors end.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    prepare(workspace)
    workspace.write("prompts/b.md", "One.")
    workspace.start()
    workspace.wait_settled()
    assert workspace.process is not None
    trace = [
        "strace",
        "-f",
        "-qqq",
        "-o",
        os.devnull,
        "-e",
        "trace=fsync",
        "-e",
        "inject=fsync:error=EIO",
    ]
    failing = subprocess.Popen([*trace, "-p", str(workspace.process.pid)])
    try:
        status = Path(f"/proc/{workspace.process.pid}/status")
        wait_until(lambda: f"TracerPid:\t{failing.pid}\n" in status.read_text(), "strace has it")
        workspace.write("prompts/b.md", "Two.")
        says(workspace, "b", "Input/output error")
        answers_rightly(workspace, "Two.")
    finally:
        failing.terminate()
        failing.wait()
    fresh_again(workspace, "Two.")


def moved_away(cache: Path) -> Callable[[], object]:
    cache.rename(cache.with_name("away"))
    return lambda: None


def moved_away_and_back(cache: Path) -> Callable[[], object]:
    away = cache.rename(cache.with_name("away"))

    def back() -> None:
        for _ in range(100):  # the daemon may write into the one that it made, at any moment
            shutil.rmtree(cache, ignore_errors=True)
            with contextlib.suppress(OSError):
                away.rename(cache)
                return
        pytest.fail("the folder could not be put back")

    return back


def recreated(cache: Path) -> Callable[[], object]:
    shutil.rmtree(cache)
    cache.mkdir()
    return lambda: None


def closed(cache: Path) -> Callable[[], object]:
    cache.chmod(0)
    return lambda: cache.chmod(0o750)


def not_writable(cache: Path) -> Callable[[], object]:
    (cache / "m").chmod(0o550)
    return lambda: (cache / "m").chmod(0o750)


@pytest.mark.parametrize(
    "harm",
    [
        moved_away,
        moved_away_and_back,
        recreated,
        pytest.param(closed, marks=pytest.mark.long),
        pytest.param(not_writable, marks=pytest.mark.long),
    ],
    ids=lambda f: f.__name__,
)
def test_the_cache_directory_taken_away(
    workspace: Workspace, harm: Callable[[Path], Callable[[], object]]
) -> None:
    """Moved, made anew, closed, and back.

    With the text changed meanwhile, no answer is that of the text before.
    """
    prepare(workspace)
    workspace.write("prompts/b.md", "One.")
    # Permissions do not bind root, so the daemon is started without the privilege that makes it so.
    bound = (
        [need("setpriv"), "--bounding-set=-dac_override,-dac_read_search"]
        if os.geteuid() == 0
        else []
    )
    workspace.launcher = [*bound, *workspace.command()]
    workspace.start()
    workspace.wait_settled()
    heal = harm(workspace.cache)
    try:
        workspace.write("prompts/b.md", "Two.")
        if harm in (closed, not_writable):
            found = says(workspace, "b", "ermission denied")
            assert str(workspace.cache) in found["reason"]
            answers_rightly(workspace, "Two.", hits=False)
        else:
            assert content(workspace.ask("m/b")) in (
                right_answer(workspace, "One."),
                right_answer(workspace, "Two."),
            )
            fresh_again(workspace, "Two.")
    finally:
        heal()
    fresh_again(workspace, "Two.")
    assert (workspace.cache / ".lock").exists()
    workspace.cli("verify")
