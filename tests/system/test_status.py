"""`rkcached status`.

What it says before the first look is over, which figures it shows, and in what order.
"""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from conftest import Workspace

from tests.waiting import wait_until

LARGE = 1 << 40
"""So many bytes are not read while a test runs; the file is a hole."""

MODEL = '{"rkcached_memory_model": 1}'


@pytest.fixture
def starting(workspace: Workspace) -> Workspace:
    """A daemon that reads a large model for the first time, until `finish`."""
    workspace.write("p.md", "You are a prompt.")
    workspace.declare("{p: p.md}")
    with workspace.write("m.model", MODEL).open("r+b") as stream:
        stream.truncate(LARGE)
    workspace.start(ready=False)
    wait_until(workspace.socket.exists, "the socket is there")
    wait_until(
        lambda: (workspace.status()["starting"] or {}).get("done_bytes"), "it reads the model"
    )
    return workspace


def finish(space: Workspace) -> None:
    """The model becomes a small one while it is read."""
    with (space.root / "m.model").open("r+b") as stream:
        stream.truncate(len(MODEL))
    wait_until(lambda: space.status()["ready"], "the first look is over")


def test_starting(starting: Workspace) -> None:
    """Until the first look is over it says so, and what is read, how far; then what is declared."""
    try:
        status = starting.status()
        assert not status["ready"]
        assert status["starting"]["file"] == str(starting.root / "m.model")
        assert 0 < status["starting"]["done_bytes"] < status["starting"]["total_bytes"] == LARGE
        words = rf"starting: reading {starting.root}/m\.model, \d+\.\d of 1099\.5 GB"
        assert re.fullmatch(words, status["summary"])
        told = starting.cli("status", "--exit-code", code=2).stdout
        assert "no prompts are declared" not in told
        assert re.search(words, told.replace("\n", ""))
        page = starting.request("GET", "/").text
        assert re.search(rf"<title>{words}", page)
        assert "data-moving" in page
        assert "no prompts are declared" not in page
    finally:
        finish(starting)
    assert starting.status()["starting"] is None
    starting.wait_state("p", "fresh")
    assert "1 fresh" in starting.cli("status", "--exit-code").stdout


def test_watch_sees_the_start(starting: Workspace) -> None:
    """--watch begins while the daemon starts, and shows the prompts when they are known."""
    process = starting.popen("status", "--watch", "--json", stdout=subprocess.PIPE, text=True)
    try:
        assert json.loads(process.stdout.readline())["starting"]["file"]
        finish(starting)
        assert any(json.loads(line)["summary"].startswith("1 fresh") for line in process.stdout)
    finally:
        finish(starting)
        process.kill()
        process.communicate()


def test_no_figures_of_an_older_text(two_prompts: Workspace) -> None:
    """A prompt that cannot be built has none; nor one of another text than the cache's.

    Those of the others stay.
    """
    assert two_prompts.prompt("a")["artifact"]["tokens"]
    two_prompts.write("prompts/a.md", "word " * 9000)
    blocked = two_prompts.wait_state("a", "blocked")
    assert "artifact" not in blocked
    row = next(
        line for line in two_prompts.cli("status").stdout.splitlines() if line.startswith("m/a ")
    )
    assert re.fullmatch(r"m/a +blocked +- +the prompt has .*", row), row
    assert two_prompts.prompt("b")["artifact"]["tokens"]
    assert "artifact" not in two_prompts.request("GET", "/v1/cache/m/a").json()


def test_what_needs_somebody_comes_first(workspace: Workspace) -> None:
    """Blocked prompts, then the others in the manifest's order: in `status` and on the page.

    --json keeps it.
    """
    workspace.memory_model()
    for name in "abcd":
        workspace.write(f"{name}.md", f"You are {name}." if name in "ac" else "")
    workspace.declare("{c: c.md, d: d.md, a: a.md, b: b.md}")
    workspace.start()
    workspace.wait_settled()
    rows = [
        line.split()[0]
        for line in workspace.cli("status").stdout.splitlines()
        if line.startswith("m/")
    ]
    assert rows == ["m/d", "m/b", "m/c", "m/a"]
    page = workspace.request("GET", "/").text
    assert re.findall(r"<span>(m/\w)</span>", page) == rows
    told = json.loads(workspace.cli("status", "--json", "--exit-code", code=2).stdout)
    assert [prompt["prompt"] for prompt in told["prompts"]] == ["c", "d", "a", "b"]


def test_exit_code(two_prompts: Workspace) -> None:
    """0 when all is fresh, 2 when something is not, also while the manifest is rejected.

    Not with --watch.
    """
    two_prompts.cli("status", "--exit-code")
    good = two_prompts.manifest.read_text()
    two_prompts.write("manifest.yaml", "version: 7\n")
    two_prompts.hang_up()
    two_prompts.cli("status", "--exit-code", code=2)
    two_prompts.cli("status")
    two_prompts.write("manifest.yaml", good)
    two_prompts.hang_up()
    two_prompts.cli("status", "--exit-code")
    assert "rkcached wait" in two_prompts.cli("status", "--exit-code", "--watch", code=64).stderr
