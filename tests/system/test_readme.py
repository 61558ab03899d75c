"""Every command of README and of docs/ is run: here, or by the test that is named here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import Workspace, need

from rkcached.cli.main import cli
from tests.documents import (
    DOCS,
    PAGES,
    README,
    ROOT,
    blocks,
    commands,
    commands_in_words,
    row_commands,
)

COMMANDS = DOCS / "commands.md"
SCRIPTING = DOCS / "scripting.md"

ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "make deb": ("tests/packaging/test_deb.py", '"deb",'),
    "make bench": ("tests/system/test_measure.py", '"measure.py"'),
    "python bench/soak.py": ("tests/system/test_measure.py", '"soak.py"'),
    "sudo apt install": ("tests/packaging/test_deb.py", 'run("dpkg"'),
    "sudo make install": ("tests/systemd/conftest.py", 'make(bare_machine, "install")'),
    "sudoedit": ("tests/systemd/test_documents.py", "manifest.yaml"),
    "python3 -m venv": ("tests/system/test_readme.py", "test_the_environment"),
    "export PATH": ("tests/system/test_readme.py", "test_the_environment"),
    "export OPENAI_": ("tests/programs/served.py", 'removeprefix("export ")'),
    "export OLLAMA_": ("tests/programs/served.py", 'removeprefix("export ")'),
    "sudo rkcached init": ("tests/packaging/test_deb.py", '"rkcached init" in line'),
    "sudo rkcached demo": ("tests/system/test_demo.py", '"--once", "--model"'),
    "rkcached demo --model": ("tests/system/test_demo.py", '"--once", "--model"'),
    "rkcached init": ("tests/system/test_init.py", "test_three_steps_lead_to_a_warm_answer"),
    "rkcached run": ("tests/system/test_init.py", "test_three_steps_lead_to_a_warm_answer"),
    "rkcached chat": ("tests/system/test_init.py", "test_three_steps_lead_to_a_warm_answer"),
    "rkcached check --manifest": ("tests/system/test_guide.py", "test_the_example_of_the_manifest"),
    "rkcached status --watch": ("tests/system/test_live.py", '"--watch"'),
    "rkcached bench": ("tests/system/test_guide.py", "test_every_command_about_measuring"),
    "rkcached compare": ("tests/system/test_guide.py", "test_every_command_about_measuring"),
    "rkcached wait": ("tests/system/test_guide.py", "test_the_examples_for_scripts"),
    "rkcached suggest": ("tests/system/test_learning.py", 'cli("suggest")'),
    "rkcached prompts import": ("tests/system/test_import.py", "commands(MANIFEST)"),
    "rkcached doctor": ("tests/system/test_readme.py", "test_every_command_of_the_tables"),
    "rkcached check": ("tests/system/test_readme.py", "test_every_command_of_the_tables"),
    "rkcached status": ("tests/system/test_readme.py", "test_every_command_of_the_tables"),
    "curl -s --unix-socket": ("tests/system/test_guide.py", "test_every_curl_command"),
    "curl -sN --unix-socket": ("tests/system/test_guide.py", "test_every_curl_command"),
    "ssh -N": ("tests/system/test_page.py", "test_the_ssh_command"),
    "curl -s http://127.0.0.1": ("tests/systemd/test_documents.py", "test_the_port"),
    "sudo systemctl": ("tests/systemd/test_documents.py", "commands("),
    "systemctl": ("tests/systemd/test_documents.py", "commands("),
    "journalctl": ("tests/systemd/test_documents.py", "commands("),
    "sudo adduser": ("tests/systemd/test_documents.py", "commands("),
    "sudo install": ("tests/systemd/test_documents.py", "commands("),
    "rkcached bundle-key": ("tests/system/test_bundles.py", '"bundle-key"'),
    "sudo rkcached export": ("tests/system/test_bundles.py", '"export"'),
    "sudo rkcached import": ("tests/system/test_bundles.py", '"import"'),
    "tar -xf": ("tests/system/test_bundles.py", '"minisign"'),
    "sudo rkcached": ("tests/systemd/test_documents.py", "commands("),
}
"""The first words of a command line; who runs it, and the words there that do.

The first that fits counts."""

ONLY_BY_OTHERS = (
    "rkcached init [DIR]",
    "rkcached add FILE [--model MODEL]",
    "rkcached edit MODEL/PROMPT",
    "rkcached logs [-f] [MODEL[/PROMPT]]",
    "rkcached demo [--model FILE]",
    "rkcached port enable ADDRESS [--container] [--without-key]",
    "rkcached run",
    "rkcached suggest [ID] --write NAME",
)

CHECK_DATA = 'python -c "from rkcached.api.page.page import _source; print(len(_source()))"'


@pytest.fixture
def board(workspace: Workspace) -> Workspace:
    """What README's reader has, on the memory engine."""
    workspace.memory_model()
    workspace.write("system.md", "You are a helpful assistant.\n")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\n"
        "models:\n  qwen3-0.6b: {path: m.model, prompts: {system: system.md}}\n",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


