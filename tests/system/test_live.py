"""`rkcached status --watch`: at a terminal, without one, and across a restart of the daemon."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pyte
import pytest
from conftest import Workspace, need

from tests import json_documents
from tests.waiting import DEADLINE_S, wait_until

ESCAPE = b"\x1b"

WHOLE_S = 0.1
"""A screen that does not change for so long is one frame, and not a part of it."""


class Terminal:
    """A terminal of 80 columns by 24 lines with `status --watch` on it. `text` is what one sees."""

    def __init__(
        self,
        space: Workspace,
        *arguments: str,
        size: tuple[int, int] = (80, 24),
        **environment: str,
    ) -> None:
        self.raw = b""
        columns, lines = size
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.modes = termios.tcgetattr(slave)
        ours = (
            "COLUMNS",
            "LINES",
            "NO_COLOR",
            "TERM",
        )  # a worker of pytest has LINES, from readline
        outer = {key: value for key, value in space.environment.items() if key not in ours}
        self.process = subprocess.Popen(
            [need("setsid"), "--ctty", *space.command("status", "--watch", *arguments)],
            env={**outer, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        self._slave = slave
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # its last user is gone
            while data := os.read(self.master, 65536):
                self.raw += data
                self._stream.feed(data)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def colours(self) -> set[str]:
        return {cell.fg for row in self._screen.buffer.values() for cell in row.values()}

    def wait_for(self, *words: str, without: str = "") -> str:
        before, since = "", 0.0

        def there() -> str:
            nonlocal before, since
            text = self.text
            if text != before:  # a frame may come in parts
                before, since = text, time.monotonic()
            shown = all(word in text for word in words) and not (without and without in text)
            return text if shown and time.monotonic() - since > WHOLE_S else ""

        try:
            found: str = wait_until(there, f"{words} on the screen")
        except pytest.fail.Exception:
            pytest.fail(f"{words} not without {without!r} in\n{self.text}")
        return found

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Its exit code; the terminal must be as it was."""
        code = self.process.wait(DEADLINE_S)
        assert termios.tcgetattr(self._slave) == self.modes
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._slave)
        self._reader.join(DEADLINE_S)
        os.close(self.master)


@contextlib.contextmanager
def at_a_terminal(
    space: Workspace, *, size: tuple[int, int] = (80, 24), **environment: str
) -> Iterator[Terminal]:
    terminal = Terminal(space, size=size, **environment)
    try:
        yield terminal
    finally:
        terminal.close()


def test_every_change_is_seen(two_prompts: Workspace) -> None:
    """An answer, an edit, a broken manifest and its repair are on the screen without a key.

    Q ends it.
    """
    with at_a_terminal(two_prompts) as terminal:
        terminal.wait_for("m/a", "m/b", "2 fresh", "0 running, 0 waiting", "answers: none yet")
        assert len(terminal.colours()) > 1
        two_prompts.ask("m/a")
        two_prompts.ask("m/a", cache=False)
        terminal.wait_for("1 hit, 1 cold", "TTFT", "cached", "cold")
        two_prompts.write("prompts/a.md", "")
        terminal.wait_for("blocked", "empty", "1 fresh")
        two_prompts.write("prompts/a.md", "Another text.\n")
        terminal.wait_for("2 fresh", without="empty")
        good = two_prompts.manifest.read_text()
        two_prompts.write("manifest.yaml", "version: 2\n")
        terminal.wait_for("manifest rejected")
        two_prompts.write("manifest.yaml", good)
        terminal.wait_for("2 fresh", without="manifest rejected")
        terminal.type(b"xq")
        assert terminal.end() == 0
        wait_until(lambda: b"\x1b[?1049l" in terminal.raw[-40:], "the shell's screen is back")


