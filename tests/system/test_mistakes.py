"""Mistakes that users make, and what each is answered with.

A message is worth something if it says what is wrong, where, and what to do next. Each row below is
one mistake, made for real, with words of its message for the three; one that loses them fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace
from test_refused import WEAK

from rkcached.cli.main import main
from tests import gguf_files
from tests.waiting import DEADLINE_S


@dataclass(frozen=True, kw_only=True)
class Says:
    """Words of a message, each part as a reader finds it, and the exit code or HTTP status."""

    where: str
    what: str
    then: str
    code: int


def graded(message: str, says: Says) -> None:
    """Each of the three must be there; the folder of the test is left out of the message."""
    assert "Traceback" not in message
    lost = [part for part in (says.where, says.what, says.then) if part not in message]
    assert not lost, message


# Manifests and the files that they name

MANIFEST = """\
version: 1
engine: {kind: memory}
models:
  m:
    path: m.model
    params: {max_context_len: 4096}
    prompts: {a: a.md}
"""
MODEL = json.dumps({"rkcached_memory_model": 1})


@dataclass(frozen=True, kw_only=True)
class Written:
    """A manifest in which `change` is replaced, with `more` below it, and with other files."""

    says: tuple[str, str, str]
    """Where, what and what next; the exit code is that of a manifest with problems."""
    change: tuple[str, str] = ("", "")
    more: str = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None

    def text(self) -> str:
        old, new = self.change
        assert old in MANIFEST
        return MANIFEST.replace(old, new, 1) + self.more


def engine(kind: str, model: str) -> dict[str, Any]:
    """The manifest of another engine, with this model file."""
    changed = MANIFEST.replace("kind: memory", f"kind: {kind}").replace("m.model", model)
    return {"change": (MANIFEST, changed)}


def without(folder: Path) -> None:
    (folder / "a.md").unlink()


def a_folder(folder: Path) -> None:
    without(folder)
    (folder / "a.md").mkdir()


def a_pipe(folder: Path) -> None:
    without(folder)
    os.mkfifo(folder / "a.md")


def a_circle(folder: Path) -> None:
    without(folder)
    (folder / "a.md").symlink_to("a.md")


TOOLS = ("{a: a.md}", "{a: {files: [a.md], tools: tools.json}}")
TEMPLATE = "    chat_template: t.jinja\n"
CUT_OFF = gguf_files.gguf(tensors=1) + gguf_files.text("w") + struct.pack("<IQIQ", 1, 8, 0, 9999)

MANIFESTS: dict[str, Written] = {
    "bracket": Written(
        change=("a.md}", "a.md"),
        says=("manifest.yaml:8: ", "the bracket that opens in line 7", "close the bracket"),
    ),
    "quote": Written(
        change=("m.model", '"m.model'),
        says=("manifest.yaml:5: ", "the quote that opens here is never closed", "close the quote"),
    ),
    "tab": Written(
        change=("    path", "\tpath"),
        says=("manifest.yaml:5: ", "cannot start any token", "indent with spaces, not tabs"),
    ),
    "indentation": Written(
        change=("    params", "   params"),
        says=("manifest.yaml:6: ", "not valid YAML", "indent it as far as the keys"),
    ),
    "colon": Written(
        change=("m.model", "my model: v2.model"),
        says=("manifest.yaml:5: ", "not valid YAML: mapping values", "put the text in quotes"),
    ),
    "unknown key": Written(
        change=("prompts:", "promts:"),
        says=("manifest.yaml:7: ", "unknown key 'promts'", "did you mean 'prompts'?"),
    ),
    "word of others": Written(
        more="    variables: {x: 1}\n",
        says=("manifest.yaml:8: ", "unknown key 'variables'", "write `chat_template_kwargs: ...`"),
    ),
    "no number": Written(
        change=("4096", "big"),
        says=("manifest.yaml:6: ", "expected a whole number, got 'big'", "allowed is 32..1048576"),
    ),
    "no boolean": Written(
        more="    embedding: yes please\n",
        says=("manifest.yaml:8: ", "expected true or false", "write `embedding: true` or"),
    ),
    "list of prompts": Written(
        change=("{a: a.md}", "[a.md]"),
        says=("manifest.yaml:7: ", "expected a mapping, got a list", "write `prompts: {name: "),
    ),
    "list as prompt": Written(
        change=("{a: a.md}", "{a: [a.md, b.md]}"),
        says=("manifest.yaml:7: ", "a: expected a path", "write `a: {files: [a.md, b.md]}`"),
    ),
    "no models": Written(
        change=(MANIFEST[MANIFEST.index("  m:") :], ""),
        says=("manifest.yaml:3: ", "models: expected a mapping", "write `models: {name: "),
    ),
    "no version": Written(
        change=("version: 1\n", ""),
        says=("manifest.yaml:1: ", "missing key 'version'", "add `version: 1`"),
    ),
    "unknown engine": Written(
        change=("kind: memory", "kind: vllm"),
        says=("manifest.yaml:2: ", "unknown value 'vllm'", "known are rkllm, llamacpp, memory"),
    ),
    "duplicate key": Written(
        more="    path: n.model\n",
        says=("manifest.yaml:8: ", "duplicate key 'path', first given in line 5", "remove one"),
    ),
    "bad name": Written(
        change=("{a:", "{House Rules:"),
        says=("manifest.yaml:7: ", "'House Rules' cannot be a name", "for example 'house-rules'"),
    ),
    "reserved name": Written(
        change=("  m:", "  load:"),
        says=("manifest.yaml:4: ", "cannot be named 'load'", "choose another name"),
    ),
    "size without unit": Written(
        more="cache: {max_bytes: 4 gigs}\n",
        says=("manifest.yaml:8: ", "unknown unit in '4 gigs'", "the units are KB, MB, GB"),
    ),
    "answer without room": Written(
        change=("4096", "128"),
        says=("manifest.yaml:6: ", "max_new_tokens is 512", "lower max_new_tokens"),
    ),
    "no model file": Written(
        change=("m.model", "n.model"),
        says=("manifest.yaml:5: ", "source missing: ", "put the model file there, or correct"),
    ),
    "no prompt file": Written(
        prepare=without,
        says=("manifest.yaml:7: ", "source missing: ", "put the file there, or correct its path"),
    ),
    "empty prompt": Written(
        files={"a.md": "\n \n"},
        says=("manifest.yaml:7: ", "the prompt is empty", "write the prompt's text into the file"),
    ),
    "folder as prompt": Written(
        prepare=a_folder,
        says=("manifest.yaml:7: ", "a.md is a directory", "use prompts_from with a pattern"),
    ),
    "pipe as prompt": Written(
        prepare=a_pipe,
        says=("manifest.yaml:7: ", "a.md is not a regular file", "name a text file"),
    ),
    "link to itself": Written(
        prepare=a_circle,
        says=("manifest.yaml:7: ", "it is a link that leads back to itself", "remove the link"),
    ),
    "not UTF-8": Written(
        files={"a.md": "Grüße\n".encode("latin1")},
        says=("manifest.yaml:7: ", "a.md is not UTF-8: byte 0xfc at offset 2", "save it as UTF-8"),
    ),
    "home": Written(
        change=("a.md}", "~/a.md}"),
        says=("manifest.yaml:7: ", "'~' is not expanded", "write the absolute path"),
    ),
    "no prompts folder": Written(
        more="    prompts_from: nowhere/*.md\n",
        says=("manifest.yaml:8: ", "nowhere cannot be listed", "create the folder, or correct"),
    ),
    "unknown template": Written(
        more="    chat_template: chatm\n",
        says=("manifest.yaml:8: ", "neither a built-in template nor", "did you mean 'chatml'?"),
    ),
    "broken template": Written(
        more=TEMPLATE,
        files={"t.jinja": "a\n{% for x in %}\n"},
        says=("manifest.yaml:8: ", "t.jinja, line 2: syntax error", "correct the line"),
    ),
    "no variable": Written(
        more=TEMPLATE,
        files={"t.jinja": "{{ messages[0].content + persona }}"},
        says=("t.jinja, line 1: ", "'persona' is undefined", "the model's chat_template_kwargs"),
    ),
    "broken tools": Written(
        change=TOOLS,
        files={"tools.json": '[{"type":\n'},
        says=("manifest.yaml:7: ", "tools.json:2: not JSON", 'write [{"type": "function", '),
    ),
    "other tools": Written(
        change=TOOLS,
        files={"tools.json": '[{"name": "f"}]'},
        says=("manifest.yaml:7: ", "tools.json: 0.type is missing", 'write [{"type": "function"'),
    ),
    "cut-off weights": Written(
        **engine("llamacpp", "m.gguf"),
        files={"m.gguf": CUT_OFF},
        says=("manifest.yaml:5: ", "m.gguf is cut off: it has 57 bytes", "get the file again"),
    ),
    "cut-off header": Written(
        **engine("llamacpp", "m.gguf"),
        files={"m.gguf": CUT_OFF[:20]},
        says=("manifest.yaml:5: ", "is damaged or cut off", "get the file again"),
    ),
    "empty model": Written(
        **engine("llamacpp", "m.gguf"),
        files={"m.gguf": b""},
        says=("manifest.yaml:5: ", "is not a GGUF model, but empty", "get the file again"),
    ),
    "pointer": Written(
        **engine("llamacpp", "m.gguf"),
        files={"m.gguf": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        says=("manifest.yaml:5: ", "but a pointer of Git LFS", "run `git lfs pull`"),
    ),
    "web page": Written(
        **engine("llamacpp", "m.gguf"),
        files={"m.gguf": "<!DOCTYPE html><html><title>Sign in</title></html>"},
        says=("manifest.yaml:5: ", "but a web page", "download the file itself"),
    ),
    "safetensors": Written(
        **engine("llamacpp", "m.safetensors"),
        files={"m.safetensors": struct.pack("<Q", 20) + b'{"__metadata__":{}}'},
        says=("manifest.yaml:5: ", "but a safetensors file", "get the model as GGUF"),
    ),
    "other engine": Written(
        **engine("llamacpp", "m.rkllm"),
        files={"m.rkllm": b"RKLLM" + bytes(99)},
        says=("manifest.yaml:5: ", "m.rkllm is not a GGUF model", "set path to a file of that"),
    ),
    "GGUF on the NPU": Written(
        **engine("rkllm", "m.gguf"),
        files={"m.gguf": gguf_files.gguf()},
        says=("manifest.yaml:5: ", "is not a RKLLM model, but a GGUF model", "set engine.kind to"),
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_in_a_manifest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rkcached check` says it."""
    mistake = MANIFESTS[name]
    files = {"m.model": MODEL, "a.md": "You are A.\n", **mistake.files}
    for file, text in files.items():
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "manifest.yaml").write_text(mistake.text())
    if mistake.prepare is not None:
        mistake.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)

    where, what, then = mistake.says
    message = typed(["check"], os.EX_CONFIG, capsys)
    graded(message, Says(where=where, what=what, then=then, code=os.EX_CONFIG))


