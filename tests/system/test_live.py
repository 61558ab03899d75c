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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyte
import pytest
from conftest import Workspace, need

from tests.waiting import wait_until

ESCAPE = b"\x1b"


class Terminal:
    """A terminal of 80 columns by 24 lines with `status --watch` on it. `text` is what one sees."""

    def __init__(self, space: Workspace, *arguments: str, **environment: str) -> None:
        self.raw = b""
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.modes = termios.tcgetattr(slave)
        outer = {key: value for key, value in space.environment.items() if key not in ("COLUMNS", "NO_COLOR", "TERM")}
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
        def there() -> str:
            text = self.text
            return text if all(word in text for word in words) and not (without and without in text) else ""

        try:
            found: str = wait_until(there, f"{words} on the screen", 30)
        except pytest.fail.Exception:
            pytest.fail(f"{words} not without {without!r} in\n{self.text}")
        return found

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Its exit code; the terminal must be as it was."""
        code = self.process.wait(10)
        assert termios.tcgetattr(self._slave) == self.modes
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._slave)
        self._reader.join(10)
        os.close(self.master)


@contextlib.contextmanager
def at_a_terminal(space: Workspace, *arguments: str, **environment: str) -> Iterator[Terminal]:
    terminal = Terminal(space, *arguments, **environment)
    try:
        yield terminal
    finally:
        terminal.close()


def test_every_change_is_seen(two_prompts: Workspace) -> None:
    """An answer, an edit, a broken manifest and its repair are on the screen without a key; q ends it."""
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
        wait_until(lambda: b"\x1b[?1049l" in terminal.raw[-40:], "the shell's screen is back", 10)


def test_what_is_at_work_is_seen(workspace: Workspace) -> None:
    """A build's tokens, who runs and who waits, and the disk against its budget, without an event for each."""
    workspace.memory_model(prefill_us_per_token=4_000, decode_us_per_token=20_000)
    workspace.write("prompts/a.md", "word " * 40)
    workspace.declare("{a: prompts/a.md}", top="cache: {max_bytes: 2000000}")
    workspace.start()
    with at_a_terminal(workspace) as terminal, ThreadPoolExecutor(3) as pool:
        terminal.wait_for("build ", " tokens, ", "disk ", "of 2.0 MB", "building")
        workspace.wait_settled()
        terminal.wait_for("1 fresh", without="build ")
        asked = [pool.submit(workspace.ask, "m", max_tokens=25) for _ in range(3)]
        terminal.wait_for("1 running, 2 waiting", "busy")
        for one in asked:
            one.result()
        terminal.wait_for("0 running, 0 waiting", "3 cold")
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
    """TERM=dumb gets blocks of plain text, and nothing that would move a cursor."""
    with at_a_terminal(two_prompts, TERM="dumb") as terminal:
        wait_until(lambda: b"m/b" in terminal.raw, "the first block", 30)
        two_prompts.ask("m/a")
        wait_until(lambda: b"1 hit" in terminal.raw, "a block for the answer", 30)
        terminal.type(b"\x03")
        assert terminal.end() == 0
        assert ESCAPE not in terminal.raw


def test_more_prompts_than_lines(workspace: Workspace) -> None:
    """What needs attention comes first, what does not fit is counted, and no line is lost at 80 columns."""
    workspace.memory_model()
    names = [f"a_prompt_with_a_name_that_is_too_long_for_80_columns_{number:02}" for number in range(30)]
    for name in names:
        workspace.write(f"prompts/{name}.md", f"You are {name}.\n" * 3)
    workspace.write("prompts/zz.md", "")
    workspace.declare("{zz: prompts/zz.md}", model="    prompts_from: prompts/a_*.md\n")
    workspace.start()
    workspace.wait_settled()
    with at_a_terminal(workspace) as terminal:
        text = terminal.wait_for("more, all fresh", "30 fresh", "m/zz:")
        lines = text.splitlines()
        assert len(lines) <= 24
        first = next(at for at, line in enumerate(lines) if line.startswith("prompt ")) + 1
        assert lines[first].startswith("m/zz ")
        shown = [line for line in lines[first + 1 :] if " fresh " in line]
        assert all(re.search(r"… +fresh +\d+ +[\d.]+ kB +\d+ ms +\d+ ms +-$", line) for line in shown), text
        left = int(lines[-1].split()[0])
        assert len(shown) + left == 30


def test_a_daemon_that_comes_back(two_prompts: Workspace) -> None:
    """While the daemon is gone this is said, with the last state below; a new one is shown as soon as it answers."""
    with at_a_terminal(two_prompts) as terminal:
        first = two_prompts.status()["pid"]
        terminal.wait_for(f"pid {first}", "m/a")
        assert two_prompts.stop() == 0
        terminal.wait_for("daemon gone, waiting", "m/a", "fresh")
        two_prompts.start()
        second = two_prompts.status()["pid"]
        terminal.wait_for(f"pid {second}", "m/a", without="daemon gone")
        two_prompts.write("prompts/a.md", "")
        terminal.wait_for("blocked", "m/a:")
        terminal.type(b"q")
        assert terminal.end() == 0


@pytest.mark.parametrize("want_json", [False, True])
def test_without_a_terminal(two_prompts: Workspace, *, want_json: bool) -> None:
    """A pipe gets a block of plain text (--json: a line) for each change, and hears of a restart."""
    arguments = ["status", "--watch", *(["--json"] if want_json else [])]
    process = subprocess.Popen(
        two_prompts.command(*arguments),
        env=two_prompts.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    said: list[str] = []
    stdout = process.stdout
    reader = threading.Thread(target=lambda: said.extend(line.decode() for line in iter(stdout.readline, b"")))
    reader.start()

    def heard(word: str, after: int = 0) -> int:
        wait_until(lambda: any(word in line for line in said[after:]), f"{word} in {said}", 30)
        return next(at for at, line in enumerate(said) if at >= after and word in line)

    try:
        seen = heard("m/b" if not want_json else '"ready": true')
        two_prompts.ask("m/a")
        seen = heard("1 hit" if not want_json else '"hit": 1', seen)
        two_prompts.stop()
        seen = heard("daemon gone, waiting" if not want_json else '"gone": true', seen)
        two_prompts.start()
        heard(f"pid {two_prompts.status()['pid']}" if not want_json else f'"pid": {two_prompts.status()["pid"]}', seen)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        reader.join(10)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(10)
        stdout.close()
        assert process.stderr is not None
        process.stderr.close()
    if want_json:
        documents: list[Any] = [json.loads(line) for line in said]
        assert sum("gone" in document for document in documents) == 1
    else:
        text = "".join(said)
        assert "\x1b" not in text
        bodies = ["\n".join(b.splitlines()[2:]) for b in text.split("\n\n") if b]
        assert all(one != two for one, two in itertools.pairwise(bodies))


def test_nothing_to_watch(workspace: Workspace) -> None:
    """Without a daemon at first it is the error of `rkcached status`: most likely the socket's name is wrong."""
    assert "no daemon answers" in workspace.cli("status", "--watch", code=os.EX_UNAVAILABLE).stderr