@pytest.mark.long
def test_what_is_at_work_is_seen(workspace: Workspace) -> None:
    """A build's tokens, who runs and who waits.

    The disk against its budget, without an event for each.
    """
    workspace.memory_model(prefill_us_per_token=10_000, decode_us_per_token=150_000)
    workspace.write("prompts/a.md", "word " * 40)
    workspace.declare("{}", top="cache: {max_bytes: 2000000}")
    workspace.start()
    with at_a_terminal(workspace) as terminal, ThreadPoolExecutor(3) as pool:
        terminal.wait_for("no prompts are declared")
        workspace.declare("{a: prompts/a.md}", top="cache: {max_bytes: 2000000}")
        terminal.wait_for("build ", " tokens, ", "disk ", "of 2.0 MB", "building")
        workspace.wait_settled()
        terminal.wait_for("1 fresh", without="build ")
        asked = [pool.submit(workspace.ask, "m", max_tokens=25)]
        wait_until(lambda: workspace.status()["running"] == 1, "the long one runs")
        asked += [pool.submit(workspace.ask, "m", max_tokens=1) for _ in range(2)]
        terminal.wait_for("1 running, 2 waiting", "busy")
        for one in asked:
            one.result()
        terminal.wait_for("0 running, 0 waiting", "1 cold", "2 partial")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0


def test_without_colour(two_prompts: Workspace) -> None:
    """NO_COLOR: the same words, none of them coloured; SIGTERM puts the terminal right, too."""
    with at_a_terminal(two_prompts, NO_COLOR="1") as terminal:
        terminal.wait_for("m/a", "fresh", "2 fresh")
        assert terminal.colours() == {"default"}
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM


def test_a_dumb_terminal(two_prompts: Workspace) -> None:
    """TERM=dumb gets lines of plain text, and nothing that would move a cursor."""
    with at_a_terminal(two_prompts, TERM="dumb") as terminal:
        wait_until(lambda: b"m/b" in terminal.raw, "the first block")
        two_prompts.ask("m/a")
        wait_until(lambda: b"1 hit" in terminal.raw, "a line for the answer")
        terminal.type(b"\x03")
        assert terminal.end() == 0
        assert ESCAPE not in terminal.raw


def test_more_prompts_than_lines(workspace: Workspace) -> None:
    """What needs attention comes first, keys bring what does not fit, and all about a prompt.

    No line is lost at 80 columns.
    """
    workspace.memory_model()
    names = [
        f"a_prompt_with_a_name_that_is_too_long_for_80_columns_{number:02}" for number in range(30)
    ]
    for name in names:
        workspace.write(f"prompts/{name}.md", f"You are {name}.\n" * 3)
    workspace.write("prompts/zz.md", "")
    workspace.declare("{zz: prompts/zz.md}", model="    prompts_from: prompts/a_*.md\n")
    workspace.start()
    workspace.wait_settled()
    with at_a_terminal(workspace) as terminal:
        text = terminal.wait_for("of 31, ? for keys", "30 fresh", "m/zz:")
        lines = text.splitlines()
        assert len(lines) <= 24
        first = next(at for at, line in enumerate(lines) if line.startswith("prompt ")) + 1
        assert lines[first].startswith("m/zz ")
        shown = [line for line in lines[first + 1 :] if " fresh " in line]
        assert all(
            re.search(r"… +fresh +\d+ +[\d.]+ kB +\d+ ms +\d+ ms +-$", line) for line in shown
        ), text
        assert lines[-1] == f"prompts 1-{len(shown) + 1} of 31, ? for keys"

        def at_top(keys: bytes, top: int) -> None:
            terminal.type(keys)
            terminal.wait_for(f"prompts {top}-")

        at_top(b"j" * len(shown), 1)
        at_top(b"\x1b[B", 2)
        assert "m/zz" not in terminal.text  # and no line for its reason
        at_top(b"\x1bOA" + b"k" * len(shown), 1)
        at_top(b"\x1b[6~", len(shown) + 2)
        at_top(b"\x1b[5~", 1)
        terminal.type(b"G")
        terminal.wait_for("-31 of 31")
        terminal.type(b"\x1b[B\x1b[6~j")  # there is no further down
        at_top(b"\x1b[H", 1)
        two = terminal.wait_for("m/zz ")
        assert two.splitlines()[first:] == lines[first:]

        terminal.type(b"/07 FRESH\r")
        terminal.wait_for("1 of 31 fit /07 FRESH, ? for keys")
        terminal.type(b"\r")
        terminal.wait_for("_07: fresh", "identity ", "Esc: the list")
        terminal.type(b"\x1b")  # alone, and not the beginning of a sequence
        terminal.wait_for("1 of 31 fit", without="identity ")
        terminal.type(b"\x1b?")
        terminal.wait_for("sort by the next column")
        terminal.type(b"?s")
        terminal.wait_for("sorted by prompt", "of 31")
        terminal.type(b"\x1bq")
        assert terminal.end() == 0


