"""A build that is killed at each of its system calls.

Afterwards the store holds a whole artifact, or says what is not.

strace kills the child with SIGKILL as it enters the nth of its calls of one kind; n goes on until
the build gets to its end, for each kind of call that changes a file. A machine that loses power is
not this test's: what was not synced then is the matter of the order in which `Store.commit` writes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rkcached.sources.records import Key
from rkcached.store.store import Store
from tests.integration import build_script
from tests.integration.test_store import make_sidecar

KEY = Key("m", "p")
CALLS = (
    *(
        "write",
        "pwrite64",
        "ftruncate",
        "fsync",
        "fdatasync",
        "rename",
        "renameat",
        "renameat2",
        "link",
        "linkat",
    ),
    *("unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "chmod", "fchmod", "fchmodat", "flock"),
)
"""Whichever of them this C library makes of ours."""
OLD = "You are the old one."
NEW = "You are the new one. " + "You read more than a batch. " * 14
MODEL = '{"rkcached_memory_model": 1}'


def killed_at(root: Path, call: str, nth: int, earlier: str | None, how: tuple[str, ...]) -> bool:
    """Prepare a store, build in it and kill the build at its nth call.

    False when there was no such call.
    """
    root.mkdir()
    (root / "m.model").write_text(MODEL)
    if earlier:
        build_script.build(root, earlier)
    strace = ["strace", "-f", "-qqq", "-o", os.devnull, "-e", f"trace={call}", "-e"]
    command = [
        *strace,
        f"inject={call}:signal=KILL:when={nth}",
        sys.executable,
        "-m",
        "tests.integration.build_script",
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, str(root), NEW, *how],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def outcome(root: Path) -> str:
    """What the store holds when it is opened again; every byte of a whole artifact was compared."""
    store = Store(root / "cache")
    store.open()
    try:
        stray = [
            path.name
            for path in (root / "cache").rglob("*")
            if ".stage-" in path.name or path.suffix == ".tmp"
        ]
        assert stray == []
        found = store.scan().observed().get(KEY)
        if found is None:
            return "nothing"
        if found.corrupt:
            return "corrupt"
        (text,) = [t for t in (OLD, NEW) if (root / "cache/m/p.bin").read_bytes() == t.encode()]
        data = (root / "cache/m/p.memory_cache").read_bytes()
        assert text.encode() in data
        assert make_sidecar(KEY, data, text.encode()) == store.scan().artifacts[KEY].sidecar
        assert store.verify(KEY) == ""
        return "old" if text == OLD else "new"
    finally:
        store.close()


@pytest.mark.parametrize(
    ("earlier", "how"),
    [
        pytest.param(None, (), marks=pytest.mark.long),
        pytest.param(OLD, (), marks=pytest.mark.long),
        pytest.param(OLD, ("continued",), marks=pytest.mark.long),
    ],
    ids=["first", "replacement", "continued"],
)
def test_a_build_killed_at_any_system_call_leaves_a_whole_artifact_or_one_that_is_rebuilt(
    tmp_path: Path, earlier: str | None, how: tuple[str, ...]
) -> None:
    """And the build after it makes it whole, wherever the one before was cut off.

    Also one that goes on from the old artifact, steps aside, and goes on from what it had read.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    seen: Counter[str] = Counter()

    def kill_each(call: str) -> None:
        killed, nth = True, 0
        while killed:
            nth += 1
            root = tmp_path / f"{call}-{nth}"
            killed = killed_at(root, call, nth, earlier, how)
            before = outcome(root)
            if killed:
                seen[before] += 1
            else:
                assert before == "new"
            build_script.build(root, NEW)
            assert outcome(root) == "new"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_each, CALLS))
    print(f"{seen.total()} calls, {dict(seen)}")
    assert seen.total() > 20
    assert seen.keys() == {"corrupt", "new", "old" if earlier else "nothing"}


@pytest.mark.parametrize(
    ("call", "error"), [("fsync", "EIO"), ("rename", "ENOSPC"), ("fchmod", "EROFS")]
)
def test_a_build_whose_nth_call_fails_leaves_a_whole_artifact_or_one_that_is_rebuilt(
    tmp_path: Path, call: str, error: str
) -> None:
    """An error from the disk at each step of a commit is a StoreError.

    Nothing staged is left, also without a sweep.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    seen: Counter[str] = Counter()
    nth = 0
    while True:
        nth += 1
        root = tmp_path / str(nth)
        root.mkdir()
        (root / "m.model").write_text(MODEL)
        build_script.build(root, OLD)
        strace = ["strace", "-f", "-qqq", "-o", os.devnull, "-e", f"trace={call}", "-e"]
        command = [*strace, f"inject={call}:error={error}:when={nth}", sys.executable, "-m"]
        done = subprocess.run(
            [*command, "tests.integration.build_script", str(root), NEW],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        left = [path.name for path in (root / "cache").rglob(".stage-*")]
        if done.returncode == 0:
            break
        assert "StoreError: " in done.stderr.splitlines()[-1], done.stderr
        assert left == []
        seen[outcome(root)] += 1
        build_script.build(root, NEW)
        assert outcome(root) == "new"
    print(f"{seen.total()} errors of {call}, {dict(seen)}")
    assert outcome(root) == "new"
    assert seen.total() > 1
    assert seen.keys() <= {"old", "corrupt", "new"}
