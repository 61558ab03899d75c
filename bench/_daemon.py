"""The real daemon on a workspace, and a client that adds as little as it can to what it measures.

The daemon runs in a session of its own, so that Ctrl-C reaches it through us, once. Its log goes to
a file of the workspace, whose end is shown when something goes wrong.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STOP_S = 8.0
_MENDING = ("fresh", "missing", "stale", "building", "corrupt")
"""States that a prompt may have while the daemon is still at work on it."""


class BenchError(Exception):
    """The measurement is not what it claims to be, so there is no figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A folder with a manifest; store, socket and log live in it too."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.yaml"

    @property
    def store(self) -> Path:
        return self.root / "cache"

    @property
    def socket(self) -> Path:
        return self.root / "s"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A streamed answer.

    `ttft_ms` runs from before the request to the first event with content, here at the client.
    """

    ttft_ms: float
    prompt_tokens: int
    report: dict[str, Any]
    """The daemon's own figures."""

    @property
    def inside_ms(self) -> float:
        """The same by the daemon's clock: from the request's arrival to the first token written."""
        return float(self.report["ttft_ms"])

    @property
    def work_ms(self) -> float:
        """Of either, loading the file and the prefill, as the worker measured them."""
        return float(self.report["load_ms"]) + float(self.report["prefill_ms"])


class Daemon:
    """`rkcached run` on a workspace, from `with` to its end."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        command = [sys.executable, "-m", "rkcached", "run", "--manifest", str(workspace.manifest)]
        command += ["--cache-dir", str(workspace.store), "--socket", str(workspace.socket)]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RKCACHED_")
        }
        self.started = time.perf_counter()
        self._asking = Client(self)
        with workspace.log.open("ab") as log:
            self.log_start = log.tell()
            """Where this daemon's lines begin."""
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._asking.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def hang_up(self) -> None:
        """SIGHUP: look again at once."""
        self._process.send_signal(signal.SIGHUP)

    def wait_fresh(self, *, every_s: float = 0.1, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait until every prompt is fresh and nothing is left to build; returns the status."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                status = self.status()
            except (ConnectionRefusedError, FileNotFoundError):
                time.sleep(0.02)  # the socket is not there yet
                continue
            states = {prompt["state"] for prompt in status["prompts"]}
            if status["ready"] and states == {"fresh"}:
                return status
            if not states <= set(_MENDING):
                raise BenchError(
                    f"not every prompt can be cached: {status['summary']}{self.last_words()}"
                )
            time.sleep(every_s)
        raise BenchError(f"not all fresh after {timeout_s:.0f} s{self.last_words()}")

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            raise BenchError(
                f"the daemon ended with code {self._process.returncode}{self.last_words()}"
            )

    def status(self) -> dict[str, Any]:
        connection = UnixConnection(self.workspace.socket)
        try:
            connection.request("GET", "/v1/status")
            document: dict[str, Any] = json.loads(connection.getresponse().read())
            return document
        finally:
            connection.close()

    def client(self) -> Client:
        """One more client, with a connection of its own."""
        return Client(self)

    def ask(self, model: str, question: str, *, max_tokens: int, cold: bool = False) -> Answer:
        """Stream one answer. Errors: BenchError unless it is a whole, good one."""
        return self._asking.ask(model, question, max_tokens=max_tokens, cold=cold)

    def last_words(self) -> str:
        lines = self.workspace.log.read_text(errors="replace").splitlines()[-15:]
        return "\n  " + "\n  ".join(lines)


class Client:
    """One connection to the daemon, kept as client libraries keep theirs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.connection = UnixConnection(daemon.workspace.socket)

    def close(self) -> None:
        self.connection.close()

    def ask(self, model: str, question: str, *, max_tokens: int, cold: bool = False) -> Answer:
        """Stream one answer. Errors: BenchError unless it is a whole, good one."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if cold:
            body["cache"] = False
        data = json.dumps(body).encode()
        first, prompt_tokens = 0.0, 0
        report: dict[str, Any] = {}
        connection = self.connection.ready()
        started = time.perf_counter()
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json"}
        )
        with connection.getresponse() as response:
            if response.status != http.HTTPStatus.OK:
                raise BenchError(
                    f"HTTP {response.status}: {response.read()[:300]!r}{self._daemon.last_words()}"
                )
            for line in iter(response.readline, b""):
                if not first and b'"content"' in line:
                    first = time.perf_counter()
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    report = chunk.get("rkcached", report)
                    prompt_tokens = (chunk.get("usage") or {}).get("prompt_tokens", prompt_tokens)
        if not (first and prompt_tokens and report):
            raise BenchError(
                f"an answer without content, usage or report{self._daemon.last_words()}"
            )
        return Answer(ttft_ms=(first - started) * 1000, prompt_tokens=prompt_tokens, report=report)

    def drain(self, model: str, question: str, *, max_tokens: int) -> None:
        """Stream an answer and drop it. Errors: BenchError unless it has all of its tokens."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
        }
        connection = self.connection.ready()
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}))
        with connection.getresponse() as response:
            if b'"finish_reason": "length"' not in response.read().replace(b'":"', b'": "'):
                raise BenchError(f"the answer ended early{self._daemon.last_words()}")


class UnixConnection(http.client.HTTPConnection):
    """A connection to the daemon's socket, kept between requests as client libraries do."""

    def __init__(self, path: Path) -> None:
        super().__init__("rkcached", timeout=120)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def ready(self) -> Self:
        """Connected: a connection that was idle for some seconds was closed by the daemon."""
        if self.sock is not None and select.select([self.sock], [], [], 0)[0]:
            self.close()
        if self.sock is None:
            self.connect()
        return self


def busy_ns(pid: int) -> int:
    """Nanoseconds that all threads of a process were on a CPU (first field of schedstat, proc(5))."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_bytes().split()[0])
    return total