def test_many_that_wait(workspace: Workspace) -> None:
    """What a state says by itself is not said again, and a reason that many have is said once."""
    workspace.memory_model(load_ms=600_000)
    for number in range(18):
        workspace.write(f"prompts/p{number:02}.md", f"You are {number}.\n")
    twelve = ", ".join(f"e{number:02}: prompts/none.md" for number in range(12))
    workspace.declare(f"{{{twelve}}}", model="    prompts_from: prompts/p*.md\n")
    workspace.start()
    with at_a_terminal(workspace) as terminal:
        text = terminal.wait_for(
            "12 prompts: ", "source missing", "of 30, ? for keys", "1 building m/p00"
        )
        assert "stopped" not in text
        terminal.type(b"G")
        text = terminal.wait_for("-30 of 30", "m/p17", "m/p05")
        assert "missing" in text
        assert not re.search(r"m/p\d\d: ", text)
        assert len([line for line in text.splitlines() if line.startswith("m/p")]) >= 13
        terminal.type(b"q")
        assert terminal.end() == 0


def test_a_small_terminal(workspace: Workspace) -> None:
    """At 40 columns by 10 lines the figures give way, name and state stay."""
    workspace.memory_model(prefill_us_per_token=500)
    for number in range(9):
        workspace.write(f"prompts/a_prompt_{number}.md", f"You are {number}.\n" * 20)
    workspace.declare("{}", model="    prompts_from: prompts/*.md\n")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/a_prompt_0")
    with at_a_terminal(workspace, size=(40, 10)) as terminal:
        text = terminal.wait_for("9 fresh", " of 9, ? for keys")
        assert len(re.findall(r"^m/a_prompt_\d +fresh", text, re.MULTILINE)) >= 3, text
        terminal.type(b"q")
        assert terminal.end() == 0


def test_a_broken_manifest_is_readable(two_prompts: Workspace) -> None:
    """Its problem is there once, over as many lines as it takes, with place and reason."""
    two_prompts.write(
        "manifest.yaml",
        two_prompts.manifest.read_text().replace("max_context_len", "max_contxt_len"),
    )
    with at_a_terminal(two_prompts) as terminal:
        text = terminal.wait_for(
            "manifest rejected", "'max_context_len'?)", "m/b"
        )  # the frame to its end
        assert "did you mean 'max_context_len'?" in " ".join(text.split())
        assert text.count("rejected") == 1
        assert f"{two_prompts.manifest}:" in text.replace("\n", "")
        assert "unknown key 'max_contxt_len'" in " ".join(text.split())
        assert "m/b" in text
        terminal.type(b"q")
        assert terminal.end() == 0


def test_many_answers(two_prompts: Workspace) -> None:
    """The line of times is as long as there is room for; medians are whole.

    What is left on the disk is said.
    """
    with at_a_terminal(two_prompts) as terminal:
        for _ in range(20):
            two_prompts.ask("m/a", max_tokens=1)
            two_prompts.ask("m/a", max_tokens=1, cache=False)
        text = terminal.wait_for(
            "20 hit, 20 cold", "TTFT", " free", "since"
        )  # a frame may come in two parts
        times = next(line for line in text.splitlines() if line.startswith("TTFT"))
        assert re.fullmatch(
            r"TTFT    [▁-█]{15,40} last [\d,]+ ms; medians: cached [\d,]+ ms, cold [\d,]+ ms", times
        ), times
        assert len(times) == 80
        assert re.search(r"^disk    [\d.]+ kB, disk has [\d.]+ [MG]B free$", text, re.MULTILINE)
        assert re.search(r"since \d\d:\d\d$", text.splitlines()[0])
        terminal.type(b"q")
        assert terminal.end() == 0


