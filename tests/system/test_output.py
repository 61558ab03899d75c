"""Where output goes: pipes that close, disks that are full, files that were there before.

At the end: the files that a wheel carries.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Workspace, tmpfs

from tests.waiting import DEADLINE_S

ROOT = Path(__file__).parents[2]
TEXT = (
    "You are the keeper of a lighthouse. You answer in one sentence, and you know every ship. " * 4
)


@pytest.fixture
def kept(workspace: Workspace) -> Path:
    """A result of two runs; the daemon goes on."""
    workspace.memory_model(prefill_us_per_token=100)
    workspace.write("long.md", TEXT)
    workspace.declare("{long: long.md}", top="cache: {min_tokens: 100}")
    workspace.start()
    workspace.wait_state("long", "fresh")
    file = workspace.root / "kept.json"
    workspace.cli("bench", "--runs", "2", "--no-direct", "-o", str(file))
    return file


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system without a free byte."""
    folder = tmp_path / "full"
    with tmpfs(folder, "size=16k"):
        yield folder


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1024))


def to(
    output: int | Path, space: Workspace, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command with this standard output."""
    stream = output if isinstance(output, int) else os.open(output, os.O_WRONLY)
    try:
        return subprocess.run(
            space.command(*arguments),
            env={**space.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            cwd=space.root,
            check=False,
        )
    finally:
        os.close(stream)


COMMANDS = (
    "status",
    "status --json",
    "status --watch",
    "compare kept.json kept.json",
    "bench --from kept.json",
    "bench --runs 1 --no-direct",
    "plan",
    "schema",
    "chat m/long hello",
    "--help",
)


@pytest.mark.long
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_a_sentence(
    workspace: Workspace, kept: Path, unbuffered: str
) -> None:
    """Of every command, and nothing more when Python ends; 74 is sysexits' EX_IOERR."""
    assert kept.exists()
    for command in COMMANDS:
        done = to(Path("/dev/full"), workspace, *command.split(), PYTHONUNBUFFERED=unbuffered)
        said = [line for line in done.stderr.splitlines() if not line.startswith("measuring ")]
        assert (command, done.returncode) == (command, 74), done.stderr
        assert said[0] == "error: standard output cannot be written: No space left on device"
        assert said[1].startswith("hint: ")
        assert len(said) == 2


@pytest.mark.long
def test_a_closed_pipe_ends_it_silently(workspace: Workspace, kept: Path) -> None:
    """With 141, as the shell has it for programs that SIGPIPE ends; click and rich would say 1."""
    assert kept.exists()
    for command in COMMANDS:
        reading, writing = os.pipe()
        os.close(reading)
        done = to(writing, workspace, *command.split())
        said = [line for line in done.stderr.splitlines() if not line.startswith("measuring ")]
        assert (command, done.returncode, said) == (command, 141, [])


def test_a_standard_error_that_is_full_changes_no_exit_code(workspace: Workspace) -> None:
    """Nobody can be told, but a script still sees what it was."""
    with Path("/dev/full").open("w") as full:
        for command, code in (("status", 69), ("nonsense", 64), ("bench -o -", 64)):
            with workspace.popen(*command.split(), stderr=full) as process:
                assert (command, process.wait(DEADLINE_S)) == (command, code)


@pytest.mark.long
def test_a_full_disk_costs_neither_the_results_nor_the_older_file(
    workspace: Workspace, kept: Path, full_disk: Path
) -> None:
    """The table comes first; what was kept stays; the hint is not the one of permissions."""
    older = full_disk / "older.json"
    older.write_bytes(b"{}\n")
    picture = full_disk / "older.svg"
    picture.write_bytes(b"<svg/>\n")
    fill(full_disk)
    done = workspace.cli("bench", "--runs", "1", "--no-direct", "-o", str(older), code=73)
    assert "m/long" in done.stdout
    assert "saves" in done.stdout
    assert "No space left on device" in done.stderr
    assert "free some space" in done.stderr
    done = workspace.cli("bench", "--runs", "1", "--no-direct", "--json", "-o", str(older), code=73)
    assert json.loads(done.stdout)["program"] == "rkcached bench"
    done = workspace.cli("bench", "--from", str(kept), "--plot", str(picture), code=73)
    assert "free some space" in done.stderr
    assert (older.read_bytes(), picture.read_bytes()) == (b"{}\n", b"<svg/>\n")
    assert {path.name for path in full_disk.iterdir()} == {"older.json", "older.svg", "filler"}


def test_results_are_kept_although_nobody_reads_the_table(workspace: Workspace, kept: Path) -> None:
    """The file is what minutes were spent for. Its mode and a link to it stay."""
    kept.chmod(0o600)
    link = workspace.root / "link.json"
    link.symlink_to(kept)
    before = kept.read_bytes()
    done = to(Path("/dev/full"), workspace, "bench", "--runs", "1", "--no-direct", "-o", str(link))
    assert done.returncode == 74
    assert link.is_symlink()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert json.loads(kept.read_bytes())["parameters"]["runs"] == 1
    assert kept.read_bytes() != before


def test_a_device_is_written_itself(workspace: Workspace, kept: Path) -> None:
    """Renaming a file to /dev/stdout would be no help to anybody."""
    assert kept.exists()
    shown = workspace.cli("bench", "--runs", "1", "--no-direct", "-o", "/dev/stdout").stdout
    assert '"program": "rkcached bench"' in shown


def test_a_dash_is_no_file(workspace: Workspace) -> None:
    """Where other programs mean standard output, --json is the way."""
    assert "--json" in workspace.cli("bench", "-o", "-", code=64).stderr
    assert not (workspace.root / "-").exists()


@pytest.mark.long
def test_kept_results_are_shown_and_drawn_without_a_daemon(
    workspace: Workspace, kept: Path
) -> None:
    """The same JSON, the same table as of any run, and a picture; nothing is measured."""
    workspace.stop()
    assert workspace.cli("bench", "--from", str(kept), "--json").stdout == kept.read_text()
    svg = workspace.root / "a.svg"
    svg.write_text("an older one")
    shown = workspace.cli("bench", "--from", str(kept), "--plot", str(svg)).stdout
    assert "m/long" in shown
    assert "median of 2 runs" in shown
    assert "Not to be trusted: " in svg.read_text()
    assert [path.name for path in workspace.root.glob(".*")] == []
    assert "cannot read none.json" in workspace.cli("bench", "--from", "none.json", code=66).stderr


@pytest.mark.parametrize("beside", ["m/long", "--sweep", "--runs 5", "-o b.json", "--no-direct"])
def test_from_measures_nothing(workspace: Workspace, beside: str) -> None:
    """What asks to measure does not go with it, even when it says the default."""
    said = workspace.cli("bench", "--from", "a.json", *beside.split(), code=64).stderr
    assert "--from measures nothing" in said
    assert not (workspace.root / "b.json").exists()


def test_no_line_is_wrapped_where_no_terminal_is(workspace: Workspace, kept: Path) -> None:
    """A path stays whole in a pipe, whatever its length; COLUMNS asks for another width."""
    folder = workspace.root / ("long-" * 40)
    folder.mkdir()
    data = json.loads(kept.read_text())
    data["models"]["m"]["file"] = str(folder / "m.model")
    kept.write_text(json.dumps(data))
    for arguments in (
        ("bench", "--from", str(kept)),
        ("compare", str(kept), str(workspace.write("b.json", ""))),
    ):
        data["models"]["m"]["file"] += ".other"
        (workspace.root / "b.json").write_text(json.dumps(data))
        reading, writing = os.pipe()
        done = to(writing, workspace, *arguments, COLUMNS="")
        with os.fdopen(reading) as stream:
            shown = stream.read()
        assert done.returncode == 0, done.stderr
        assert str(folder / "m.model") in shown
        assert max(map(len, shown.splitlines())) < 1000


@pytest.mark.long
def test_a_wheel_carries_what_is_no_code(tmp_path: Path) -> None:
    """The page, and the demo's manifest and prompts.

    Without them the installed program fails, not the checkout's.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("needs hatchling, from PyPI")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("rkcached-*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    there = {
        str(path.relative_to(ROOT)) for path in (ROOT / "rkcached").rglob("*") if path.is_file()
    }
    wanted = {name for name in there if not name.endswith(".pyc")}
    assert {
        "rkcached/api/page/page.html.jinja",
        "rkcached/cli/demo/manifest.yaml",
        "rkcached/cli/demo/prompts/reviewer.md",
    } <= wanted
    assert wanted <= carried
