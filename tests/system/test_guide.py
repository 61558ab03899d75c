"""Runs what people copy from docs/: commands, manifests and programs, as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, need

from rkcached.sources.parser import parse
from tests import json_documents
from tests.documents import DOCS, README, ROOT, blocks, commands

API = DOCS / "http-api.md"
RKLLM = DOCS / "rkllm.md"
SCRIPTING = DOCS / "scripting.md"
TROUBLE = (DOCS / "troubleshooting.md").read_text()


@pytest.fixture
def board(workspace: Workspace) -> Workspace:
    """What the guide's reader has, on the memory engine."""
    workspace.memory_model()
    workspace.write("system.md", "You are a helpful assistant.\n")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n"
        "  qwen3-0.6b: {path: m.model, prompts: {assistant: system.md}}\n"
        "  qwen3-embedding-0.6b: {path: m.model, embedding: true}\n"
        "  qwen3-reranker-0.6b: {path: m.model, rerank: true}\n",
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
    lines = commands(API)
    assert len(lines) >= 24
    for command in lines:
        endless = " -sN " in command
        end = " --max-time 1" if endless else ""
        done = subprocess.run(
            here(command, board) + end + " -w '\\n%{http_code}'",
            shell=True,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (28 if endless else 0), (command, done.stderr)
        body, _, status = done.stdout.rpartition("\n")
        assert status == "200", (command, body)
        answers[re.sub(r".*http://localhost(\S+).*", r"\1", command)] = body
    created = json.loads(answers["/v1/cache/qwen3-0.6b/generate-binary"])
    (shown,) = [json.loads(block) for block in blocks(API, "json") if "binary_cache" in block]
    assert list(created) == list(shown)
    assert created["object"] == "binary_cache.created"
    assert (
        created["message"] == f"Binary cache generated successfully ({created['size_mb']:.2f} MB)"
    )
    assert json.loads(answers["/v1/chat/completions"])["rkcached"]["cache"] == "lighthouse"
    assert [one["name"] for one in json.loads(answers["/v1/models/loaded"])["data"]] == [
        "qwen3-0.6b",
        "qwen3-embedding-0.6b",
        "qwen3-reranker-0.6b",
    ]
    assert 'rkcached_requests_total{model="qwen3-0.6b",state="hit"}' in answers["/metrics"]


def test_the_python_example(board: Workspace) -> None:
    """Copied and run."""
    (code,) = blocks(API, "python")
    code = here(code, board).replace("HTTPTransport(", "HTTPTransport(verify=False, ")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("hit")


def test_the_examples_for_scripts(board: Workspace) -> None:
    """Copied and run: while all is fresh, with a prompt that cannot be, and without a manifest."""
    (shell,) = blocks(SCRIPTING, "sh")
    (python,) = blocks(SCRIPTING, "python")

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            command,
            env={**board.environment, "PATH": path, **variables},
            cwd=board.root,
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("sh", "-c", shell).stdout == "all are fresh\n"
    waited = json.loads((board.root / "waited.json").read_text())
    json_documents.check_document("wait", waited)

    text = board.manifest.read_text().replace("assistant: system.md", "assistant: gone.md")
    board.write("manifest.yaml", text)
    board.hang_up()
    assert run("sh", "-c", shell).stdout == "not all are fresh: see waited.json\n"
    planned = run(sys.executable, "-c", python).stdout
    assert planned.startswith("blocked qwen3-0.6b/assistant ")

    failed = run(sys.executable, "-c", python, RKCACHED_MANIFEST="nowhere.yaml")
    assert failed.returncode == 1
    assert "nowhere.yaml" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_javascript_example(board: Workspace) -> None:
    """Copied and run, with the official client from the registry."""
    folder = board.root / "js"
    folder.mkdir()
    (code,) = blocks(API, "js")
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


@pytest.mark.long
def test_every_command_about_measuring(board: Workspace) -> None:
    """Each ends well, in the order of the page; what it writes is there."""
    lines = [
        line.replace("MODEL", "qwen3-0.6b").split() for line in commands(DOCS / "measuring.md")
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
    source = ROOT / "rkcached"
    used = {
        code
        for file in source.rglob("*.py")
        if file.name != "client.py"
        for code in re.findall(r'(?:code=|\d{3}, )"([a-z_]+)"', file.read_text())
        if code != "client_gone"  # nobody is there to read it
    }
    table = API.read_text().partition("\n## Errors\n")[2]
    assert {code for code in used if f"`{code}`" not in table} == set()


@pytest.mark.parametrize("page", [README, DOCS / "manifest.md"], ids=lambda page: page.name)
def test_the_example_of_the_manifest(workspace: Workspace, page: Path) -> None:
    """With its files `check` prints ok, and its prompts have the names that the page names."""
    text = blocks(page, "yaml")[0]
    workspace.write("manifest.yaml", text.replace("kind: rkllm", "kind: memory"))
    workspace.memory_model("models/qwen3-0.6b.rkllm")
    for name in re.findall(r"prompts/[a-z_/]+\.md", text):
        workspace.write(name, f"You are {name}.\n")
    workspace.write("prompts/extra/more.md", "You are one more.\n")
    done = workspace.cli("check", "--manifest", "manifest.yaml")
    for shown in blocks(page, "text"):
        if ": ok, " in shown:
            assert done.stdout.endswith(shown)
    planned = {
        (step["model"], step["prompt"])
        for step in json.loads(workspace.cli("plan", "--json", code=None).stdout)["actions"]
    }
    names = {"README.md": {"assistant"}, "manifest.md": {"system", "coding_rules"}}[page.name]
    assert planned == {("qwen3-0.6b", name) for name in {*names, "more"}}


def test_the_manifest_for_a_board() -> None:
    """That of docs/rkllm.md parses, with the model's path where the page has it installed."""
    (text,) = blocks(RKLLM, "yaml")
    model = parse(text, file=Path("/etc/rkcached/manifest.yaml")).models["qwen3-0.6b"]
    assert f"sudo install -D -m 644 qwen3-0.6b.rkllm {model.path}" in commands(RKLLM)


def test_the_conversion(tmp_path: Path) -> None:
    """It calls the toolkit's functions in their order and stops at the first that fails.

    A stand-in has them here.
    """
    (code,) = blocks(RKLLM, "python")
    (tmp_path / "convert.py").write_text(code)
    (tmp_path / "rkllm").mkdir()
    stand_in = """
import os

class RKLLM:
    def __getattr__(self, name):
        def call(*words, **named):
            print(name, words, sorted(named))
            return int(name == os.environ.get("FAILS"))
        return call
"""
    (tmp_path / "rkllm/api.py").write_text(stand_in)
    calls = ("load_huggingface", "build", "export_rkllm")

    def convert(fails: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "convert.py"]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={"FAILS": fails},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    done = convert("")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(calls)
    assert "('qwen3-0.6b.rkllm',)" in done.stdout
    for number, name in enumerate(calls, 1):
        done = convert(name)
        assert done.returncode == 1
        assert done.stderr.startswith("the ")
        assert len(done.stdout.splitlines()) == number


def _numberless(text: str) -> str:
    return re.sub(r"(?<![-\w])\d+", "N", text)


def _checked(space: Workspace, text: str) -> str:
    space.write("manifest.yaml", text)
    return space.cli("check", code=78).stderr


def _manifest(kind: str = "memory", *, model: str = "m.model", more: str = "") -> str:
    engine = f"version: 1\nengine: {{kind: {kind}}}\n"
    return f"{engine}models:\n  m: {{path: {model}, prompts: {{a: a.md}}}}\n{more}"


def _running(space: Workspace, text: str = "You are A.\n") -> Workspace:
    space.write("a.md", text)
    space.write("manifest.yaml", _manifest())
    space.start()
    space.wait_settled()
    return space


def _rejected_while_running(space: Workspace) -> str:
    _running(space).write("manifest.yaml", _manifest(more="promts: 3\n"))
    space.cli("reload", code=78)
    return space.cli("status").stdout


def _asked(space: Workspace, path: str, body: dict[str, Any]) -> str:
    return _running(space).request("POST", path, json=body).text


def _too_long(space: Workspace) -> str:
    shown = json.loads(_running(space, "word " * 9000).cli("explain", "m/a", "--json").stdout)
    return _numberless(shown["reason"])


def _second_daemon(space: Workspace) -> str:
    return _running(space).cli("run", "--socket", str(space.root / "other.sock"), code=75).stderr


def _other_files(space: Workspace) -> str:
    space.write("manifest.yaml", _manifest())
    space.write("full/thesis.txt", "x")
    return space.cli("run", "--cache-dir", "full", code=73).stderr


CONFLICT = {
    "model": "m/a",
    "messages": [{"role": "system", "content": "B"}, {"role": "user", "content": "hi"}],
}

SYMPTOMS: dict[str, Callable[[Workspace], str]] = {
    "no daemon answers on ...": lambda space: space.cli("status", code=69).stderr,
    "changes are made on ... only": lambda space: _asked(space, "/v1/reload", {}),
    "belongs to another daemon": _second_daemon,
    "is not taken as a store": _other_files,
    "unknown key": lambda space: _checked(space, _manifest(more="promts: 3\n")),
    "manifest rejected, the last good one is in force": _rejected_while_running,
    "source missing": lambda space: _checked(space, _manifest(model="none.model")),
    "the prompt is empty": lambda space: (space.write("a.md", ""), _checked(space, _manifest()))[1],
    "is not UTF-8": lambda space: (space.write("a.md", b"h\xe9"), _checked(space, _manifest()))[1],
    "is not a GGUF model": lambda space: _checked(space, _manifest("llamacpp")),
    "the prompt has N tokens, the context holds N": _too_long,
    "there is no runtime library at ...": lambda space: _checked(
        space, _manifest().replace("memory", "rkllm, library: none.so")
    ),
    "system_message_conflict": lambda space: _asked(space, "/v1/chat/completions", CONFLICT),
}
"""What a row of docs/troubleshooting.md begins with, and how it comes about."""


@pytest.mark.parametrize("words", SYMPTOMS)
def test_the_symptom_is_in_the_program_s_words(workspace: Workspace, words: str) -> None:
    """A message that is worded anew makes the page useless: who searches for it finds nothing."""
    rows = [
        _numberless(line.split("|")[1]) for line in TROUBLE.splitlines() if line.startswith("| ")
    ]
    assert any(f"`{words}`" in row for row in rows)
    workspace.memory_model()
    workspace.write("a.md", "You are A.\n")
    seen = SYMPTOMS[words](workspace)
    for piece in words.split("..."):
        assert piece.strip() in seen, seen


def test_other_symptoms_are_words_of_the_program() -> None:
    """What needs a board or a service to come about is at least in the program's text."""
    program = " ".join(file.read_text() for file in sorted((ROOT / "rkcached").rglob("*.py")))
    program = re.sub(r'"\s*f?"', "", program)  # strings that are joined
    shown = [
        words
        for row in TROUBLE.splitlines()
        for words in re.findall(r"`([^`]+)`", (row + "||").split("|")[1])
    ]
    sentences = [
        words for words in shown if words.count(" ") >= 2 and _numberless(words) not in SYMPTOMS
    ]
    assert len(sentences) >= 8
    for sentence in sentences:
        for piece in sentence.split("..."):
            words = re.sub(r"/run/rkcached/rkcached\.sock", "", piece).strip(" ,")
            assert words in program, sentence


@pytest.mark.long
def test_a_quarantined_prompt_is_tried_again_when_it_is_regenerated(workspace: Workspace) -> None:
    """As the page says. The model is still broken: the build fails again, with the reason."""
    assert "`rkcached regenerate MODEL/PROMPT`" in TROUBLE
    workspace.memory_model(faults=[{"op": "save", "kind": "segfault", "at": 1}])
    workspace.write("a.md", "You are A.\n")
    workspace.write("manifest.yaml", _manifest())
    workspace.start()
    workspace.wait_state("a", "quarantined")
    before = workspace.log_text().count("build started")
    done = workspace.cli("regenerate", "m/a", code=None)
    assert done.returncode != 0
    assert "SIGSEGV" in done.stderr
    assert workspace.log_text().count("build started") > before