HOSTILE = "\x1b[31mred\x1b[2J \u202e\x9b5m"


@pytest.mark.long
def test_nobody_commands_the_terminal(workspace: Workspace) -> None:
    """What a manifest or a file name says is shown with escapes.

    In tables, lines, JSON lines and on the screen.
    """
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    name = workspace.write("b\x1b[2J\u202e.md", "").name
    a = f"a: {{files: a.md, params: {{temperature: 0.2}}, description: {json.dumps(HOSTILE)}}}"
    workspace.declare(f"{{{a}, b: {json.dumps(name)}}}")
    workspace.start()
    workspace.wait_settled()
    for letter in "\x1b\u202e\x9b":
        assert letter not in workspace.cli("status").stdout + workspace.cli("plan").stdout
    with (
        piped(workspace, []) as pipe,
        piped(workspace, ["--json"]) as documents,
        at_a_terminal(workspace, size=(200, 24)) as terminal,
    ):
        seen = pipe.heard(r"b\x1b[2J\u202e.md: the prompt is empty")
        terminal.wait_for(r"\u202e")
        workspace.write(name, "You are prompt B.\n")
        pipe.heard("m/b fresh", seen)
        workspace.write(name, "")
        pipe.heard(r"m/b blocked: ", seen)
        documents.heard('"b"')
        written = "".join([*pipe.said, *documents.said])
        assert json.loads(documents.said[0])["prompts"][0]["description"] == HOSTILE
        terminal.type(b"q")
        assert terminal.end() == 0
        assert not re.search(rb"\x1b\[31mred|\xe2\x80\xae|\xc2\x9b", terminal.raw)
    assert not set("\x1b\u202e\x9b") & set(written)


def test_a_daemon_that_comes_back(two_prompts: Workspace) -> None:
    """While the daemon is gone this is said, with the last state below.

    A new one is shown as soon as it answers.
    """
    with at_a_terminal(two_prompts) as terminal:
        first = two_prompts.status()["pid"]
        terminal.wait_for(f"pid {first}", "m/a")
        assert two_prompts.stop() == 0
        terminal.wait_for("daemon gone, waiting; the figures are of 20", "m/a", "fresh")
        two_prompts.start()
        second = two_prompts.status()["pid"]
        terminal.wait_for(f"pid {second}", "m/a", without="daemon gone")
        two_prompts.write("prompts/a.md", "")
        terminal.wait_for("blocked", "m/a:")
        terminal.type(b"q")
        assert terminal.end() == 0


