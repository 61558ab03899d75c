"""Files that grow for a while, and files that never rest.

Few builds are begun, and other prompts get theirs.
"""

from __future__ import annotations

import time
from io import BufferedWriter
from pathlib import Path

import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S, wait_until

STARTED = " build started "


def started(space: Workspace) -> list[str]:
    """The prompts whose builds were begun, in order."""
    lines = [line for line in space.log_text().splitlines() if STARTED in line]
    return [line.split(" prompt=")[1].split()[0] for line in lines]


def upload(space: Workspace, stream: BufferedWriter, pieces: list[bytes]) -> None:
    """Write these, each after a look at what was there before.

    A writer is never silent for long.
    """
    for piece in pieces:
        looks = space.status()["reconcile"]["looks"]
        stream.write(piece)
        stream.flush()
        last = time.monotonic()

        def looked(looks: int = looks) -> bool:
            nonlocal last
            if time.monotonic() > last + 1:
                last = time.monotonic()
                stream.write(b" ")
                stream.flush()
            return bool(space.status()["reconcile"]["looks"] > looks)

        wait_until(looked, "it was looked at")


def test_a_prompt_that_is_uploaded_slowly(workspace: Workspace) -> None:
    """Regression: of twelve pieces, twelve builds were begun.

    Now one, when the writer has closed the file.
    """
    workspace.memory_model()
    workspace.write("prompts/b.md", "Another.")
    workspace.declare("{}", model="    prompts_from: prompts/*.md\n")
    workspace.start()
    workspace.wait_state("b", "fresh")
    with (workspace.root / "prompts/a.md").open("wb") as stream:
        upload(workspace, stream, [b"Piece %d. " % number for number in range(12)])
        assert workspace.prompt("a")["state"] == "missing"
        workspace.write("prompts/b.md", "Another one.")
        wait_until(lambda: workspace.built() == ["b", "b"], "others are built meanwhile")
        stream.write(b"The end.")
    workspace.wait_state("a", "fresh")
    assert started(workspace) == ["b", "b", "a"]
    assert "The end." in (workspace.cache / "m/a.bin").read_text()


def test_a_model_that_is_uploaded_slowly(workspace: Workspace) -> None:
    """Nothing is built with half of it, and no failure to load it is held against it."""
    workspace.write("a.md", "A prompt.")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "blocked")
    with (workspace.root / "m.model").open("wb") as stream:
        upload(workspace, stream, [b'{"rkcached_memory_model": 1', *[b" "] * 5, b"}"])
        assert started(workspace) == []
    workspace.wait_state("a", "fresh")
    assert started(workspace) == ["a"]
    assert "build failed" not in workspace.log_text()


def test_a_writer_that_does_not_close(workspace: Workspace) -> None:
    """It is waited for only for some seconds, here for one."""
    workspace.hurry(reconcile__patience__SILENT_WRITER_S=1.0)
    workspace.memory_model()
    workspace.write("a.md", "A prompt.")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    with (workspace.root / "a.md").open("wb") as stream:
        stream.write(b"Another prompt.")
        stream.flush()
        wait_until(lambda: "Another" in (workspace.cache / "m/a.bin").read_text(), "it was built")


@pytest.fixture
def slow(workspace: Workspace) -> Path:
    """Builds take seconds; the first prompt is being built, and another waits."""
    workspace.memory_model(prefill_us_per_token=10_000)
    path = workspace.write("a.md", "A prompt that takes its time, edition 0. " * 3)
    workspace.write("b.md", "Another.")
    workspace.declare("{a: a.md, b: b.md}")
    workspace.start()
    return path


@pytest.mark.long
def test_a_prompt_that_never_rests_leaves_room_for_others(workspace: Workspace, slow: Path) -> None:
    """Regression: rewritten whenever its build began, it was the first to be built each time.

    Nothing else was built.
    """
    end = time.monotonic() + DEADLINE_S
    edition = 0
    while workspace.prompt("b")["state"] != "fresh":
        if started(workspace).count("a") > edition:
            edition += 1
            slow.write_text(f"A prompt that takes its time, edition {edition}. " * 3)
        assert time.monotonic() < end, f"after {edition} editions of a, b is still not built"
    workspace.wait_state("a", "fresh")
    assert f"edition {edition}." in (workspace.cache / "m/a.bin").read_text()


@pytest.mark.long
def test_a_file_that_is_appended_to(workspace: Workspace, slow: Path) -> None:
    """Opened and closed for each piece: the second build waits until no more come."""
    workspace.wait_state("a", "building")
    for number in range(6):
        looks = workspace.status()["reconcile"]["looks"]
        with slow.open("a") as stream:
            stream.write(f"Piece {number}. ")
        wait_until(
            lambda looks=looks: workspace.status()["reconcile"]["looks"] > looks, "it was looked at"
        )
    workspace.wait_state("a", "fresh")
    assert "Piece 5." in (workspace.cache / "m/a.bin").read_text()
    assert started(workspace).count("a") <= 3, (
        "on a machine that is so slow that it took the pieces for all"
    )
