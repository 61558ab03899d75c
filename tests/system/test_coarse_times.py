"""A running daemon and a file system whose times are whole seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Workspace

from tests.exfat import exfat
from tests.waiting import wait_until

SECOND_NS = 1_000_000_000


@pytest.fixture
def disk(workspace: Workspace) -> Iterator[Path]:
    with exfat(workspace.root) as place:
        yield place
        if workspace.process is not None:
            assert workspace.stop() == 0


@pytest.mark.long
def test_two_saves_in_one_second_under_a_running_daemon(workspace: Workspace, disk: Path) -> None:
    """Regression: the second was not noticed, nor by the rescan and `reload`; only `plan` saw it.

    On a machine that is too slow for two saves in a second this shows less than the tests above.
    """
    workspace.memory_model()
    prompt = disk / "a.md"
    prompt.write_text("You are prompt 0000.")
    workspace.declare(f"{{a: {prompt}}}")
    workspace.start()
    workspace.wait_state("a", "fresh")

    def text() -> str:
        return (workspace.cache / "m/a.bin").read_text()

    for number in range(1, 9):
        start = time.time_ns() // SECOND_NS
        wait_until(lambda start=start: time.time_ns() // SECOND_NS > start, "a second begins")
        looks = workspace.status()["reconcile"]["looks"]
        prompt.write_text(f"You are prompt {number:04}.")
        wait_until(
            lambda looks=looks: workspace.status()["reconcile"]["looks"] > looks,
            "the first was looked at",
        )
        prompt.write_text(f"You are prompt {number + 5000:04}.")
        wait_until(
            lambda number=number: f"{number + 5000:04}" in text(), "the second was built", 30
        )


def test_a_store_with_coarse_times(workspace: Workspace, disk: Path) -> None:
    """A prompt cache that was exchanged within the second of its commit is found out.

    It is built again.
    """
    workspace.cache = disk / "cache"
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    path = workspace.cache / "m/a.memory_cache"
    good = path.read_bytes()
    for number in range(1, 5):
        path.write_bytes(good[:-1] + bytes([good[-1] ^ number]))
        workspace.hang_up()
        wait_until(lambda: path.exists() and path.read_bytes() == good, "it was built again", 30)
        workspace.wait_state("a", "fresh")
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
