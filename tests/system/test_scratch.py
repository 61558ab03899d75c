"""Folders for a moment's use.

Who deletes them harms one worker for one request, and no daemon deletes another's.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Workspace, need

from rkcached.worker import scratch


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory, and no runtime directory, for all daemons of a test.

    Its path is short.
    """
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setenv("TMPDIR", path)
        for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
            monkeypatch.delenv(name, raising=False)
        yield Path(path)


def folders(temporary: Path) -> list[Path]:
    return list(temporary.glob(f"{scratch.PREFIX}*"))


def replaced(space: Workspace, temporary: Path) -> None:
    """Delete the worker's folder.

    The very next request is answered, and the log has a warning with the reason.
    """
    [folder] = folders(temporary)
    shutil.rmtree(folder)
    assert space.ask("m/a")["rkcached"]["state"] == "hit"
    space.logged(
        f"warning worker restarted model=m reason='its scratch folder was deleted: {folder}'"
    )
    assert space.status()["models"][0]["restarts"] == 1


def test_a_deleted_scratch_folder_costs_one_worker(temporary: Path, workspace: Workspace) -> None:
    """As systemd-tmpfiles deletes them; status goes on to say the truth."""
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/a")
    replaced(workspace, temporary)
    workspace.stop()
    assert folders(temporary) == []


@pytest.mark.long
@pytest.mark.model
def test_llama_cpp_survives_a_deleted_scratch_folder(
    temporary: Path, workspace: Workspace, small_model: Path
) -> None:
    """Its socket was there: every answer was a 500 from then on."""
    workspace.write("a.md", "You are the keeper of a lighthouse. You know every ship.\n" * 4)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n"
        "    params: {max_context_len: 512, max_new_tokens: 8, temperature: 0}\n"
        "    prompts: {a: a.md}\n",
    )
    workspace.start()
    workspace.wait_state("a", "fresh")
    replaced(workspace, temporary)


def test_a_daemon_in_another_pid_namespace_sweeps_nothing_of_ours(
    temporary: Path, workspace: Workspace, tmp_path: Path
) -> None:
    """It shares the temporary directory, and knows none of our pids."""
    unshare = [need("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs root, to make a PID namespace")
    other = Workspace(tmp_path / "other")
    for space in (workspace, other):
        space.memory_model()
        space.write("a.md", "You are prompt A.\n")
        space.declare("{a: a.md}")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/a")
    [ours] = folders(temporary)
    other.launcher = [*unshare, *other.launcher]
    other.start()
    try:
        other.wait_settled()
        other.ask("m/a")
        assert len(folders(temporary)) == 2
    finally:
        assert other.process is not None
        other.process.kill()  # and so the whole namespace
        other.process.wait()
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    assert "worker restarted" not in workspace.log_text()
    assert ours.is_dir()
