"""Files that the caller may not read: the exit code and the words are those of the command.

Root gives up what lets it open everything, so that a mode of 0 is a refusal, too.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S

WEAK = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
    "--",
)


def refused(
    space: Workspace, *arguments: str, code: int, folder: Path | None = None, **environment: str
) -> str:
    """What a command prints as an error, without the right to open everything."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up what lets root open everything")
    variables = {**space.environment, **environment}
    done = subprocess.run(
        [*WEAK, *space.command(*arguments)],
        env={name: value for name, value in variables.items() if value},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=folder or space.root,
        check=False,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["check"],
        ["plan"],
        pytest.param(["verify"], marks=pytest.mark.long),
        pytest.param(["explain", "m/a"], marks=pytest.mark.long),
        pytest.param(["gc", "--dry-run"], marks=pytest.mark.long),
        ["run"],
    ],
)
def test_a_manifest_that_may_not_be_read(two_prompts: Workspace, command: list[str]) -> None:
    """It is a problem of the manifest, with the next step, and no mistake on the command line.

    click looked at the mode before the command did, and ended it with 64.
    """
    two_prompts.manifest.chmod(0)
    error = refused(
        two_prompts, *command, "--manifest", str(two_prompts.manifest), code=os.EX_CONFIG
    )
    assert f"{two_prompts.manifest}: the manifest cannot be read: permission denied" in error
    assert f"(`chmod u+r {two_prompts.manifest}`)" in error


@pytest.mark.long
def test_other_files_that_may_not_be_read(two_prompts: Workspace) -> None:
    """Each command has its own code for that, which its help names."""
    file = two_prompts.write("file", "x")
    file.chmod(0)
    for command in (["inspect", "file"], ["compare", "file", "file"], ["bench", "--from", "file"]):
        assert "Permission denied" in refused(two_prompts, *command, code=os.EX_NOINPUT)

    two_prompts.cache.chmod(0)
    for command in (["plan"], ["verify"], ["gc"], ["explain", "m/a"]):
        places = ("--cache-dir", str(two_prompts.cache))
        error = refused(two_prompts, *command, *places, code=os.EX_CANTCREAT)
        assert f"the store {two_prompts.cache} cannot be read: " in error
    two_prompts.cache.chmod(0o750)


def test_places_that_may_not_be_searched(two_prompts: Workspace) -> None:
    """In such a folder no manifest is found, and behind one no daemon. It was a traceback."""
    closed = two_prompts.root / "closed"
    closed.mkdir(mode=0)
    error = refused(two_prompts, "check", code=os.EX_CONFIG, folder=closed, RKCACHED_MANIFEST="")
    assert "the manifest cannot be read" in error
    refused(two_prompts, "explain", "m/a", code=os.EX_OK, RKCACHED_SOCKET=str(closed / "s.sock"))
