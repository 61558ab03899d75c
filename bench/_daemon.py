"""The daemon as benchmarks start it: it logs to a file, and its prompts must all become fresh."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Self

from rkcached.cli.bench.asking import Answer, ask
from rkcached.cli.launcher import TO_BUILD, Workspace
from rkcached.cli.launcher import Daemon as Launched
from rkcached.host import isolated


class BenchError(Exception):
    """The measurement is not what it claims to be, so there is no figure."""


class Daemon(Launched):
    """`rkcached run` on a workspace, from `with` to its end."""

    def __init__(self, workspace: Workspace) -> None:
        self.log_start = workspace.log.stat().st_size if workspace.log.exists() else 0
        """This daemon's lines begin here."""
        environment = {
            name: value
            for name, value in isolated.environment().items()
            if not name.startswith("RKCACHED_")
        }
        super().__init__(workspace, log=workspace.log, environment=environment)
        self._asking = self.client()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._asking.close()
        super().__exit__()

    def hang_up(self) -> None:
        """SIGHUP: the daemon looks again at once."""
        os.kill(self.pid, signal.SIGHUP)

    def wait_fresh(self, *, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait until every prompt is fresh; returns the status. Errors: BenchError."""
        for status in self.statuses(timeout_s=timeout_s):
            states = {prompt["state"] for prompt in status["prompts"]}
            if status["ready"] and states == {"fresh"}:
                return status
            if states - TO_BUILD - {"fresh"}:
                raise BenchError(
                    f"not every prompt can be cached: {status['summary']}{self.last_words()}"
                )
        raise BenchError("the daemon gave no status")

    def wait_preloaded(self, *, timeout_s: float = 300.0) -> None:
        """Wait until a prompt that the manifest preloads is in memory. Errors: BenchError."""
        deadline = time.perf_counter() + timeout_s
        while b" prompt preloaded " not in self.workspace.log.read_bytes()[self.log_start :]:
            self.check_alive()
            if time.perf_counter() > deadline:
                raise BenchError(f"nothing preloaded after {timeout_s:.0f} s{self.last_words()}")
            time.sleep(0.05)

    def wait_built(self, prompts: int, *, timeout_s: float) -> None:
        """Wait until so many caches are committed, by the store alone. Errors: BenchError."""
        while sum(1 for _ in self.workspace.store.glob("*/prompt*.json")) < prompts:
            self.check_alive()
            if time.perf_counter() - self.started > timeout_s:
                raise BenchError(f"not all built after {timeout_s:.0f} s{self.last_words()}")
            time.sleep(0.2)

    def ask(self, body: dict[str, Any], *, may_call: bool = False) -> Answer:
        """Stream an answer over a connection that is kept.

        `may_call`: it may be a call, without text. Errors: BenchError unless it is whole.
        """
        answer = ask(self._asking, body)
        if not ((answer.text_moments or may_call) and answer.report):
            raise BenchError(f"an answer without text or report{self.last_words()}")
        return answer


def busy_ns(pid: int) -> int:
    """Nanoseconds that all threads of a process were on a CPU (field 1 of schedstat, proc(5))."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_bytes().split()[0])
    return total
