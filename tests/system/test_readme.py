"""Every command of README is run: here, or by the test that is named here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Workspace, need

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
TABLED = re.findall(r"^\| (?:[^|]* \| )?`(rkcached [^`]+)` \|", TEXT, re.MULTILINE)

ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "python3 -m venv": ("tests/system/test_readme.py", "test_the_environment"),
    "export PATH": ("tests/system/test_readme.py", "test_the_environment"),
    "export RKCACHED_SOCKET": ("tests/system/test_readme.py", "env=board.environment"),
    "rkcached run": ("tests/system/conftest.py", '"run", "--log-level"'),
    "make deb": ("tests/packaging/test_deb.py", "packaging/build_deb.py"),
    "sudo apt install": ("tests/packaging/test_deb.py", 'run("dpkg"'),
    "sudo make install": ("tests/systemd/conftest.py", 'make(bare_machine, "install")'),
    "sudoedit": ("tests/systemd/machine.py", "manifest.yaml"),
    "sudo rkcached check": ("tests/systemd/test_activation.py", '"rkcached", "check"'),
    "sudo systemctl enable --now rkcached": (
        "tests/systemd/test_uninstall.py",
        '"enable", "--now", UNIT',
    ),
    "systemctl status rkcached": ("tests/systemd/machine.py", "systemctl('status', UNIT"),
    "sudo systemctl reload rkcached": ("tests/systemd/test_faults.py", 'systemctl("reload", UNIT)'),
    "journalctl -u rkcached": ("tests/systemd/machine.py", '"journalctl", "-b", "-u", UNIT'),
    "curl": ("tests/system/test_readme.py", "test_the_curl_command"),
    "-d": ("tests/system/test_readme.py", "test_the_curl_command"),
}
"""The first words of a line in a block; who runs it, and the words there that do."""

COMMAND = re.compile(
    r"\s*(make|sudo|sudoedit|curl|python3|export|rkcached|systemctl|journalctl|-d)\b"
)


CHECK_DATA = 'python -c "from rkcached.api.page import _source; print(len(_source()))"'


def blocks(language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.fixture
def board(workspace: Workspace) -> Workspace:
    """What README's reader has, on the memory engine."""
    workspace.memory_model()
    workspace.write("system.md", "You are a helpful assistant.\n")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n  qwen3-0.6b: {path: m.model, prompts: {system: system.md}}\n",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


def test_every_command_of_the_tables(board: Workspace) -> None:
    """As it stands, with all its options, names put in for the capitals; each ends well and without a traceback."""
    assert len(TABLED) >= 20
    artifact = board.cache / "qwen3-0.6b" / "system.memory_cache"
    for name in ("A.json", "B.json"):
        board.cli("bench", "--runs", "1", "--no-direct", "-o", str(board.root / name))
    fill_in = {
        "MODEL/PROMPT": "qwen3-0.6b/system",
        "MODEL ": "qwen3-0.6b ",
        "--plot FILE": f"--plot {board.root / 'out.svg'}",
        "FILE": str(artifact),
        "A.json": str(board.root / "A.json"),
        "B.json": str(board.root / "B.json"),
        "--watch": "",  # ends when it is told to: test_live.py
        '"hi"': "hi",
    }
    for command in TABLED:
        words = command.replace("[/PROMPT]", "/PROMPT").replace("[", "").replace("]", "")
        for name, value in fill_in.items():
            words = words.replace(name, value)
        _, *arguments = words.split()
        done = board.cli(*arguments, stdin="hi", code=None)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        # doctor has something to say of a machine without an NPU
        assert done.returncode == 0 or arguments[0] == "doctor", (command, done.stdout, done.stderr)


def test_every_line_of_the_blocks_is_run_somewhere() -> None:
    """A command line that README gains fails here until somebody runs it."""
    for block in blocks():
        for line in block.splitlines():
            if not COMMAND.match(line):
                continue
            known = [where for start, where in ELSEWHERE.items() if line.strip().startswith(start)]
            assert known, line
            for file, words in known:
                assert words in (ROOT / file).read_text(), (line, file)


def test_the_environment(tmp_path: Path) -> None:
    """README's own lines in a shell, on a copy of this tree: the program starts from its path, with all of its data."""
    need("git")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    subprocess.run(
        ["tar", "--null", "-T-", "-cf", str(tmp_path / "tree.tar")],
        cwd=ROOT,
        input=files,
        check=True,
    )
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xf", str(tmp_path / "tree.tar")], cwd=tree, check=True)
    (block,) = [text for text in blocks() if text.startswith("python3 -m venv")]
    lines = [
        line for line in block.splitlines() if line.startswith(("python3 -m venv", "export PATH"))
    ]
    assert len(lines) == 2
    script = "\n".join(
        ["set -e", *lines, "cd /", "command -v rkcached", "rkcached schema", CHECK_DATA]
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{tree}/.venv/bin/rkcached\n" in done.stdout
    assert int(done.stdout.split()[-1]) > 1000  # the page's template


def test_the_curl_command(board: Workspace) -> None:
    """Copied and run in a shell."""
    need("curl")
    (command,) = [block for block in blocks() if block.startswith("curl")]
    done = subprocess.run(
        command, shell=True, env=board.environment, capture_output=True, text=True, check=True
    )
    assert '"state":"hit"' in done.stdout.replace(" ", "")


def test_the_python_example(board: Workspace) -> None:
    """Copied, and asked for the models."""
    (code,) = blocks("python")
    code = (
        code.replace("/run/rkcached/rkcached.sock", str(board.socket))
        + "print(client.models.list().data[0].id)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("qwen3-0.6b")


def test_the_manifest_is_one(workspace: Workspace) -> None:
    """README's manifest parses: what is wrong with it here are files that only a board has."""
    (manifest,) = blocks("yaml")
    workspace.write("manifest.yaml", manifest)
    done = workspace.cli("check", code=78)
    assert "missing" in done.stderr
    assert "unknown key" not in done.stderr
