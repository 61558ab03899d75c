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
    "make demo": "tests/system/test_model.py",
    "make test": ".ci/run",
    "python3 -m venv": "Makefile",
    "export PATH": "Makefile",
    "rkcached run": "tests/system/test_cli.py",
    "make deb": "tests/packaging/test_deb.py",
    "sudo make install": "tests/systemd/machine.py",
    "sudoedit": "tests/systemd/test_operating.py",
    "sudo systemctl enable --now rkcached": "tests/systemd/test_activation.py",
    "systemctl status rkcached": "tests/systemd/test_operating.py",
    "sudo systemctl reload rkcached": "tests/systemd/test_operating.py",
    "journalctl -u rkcached": "tests/systemd/test_operating.py",
    "curl": "tests/system/test_readme.py",
    "-d": "tests/system/test_readme.py",
}
"""The first words of a line in a block, and who runs it, or what it comes to."""

COMMAND = re.compile(r"\s*(make|sudo|sudoedit|curl|python3|export|rkcached|systemctl|journalctl|-d)\b")


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
            assert (ROOT / known[0]).exists(), known[0]


def test_the_curl_command(board: Workspace) -> None:
    """Copied and run in a shell."""
    need("curl")
    (command,) = [block for block in blocks() if block.startswith("curl")]
    done = subprocess.run(command, shell=True, env=board.environment, capture_output=True, text=True, check=True)
    assert '"state":"hit"' in done.stdout.replace(" ", "")


def test_the_python_example(board: Workspace) -> None:
    """Copied, and asked for the models."""
    (code,) = blocks("python")
    code = code.replace("/run/rkcached/rkcached.sock", str(board.socket)) + "print(client.models.list().data[0].id)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("qwen3-0.6b")


def test_the_manifest_is_one(workspace: Workspace) -> None:
    """README's manifest parses: what is wrong with it here are files that only a board has."""
    (manifest,) = blocks("yaml")
    workspace.write("manifest.yaml", manifest)
    done = workspace.cli("check", code=78)
    assert "missing" in done.stderr
    assert "unknown key" not in done.stderr