def typed(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a command that is run here; it must exit with `code`."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == code, printed
    return printed.err


# Commands


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A daemon with a model that answers, one that ranks, and one for embeddings."""
    space = Workspace(tmp_path_factory.mktemp("served"))
    space.memory_model()
    space.write("a.md", "You are prompt A.\n")
    space.write("b.md", "You are prompt B.\n")
    space.write("long.md", "word " * 5000)
    space.write("empty/x.bin", "")
    space.declare(
        "{a: a.md, house-rules: b.md, long: long.md}",
        model="  ranker: {path: m.model, rerank: true}\n  em: {path: m.model, embedding: true}\n",
    )
    space.start()
    try:
        space.wait_settled()
        yield space
    finally:
        assert space.stop() == 0
    assert "Traceback" not in space.log_text(), space.log_text()


@contextlib.contextmanager
def another_server(path: Path, answer: bytes) -> Iterator[None]:
    """Something else that answers on a socket."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(DEADLINE_S)


RULES = "m/house-rules"
COMMANDS: dict[str, Says] = {
    "statsu": Says(
        where="rkcached [OPTIONS] COMMAND",
        what="No such command 'statsu'",
        then="Did you mean 'status'?",
        code=os.EX_USAGE,
    ),
    "status --jsn": Says(
        where="rkcached status", what="No such option '--jsn'", then="'--json'", code=os.EX_USAGE
    ),
    "status x": Says(
        where="rkcached status",
        what="Got unexpected extra argument (x)",
        then="Try 'rkcached status --help'",
        code=os.EX_USAGE,
    ),
    "chat m hi --max-tokens many": Says(
        where="'--max-tokens'",
        what="'many' is not a whole number",
        then="at least 1",
        code=os.EX_USAGE,
    ),
    "wait --timeout soon": Says(
        where="'--timeout'",
        what="'soon' is not a number of seconds",
        then="write it as 60",
        code=os.EX_USAGE,
    ),
    "chat": Says(
        where="error: ",
        what="there is no question",
        then="as an argument or on standard input",
        code=os.EX_USAGE,
    ),
    "chat mm hi": Says(
        where="'mm'", what="does not exist", then="known models: em, m", code=os.EX_NOINPUT
    ),
    "chat m/house-rule hi": Says(
        where="the model 'm'",
        what="has no prompt 'house-rule'",
        then="did you mean 'house-rules'?",
        code=os.EX_NOINPUT,
    ),
    "chat ranker hi": Says(
        where="the model 'ranker'",
        what="writes no text",
        then="name a model that writes text",
        code=os.EX_DATAERR,
    ),
    "load mm": Says(
        where="'mm'", what="does not exist", then="known models: em, m", code=os.EX_NOINPUT
    ),
    "load m/a": Says(
        where="'m/a'", what="only a model can be named", then="write 'm'", code=os.EX_DATAERR
    ),
    "explain m/house-rule": Says(
        where="m/house-rule", what="there is no prompt", then=f"'{RULES}'?", code=os.EX_NOINPUT
    ),
    "regenerate m/house-rule": Says(
        where="'m/house-rule'", what="there is no", then=f"'{RULES}'?", code=os.EX_NOINPUT
    ),
    "regenerate": Says(
        where="error: ",
        what="nothing to regenerate",
        then="or use --all",
        code=os.EX_USAGE,
    ),
    "logs m/house-rule": Says(
        where="here", what="the service is not installed", then="terminal", code=os.EX_NOINPUT
    ),
    "inspect m.model": Says(
        where="m.model", what="is not a prompt cache", then="known are", code=os.EX_DATAERR
    ),
    "status --socket m.model": Says(
        where="/m.model", what="is a file, and no socket", then="--socket", code=os.EX_UNAVAILABLE
    ),
    "status --socket empty": Says(
        where="/empty", what="is a folder, and no socket", then="--socket", code=os.EX_UNAVAILABLE
    ),
    "status --socket nothing.sock": Says(
        where="/nothing.sock",
        what="no daemon answers on",
        then="`rkcached run`",
        code=os.EX_UNAVAILABLE,
    ),
    f"status --socket {'x' * 120}": Says(
        where="x" * 120,
        what="is too long for a socket",
        then="--socket",
        code=os.EX_UNAVAILABLE,
    ),
    "check -m nothing.yaml": Says(
        where="/nothing.yaml: ", what="cannot be read", then="`rkcached init`", code=os.EX_CONFIG
    ),
    "init .": Says(
        where="/manifest.yaml",
        what="exists already, and is not overwritten",
        then="`rkcached add FILE`",
        code=os.EX_CANTCREAT,
    ),
    "init empty": Says(
        where="/empty", what="has no model", then="put a .gguf or .rkllm", code=os.EX_NOINPUT
    ),
    "add a.md --model m": Says(
        where="m/a", what="has the prompt m/a already", then="--name", code=os.EX_USAGE
    ),
    "add nothing.md": Says(
        where="nothing.md", what="is no file", then="name a model", code=os.EX_NOINPUT
    ),
    "add empty": Says(
        where="empty", what="is no file", then="`prompts_from: empty/*.md`", code=os.EX_NOINPUT
    ),
    "add a.md --model x": Says(
        where="'x'", what="could have a prompt", then="models that could: m", code=os.EX_USAGE
    ),
    "edit m/house-rule": Says(
        where="m/house-rule", what="there is no prompt", then=f"'{RULES}'?", code=os.EX_NOINPUT
    ),
    "edit m/a": Says(
        where="EDITOR",
        what="there is no program 'nonesuch'",
        then="set EDITOR to an editor that is installed",
        code=os.EX_USAGE,
    ),
    "port enable nowhere": Says(
        where="'nowhere'",
        what="is not an address with a port",
        then="127.0.0.1:8080",
        code=os.EX_CONFIG,
    ),
    "key revoke nobody": Says(
        where="'nobody'", what="there is no key", then="known: none", code=os.EX_NOINPUT
    ),
    "bench m/house-rule": Says(
        where="'m/house-rule'", what="there is no prompt of", then=f"'{RULES}'?", code=os.EX_NOINPUT
    ),
    "verify --cache-dir nowhere": Says(
        where="/nowhere", what="there is no store", then="use --cache-dir", code=os.EX_NOINPUT
    ),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_on_the_command_line(
    line: str,
    served: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(served.root)
    for name, value in {**served.environment, "EDITOR": "nonesuch"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VISUAL", raising=False)
    says = COMMANDS[line]
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        graded(typed(line.split(), says.code, capsys), says)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "does not answer as rkcached does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "does not answer as rkcached does"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "does not answer as rkcached does"),
        (b"220 mail.example ESMTP\r\n", "does not speak HTTP"),
    ],
    ids=["page", "json", "missing", "mail"],
)
def test_another_program_on_the_socket(
    answer: bytes,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was a traceback of whatever its answer lacked."""
    monkeypatch.chdir(tmp_path)
    says = Says(where="/other.sock", what=what, then="--socket", code=os.EX_UNAVAILABLE)
    with another_server(tmp_path / "other.sock", answer):
        for command in ("status", "ps"):
            graded(typed([command, "--socket", "other.sock"], says.code, capsys), says)


def test_of_who_starts_and_waits(served: Workspace) -> None:
    """These are not run in the process of the tests: they stay, or leave a thread behind."""
    waited = Says(
        where="m/house-rule", what="is not declared", then=f"'{RULES}'?", code=os.EX_NOINPUT
    )
    graded(served.cli("wait", "m/house-rule", code=waited.code).stderr, waited)

    too_long = Says(
        where="m/long", what="the context holds 4096", then="raise params", code=os.EX_DATAERR
    )
    graded(served.cli("wait", "m/long", code=too_long.code).stderr, too_long)

    second = Says(
        where="/cache", what="belongs to another daemon", then="stop that", code=os.EX_TEMPFAIL
    )
    graded(served.cli("run", code=second.code).stderr, second)

    setting = Says(
        where="RKCACHED_LOG_LEVEL", what="log-level: should be", then="correct", code=os.EX_CONFIG
    )
    graded(served.cli("run", code=setting.code, RKCACHED_LOG_LEVEL="loud").stderr, setting)

    piped = Says(where="error: ", what="no model is named", then="rkcached chat MODEL", code=64)
    graded(served.cli("chat", stdin="hi", code=piped.code).stderr, piped)


def test_a_time_that_is_too_short(served: Workspace) -> None:
    """It said that no daemon answered, which nobody had waited for."""
    error = served.cli("wait", "--timeout", "0.001", code=os.EX_TEMPFAIL).stderr
    assert "no daemon" not in error
    assert "rkcached run" not in error
    says = Says(where="0.001 s", what="time is up", then="--timeout", code=os.EX_TEMPFAIL)
    graded(error, says)


def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    """A prompt that its user may not read."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up what lets root open everything")
    space = Workspace(tmp_path)
    space.memory_model()
    space.write("a.md", "x").chmod(0)
    space.declare("{a: a.md}")
    done = subprocess.run(
        [*WEAK, *space.command("check")],
        env=space.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == os.EX_CONFIG, done
    says = Says(where="manifest.yaml:8: ", what="permission denied", then="chmod", code=78)
    graded(done.stderr, says)


# Requests

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
LONG = "word " * 2000
PICTURE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"method": "POST", "path": CHAT, "json": {"model": "m", "messages": HI, **fields}}


def rerank(**fields: Any) -> dict[str, Any]:
    body = {"model": "ranker", "query": "q", "documents": ["d"], **fields}
    return {"method": "POST", "path": "/v1/rerank", "json": body}


def sent(content: bytes, path: str = CHAT) -> dict[str, Any]:
    return {"method": "POST", "path": path, "content": content}


REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, str, str, int]]] = {
    "bad JSON": (
        sent(b"{'model': 'm'}"),
        ("line 1 column 2", "the body is not JSON", "send one JSON object", 400),
    ),
    "form": (
        {"method": "POST", "path": CHAT, "data": {"model": "m"}},
        ("line 1 column 1", "the body is not JSON", "send one JSON object", 400),
    ),
    "no body": (sent(b""), ("body", "the request has no body", "send one JSON object", 400)),
    "list": (sent(b"[]"), ("the body", "should be an object", "send one JSON object", 400)),
    "unknown model": (
        chat(model="rankr"),
        ("'rankr'", "does not exist", "did you mean 'ranker'?", 404),
    ),
    "unknown prompt": (
        chat(cache="house-rule"),
        ("'m'", "has no prompt 'house-rule'", "did you mean 'house-rules'?", 404),
    ),
    "no messages": (
        sent(b'{"model": "m", "prompt": "hi"}'),
        ("messages", "is missing", "add it to the body", 400),
    ),
    "unknown parameter": (
        chat(temprature=1),
        ("temprature", "is not supported", "did you mean 'temperature'?", 400),
    ),
    "wrong type": (chat(temperature="hot"), ("temperature:", "should be", "a number", 400)),
    "out of range": (chat(top_p=7), ("top_p:", "should be", "at most 1", 400)),
    "too long": (
        chat(messages=[{"role": "user", "content": LONG}]),
        ("messages", "tokens, the context holds 4096", "shorten messages, or raise", 400),
    ),
    "unknown role": (
        chat(messages=[{"role": "bot", "content": "hi"}]),
        ("messages.0", "the role 'bot'", "is none of 'system', 'developer', 'user'", 400),
    ),
    "no role": (
        chat(messages=[{"content": "hi"}]),
        ("messages.0.role", "is missing", "add it to the body", 400),
    ),
    "picture": (
        chat(messages=[{"role": "user", "content": [PICTURE]}]),
        ("messages.0.content.0", "the type 'image_url' is not supported", "supported: text", 400),
    ),
    "tool": (
        chat(tools=[{"name": "f"}]),
        ("tools.0.type", "is missing", "add it to the body", 400),
    ),
    "no tools": (
        chat(tool_choice="required"),
        ("tool_choice", "there are no tools", "add tools, or leave it out", 400),
    ),
    "schema": (
        chat(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "strng"}},
            }
        ),
        ("$.type", "not a JSON schema", "correct or simplify", 400),
    ),
    "two answers": (chat(n=2), ("n:", "should be", "at most 1", 400)),
    "method": (
        {"method": "GET", "path": CHAT},
        (CHAT, "does not take GET", "use POST", 405),
    ),
    "path": (
        sent(b"{}", "/v1/chat/completion"),
        ("/v1/chat/completion ", "does not exist", f"did you mean {CHAT}?", 404),
    ),
    "change": (
        sent(b"", "/v1/reload"),
        ("admin.sock", "changes are made on", "send the request there", 403),
    ),
    "stream": (rerank(stream=True), ("stream", "is not supported", "leave it out", 400)),
    "ranker of prompts": (
        rerank(model="m/a"),
        ("'m/a'", "only a model can be named", "write 'm'", 400),
    ),
    "no ranker": (
        rerank(model="m"),
        ("'m'", "does not rank documents", "rerank: true", 400),
    ),
    "texts": (
        {"method": "POST", "path": "/rerank", "json": {"query": "q", "texts": ["d"]}},
        ("texts", "as text-embeddings-inference takes them", "name them documents", 400),
    ),
    "long query": (
        rerank(query=LONG),
        ('"param":"query"', "the context holds 4096", "shorten query", 400),
    ),
    "long document": (
        rerank(documents=["d", LONG]),
        ('"param":"documents.1"', "the context holds 4096", "shorten documents.1", 400),
    ),
    "long input": (
        {"method": "POST", "path": "/v1/embeddings", "json": {"model": "em", "input": ["x", LONG]}},
        ('"param":"input.1"', "the context holds 4096", "shorten input.1", 400),
    ),
    "pull": (
        {"method": "POST", "path": "/api/pull", "json": {"model": "qwen3"}},
        ("the manifest", "does not support pull", "put the model's file on this machine", 403),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_in_a_request(name: str, served: Workspace) -> None:
    request, (where, what, then, status) = REQUESTS[name]
    answer = served.request(**request)
    assert answer.status_code == HTTPStatus(status), answer.text
    graded(answer.text, Says(where=where, what=what, then=then, code=status))


def test_there_are_at_least_sixty() -> None:
    assert len(MANIFESTS) + len(COMMANDS) + len(REQUESTS) >= 60
