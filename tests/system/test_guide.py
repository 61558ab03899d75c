"""The commands of docs/http-api.md and docs/measuring.md, run as they stand but for places: what people copy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, need

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "http-api.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def board(workspace: Workspace) -> Workspace:
    """What the guide's reader has, on the memory engine."""
    workspace.memory_model()
    workspace.write("system.md", "You are a helpful assistant.\n")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n"
        "  qwen3-0.6b: {path: m.model, prompts: {system: system.md}}\n"
        "  qwen3-embedding-0.6b: {path: m.model, embedding: true}\n",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


def here(text: str, space: Workspace) -> str:
    return text.replace("/run/rkcached/rkcached.sock", str(space.socket)).replace(
        "/run/rkcached/admin.sock", str(space.root / "admin.sock")
    )


def test_every_curl_command(board: Workspace) -> None:
    """Each succeeds, in the order of the page, and answers what the page says."""
    need("curl")
    answers: dict[str, Any] = {}
    commands = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) >= 18
    for command in commands:
        done = subprocess.run(
            here(command, board) + " -w '\\n%{http_code}'",
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        )
        body, _, status = done.stdout.rpartition("\n")
        assert status == "200", (command, body)
        answers[re.sub(r".*http://localhost(\S+).*", r"\1", command)] = body
    created = json.loads(answers["/v1/cache/qwen3-0.6b/generate-binary"])
    (shown,) = [json.loads(block) for block in blocks("json") if "binary_cache" in block]
    assert list(created) == list(shown)
    assert created["object"] == "binary_cache.created"
    assert (
        created["message"] == f"Binary cache generated successfully ({created['size_mb']:.2f} MB)"
    )
    assert json.loads(answers["/v1/chat/completions"])["rkcached"]["cache"] == "lighthouse"
    assert [one["name"] for one in json.loads(answers["/v1/models/loaded"])["data"]] == [
        "qwen3-0.6b",
        "qwen3-embedding-0.6b",
    ]
    assert 'rkcached_requests_total{model="qwen3-0.6b",state="hit"}' in answers["/metrics"]


def test_the_python_example(board: Workspace) -> None:
    """Copied and run."""
    (code,) = blocks("python")
    code = here(code, board).replace("HTTPTransport(", "HTTPTransport(verify=False, ")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("hit")


def test_the_javascript_example(board: Workspace) -> None:
    """Copied and run, with the official client from the registry."""
    folder = board.root / "js"
    folder.mkdir()
    (code,) = blocks("js")
    (folder / "example.mjs").write_text(here(code, board))
    install = [
        need("npm"),
        "install",
        "--no-audit",
        "--no-fund",
        "--silent",
        "openai@6",
        "undici@7",
    ]
    subprocess.run(
        [*install, "--prefix", str(folder)],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=120,
    )
    node = [need("node"), "example.mjs"]
    done = subprocess.run(node, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_about_measuring(board: Workspace) -> None:
    """Each ends well, in the order of the page; what it writes is there."""
    (block,) = re.findall(r"```\n(.*?)```", (DOCS / "measuring.md").read_text(), re.DOTALL)
    lines = [
        line.partition("#")[0].replace("MODEL", "qwen3-0.6b").split() for line in block.splitlines()
    ]
    assert len(lines) == 5
    for program, *arguments in lines:
        assert program == "rkcached"
        if "compare" in arguments:
            (board.root / "after.json").write_bytes((board.root / "before.json").read_bytes())
        places = [
            str(board.root / name) if re.search(r"\.(json|svg)$", name) else name
            for name in arguments
        ]
        done = board.cli(*places)
        assert done.stdout
        assert "Traceback" not in done.stderr
    assert (board.root / "gain.svg").read_text().startswith("<?xml")


def test_the_error_table_has_every_code() -> None:
    """A code that the program uses and the page does not tell fails here."""
    source = Path(__file__).parents[2] / "rkcached"
    used = {
        code
        for file in source.rglob("*.py")
        if file.name != "client.py"
        for code in re.findall(r'(?:code=|\d{3}, )"([a-z_]+)"', file.read_text())
        if code != "client_gone"  # nobody is there to read it
    }
    table = TEXT[TEXT.index("## Errors") :]
    assert {code for code in used if f"`{code}`" not in table} == set()