class Pipe:
    """`status --watch` without a terminal; what it said so far, by lines."""

    def __init__(self, space: Workspace, arguments: list[str]) -> None:
        self.process = space.popen(
            "status", "--watch", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.said: list[str] = []
        self._stdout = self.process.stdout
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self.said.extend(line.decode() for line in iter(self._stdout.readline, b""))

    def heard(self, word: str, after: int = 0) -> int:
        """The number of the first line with this word, from line `after` on; it is waited for."""
        wait_until(
            lambda: any(word in line for line in self.said[after:]),
            lambda: f"{word} in {self.said}",
        )
        return next(at for at, line in enumerate(self.said) if at >= after and word in line)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(DEADLINE_S) == 0
        self._reader.join(DEADLINE_S)
        assert self.process.stderr is not None
        assert self.process.stderr.read() == b""

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(DEADLINE_S)
        self._stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def piped(space: Workspace, arguments: list[str]) -> Iterator[Pipe]:
    pipe = Pipe(space, arguments)
    try:
        yield pipe
    finally:
        pipe.close()


@pytest.mark.parametrize("want_json", [False, True])
def test_without_a_terminal(two_prompts: Workspace, *, want_json: bool) -> None:
    """A pipe gets plain text, the whole once, then what changed (--json: a document each).

    It hears of a restart.
    """
    with piped(two_prompts, ["--json"] if want_json else []) as pipe:
        seen = pipe.heard("m/b" if not want_json else '"ready": true')
        two_prompts.ask("m/a")
        seen = pipe.heard("1 hit" if not want_json else '"hit": 1', seen)
        two_prompts.stop()
        seen = pipe.heard("daemon gone, waiting" if not want_json else '"gone": true', seen)
        two_prompts.start()
        pid = two_prompts.status()["pid"]
        pipe.heard(f"pid {pid}" if not want_json else f'"pid": {pid}', seen)
        pipe.end()
    if want_json:
        documents: list[Any] = [json.loads(line) for line in pipe.said]
        assert sum("gone" in document for document in documents) == 1
        for document in documents:
            json_documents.check_document("status", document)
    else:
        assert "\x1b" not in "".join(pipe.said)
        assert sum("m/b" in line for line in pipe.said[:seen]) == 1
        assert all(one != two for one, two in itertools.pairwise(pipe.said))


@pytest.mark.parametrize("want_json", [False, True])
def test_a_pipe_whose_reader_has_enough(two_prompts: Workspace, *, want_json: bool) -> None:
    """`| head -n 1` ends it at once, though nothing changes that would be a next line."""
    command = ("status", "--watch", *(["--json"] if want_json else []))
    with two_prompts.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as all_:
        try:
            while not re.search(rb'"ready":true|m/b', all_.stdout.read1().replace(b" ", b"")):
                pass
            all_.stdout.close()
            assert all_.wait(DEADLINE_S) == 141
            assert all_.stderr.read() == b""
        finally:
            all_.kill()


def test_without_standard_output(two_prompts: Workspace) -> None:
    """Nobody sees anything; that is no error of ours."""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *two_prompts.command("status", "--watch")]
    with subprocess.Popen(command, env=two_prompts.environment, stderr=subprocess.PIPE) as deaf:
        try:
            connected = psutil.Process(deaf.pid).net_connections
            wait_until(
                lambda: deaf.poll() is not None or len(connected("unix")) == 2,
                "it hears the daemon",
            )
            deaf.send_signal(signal.SIGINT)
            assert deaf.wait(DEADLINE_S) == 0
            assert deaf.stderr is not None
            assert deaf.stderr.read() == b""
        finally:
            deaf.kill()


def test_only_what_changed(workspace: Workspace) -> None:
    """A pipe gets a line, with the time, for each prompt that an edit touched.

    None for the others.
    """
    workspace.memory_model()
    for number in range(30):
        workspace.write(f"prompts/p{number:02}.md", f"You are {number}.\n")
    workspace.declare("{}", model="    prompts_from: prompts/*.md\n")
    workspace.start()
    workspace.wait_settled()
    with piped(workspace, []) as pipe:
        start = pipe.heard("m/p29") + 1
        workspace.write("prompts/p07.md", "")
        seen = pipe.heard("m/p07 blocked: ", start)
        pipe.heard(" 29 fresh, 1 blocked", seen)
        workspace.write("prompts/p07.md", "Another text.\n")
        seen = pipe.heard("m/p07 fresh, ", seen)
        pipe.heard(" 30 fresh, 0 blocked", seen)
        (workspace.root / "prompts/p08.md").unlink()
        pipe.heard("m/p08: no longer there", seen)
        good = workspace.manifest.read_text()
        workspace.write("manifest.yaml", "version: 2\n")
        seen = pipe.heard("manifest rejected, the last good one is in force: ", seen)
        workspace.write("manifest.yaml", good)
        pipe.heard("manifest: in force", seen)
        pipe.end()
    told = pipe.said[start:]
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in told if line.strip()
    )
    assert {name for line in told for name in re.findall(r"m/p\d\d", line)} == {"m/p07", "m/p08"}
    assert len(told) < 40


def test_nothing_to_watch(workspace: Workspace) -> None:
    """Without a daemon at first it is the error of `rkcached status`.

    Most likely the socket's name is wrong.
    """
    assert "no daemon answers" in workspace.cli("status", "--watch", code=os.EX_UNAVAILABLE).stderr
