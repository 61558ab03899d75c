"""A terminal with a command of the program on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import threading
from typing import Any

import pyte
from conftest import Workspace, need

from tests.waiting import DEADLINE_S, wait_until

ROWS, COLUMNS = 24, 80


class Terminal:
    """A terminal of 80 columns. The command's standard output is shown only if that is wished."""

    def __init__(
        self, space: Workspace, *arguments: str, shows_output: bool = False, **variables: str
    ) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self.seen: set[str] = set()
        """Every first line that was there."""
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        outer = {
            key: value
            for key, value in space.environment.items()
            if key not in ("COLUMNS", "NO_COLOR", "TERM")
        }
        options: dict[str, Any] = {"stdout": slave if shows_output else subprocess.PIPE}
        self.process = subprocess.Popen(
            [need("setsid"), "--ctty", *space.command(*arguments)],
            env={**outer, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **variables},
            stdin=slave,
            stderr=slave,
            text=True,
            cwd=space.root,
            **options,
        )
        os.close(slave)
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # its last user is gone
            while not self._closed.is_set():
                if select.select([self._master], [], [], 0.05)[0]:
                    data = os.read(self._master, 65536)
                    self._answer(data)
                    self._stream.feed(data)
                    self.seen.add(self.screen.display[0].rstrip())
        os.close(self._master)

    def _answer(self, data: bytes) -> None:
        """Tell where the cursor is, as terminals do when a program asks (CPR)."""
        if b"\x1b[6n" in data:
            cursor = self.screen.cursor
            os.write(self._master, f"\x1b[{cursor.y + 1};{cursor.x + 1}R".encode())

    def wait_for(self, *words: str) -> None:
        """Wait until a first line had all of these words."""

        def there() -> bool:
            return any(all(word in line for word in words) for line in tuple(self.seen))

        wait_until(there, lambda: f"{words} on the screen:\n" + "\n".join(sorted(self.seen)))

    def wait_shown(self, *words: str) -> None:
        """Wait until the screen has all of these words."""

        def there() -> bool:
            text = self.text()
            return all(word in text for word in words)

        wait_until(there, lambda: f"{words} on the screen:\n{self.text()}")

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in tuple(self.screen.display)).rstrip()

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def end(self) -> str:
        """What it wrote elsewhere."""
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return out

    def hang_up(self) -> None:
        """What happens when its window is closed.

        Its session gets SIGHUP, and nothing can be written any more.
        """
        self._closed.set()
        self._reader.join(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.hang_up()