def test_every_command_of_the_tables(board: Workspace) -> None:
    """As it stands, with all its options and names for the capitals; each ends well, untraced."""
    artifact = board.cache / "qwen3-0.6b" / "system.memory_cache"
    for name in ("A.json", "B.json"):
        board.cli("bench", "--runs", "1", "--no-direct", "-o", str(board.root / name))
    request = {"messages": [{"role": "system", "content": "Be brief."}]}
    recorded = board.write("requests.jsonl", json.dumps(request))
    fill_in = {
        "FILE.jsonl": str(recorded),
        "bundle-key FILE": f"bundle-key {board.root / 'build.key'}",
        "KEYFILE": str(board.root / "build.key"),
        "-o FILE": f"-o {board.root / 'caches.tar'}",
        "import FILE": f"import {board.root / 'caches.tar'}",
        "FOLDER": str(board.root / "imported"),
        "COMMAND": "key add",
        "MODEL/PROMPT": "qwen3-0.6b/system",
        "MODEL": "qwen3-0.6b",
        "--plot FILE": f"--plot {board.root / 'out.svg'}",
        "FILE": str(artifact),
        "A.json": str(board.root / "A.json"),
        "B.json": str(board.root / "B.json"),
        "--watch": "",  # ends when it is told to: test_live.py
        '"hi"': "hi",
    }
    # test_init.py has the first three. `demo` and `run` do not end by themselves; `make demo` and
    # every test here run them. Suggestions need requests that repeat: test_learning.py has them.
    # Logs and ports need a service: tests/systemd.
    tabled = [
        command
        for command in row_commands(README) + row_commands(COMMANDS) + row_commands(SCRIPTING)
        if command not in ONLY_BY_OTHERS
    ]
    assert len(tabled) >= 28
    for command in tabled:
        words = command.replace("[/PROMPT]", "/PROMPT").replace("[", "").replace("]", "")
        for name, value in fill_in.items():
            words = words.replace(name, value)
        _, *arguments = words.split()
        done = board.cli(*arguments, stdin="hi", code=None)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        # doctor has something to say of a machine without an NPU
        assert done.returncode == 0 or arguments[0] == "doctor", (command, done.stdout, done.stderr)


def test_the_table_has_every_command() -> None:
    """docs/commands.md names each command of the program; README names eight."""
    assert {command.split()[1] for command in row_commands(COMMANDS)} == set(cli.commands)
    assert len(row_commands(README)) == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_blocks_is_run_somewhere(page: Path) -> None:
    """A command that a document gains fails here until somebody runs it."""
    for command in commands(page):
        if "pytest" in command:
            (file,) = re.findall(r"tests/\S+\.py", command)
            assert (ROOT / file).is_file(), command
            continue
        known = [where for start, where in ELSEWHERE.items() if command.startswith(start)]
        assert known, command
        file, words = known[0]
        assert words in (ROOT / file).read_text(), (command, file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_words_exists(page: Path) -> None:
    """With its options."""
    in_words = [
        command
        for command in commands_in_words(page)
        if not command.startswith("rkcached fingerprint\\0")
    ]
    for command in in_words + [
        line.removeprefix("sudo ") for line in commands(page) if "rkcached " in line
    ]:
        program, *words = command.replace("[", " ").replace("]", " ").split()
        if program != "rkcached":
            continue
        assert words[0] in cli.commands, command
        named = cli.commands[words[0]]
        if isinstance(named, click.Group):
            named = named.commands[words[1]]
        options = {name for parameter in named.params for name in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= options, command


@pytest.mark.long
def test_the_environment(tmp_path: Path) -> None:
    """The page's own lines in a shell, on a copy of this tree: the program has all its data."""
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
    lines = [
        line for line in commands(COMMANDS) if line.startswith(("python3 -m venv", "export PATH"))
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
    (command,) = [line for line in commands(README) if line.startswith("curl")]
    command = command.replace("/run/rkcached/rkcached.sock", str(board.socket)).replace(
        "/assistant", "/system"
    )
    done = subprocess.run(
        command, shell=True, env=board.environment, capture_output=True, text=True, check=True
    )
    assert '"state":"hit"' in done.stdout.replace(" ", "")


def test_the_python_example(board: Workspace) -> None:
    """Copied, and asked for the models."""
    (code,) = blocks(README, "python")
    code = (
        code.replace("/run/rkcached/rkcached.sock", str(board.socket))
        + "print(client.models.list().data[0].id)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("qwen3-0.6b")


def test_the_manifest_is_one(workspace: Workspace) -> None:
    """README's manifest parses: what is wrong with it here are files that only a board has."""
    (manifest,) = blocks(README, "yaml")
    workspace.write("manifest.yaml", manifest)
    done = workspace.cli("check", code=78)
    assert "missing" in done.stderr
    assert "unknown key" not in done.stderr
