"""A headless Chromium, driven over its DevTools protocol.

The way from a TCP port to a Unix socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import connect

from tests.waiting import DEADLINE_S, wait_until

PROXY = Path("/lib/systemd/systemd-socket-proxyd")


def missing(what: str) -> None:
    pytest.skip(f"needs {what}")


class Port:
    """systemd-socket-proxyd between a free port on the loopback and `target`.

    It is started as systemd starts it.
    """

    def __init__(self, target: Path) -> None:
        if not PROXY.exists():
            missing(f"{PROXY}: apt-get install systemd")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            start = 'exec 3<&"$1"; LISTEN_FDS=1 LISTEN_PID=$$ exec "$2" "$3"'
            fd = listener.fileno()
            self._process = subprocess.Popen(
                ["bash", "-c", start, "-", str(fd), str(PROXY), str(target)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE_S)


class Browser:
    """One page. What it asks for and complains of is kept."""

    def __init__(self, profile: Path, *options_of_its_own: str) -> None:
        program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
        if program is None:
            missing("Chromium: apt-get install --no-install-recommends chromium-headless-shell")
        self._port_file = profile / "DevToolsActivePort"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            [str(program), *options, *options_of_its_own, "about:blank"],
            env={**os.environ, "HOME": str(profile)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._left = contextlib.ExitStack()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._number = 0

    def __enter__(self) -> Self:
        try:
            lines = wait_until(self._where, "the browser listens")
            address = f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            self._connection = self._left.enter_context(connect(address, max_size=None, proxy=None))
            self._session = ""
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """With its helpers.

        What Debian starts is a script, and a signal to it alone leaves the browser running.
        """
        self._left.close()
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(DEADLINE_S)
        wait_until(self._has_gone, "the browser has ended")

    def _has_gone(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def _where(self) -> list[str]:
        lines = self._port_file.read_text().splitlines() if self._port_file.exists() else []
        return lines if len(lines) == 2 else []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._connection.send(
            json.dumps(message | ({"sessionId": self._session} if self._session else {}))
        )
        while True:
            said = json.loads(self._connection.recv(timeout=DEADLINE_S))
            if said.get("id") == self._number:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result
            self._take(said)

    def _take(self, said: dict[str, Any]) -> None:
        match said.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(said["params"]))
            case _:
                pass

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.run("document.readyState") == "complete", "the page is loaded")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what becomes of it."""
        said = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def text(self, selector: str = "body") -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def wait_for(self, script: str) -> None:
        wait_until(lambda: self.run(script), f"{script} in\n{self.text()}")
