"""Runs an engine without the daemon: the worker's class and settings, in a child of our own.

The child takes the times itself, so the pipe costs nothing. It idles while it is not asked, so the
daemon's worker and this engine take turns on the cores. It leaves when its pipe ends, however its
parent did.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Self

import msgspec

from rkcached.engines.base import Engine, ModelSpec, RunStats, Sampling, Token
from rkcached.errors import EngineError, RkcachedError, WorkerDied, WorkerTimeout
from rkcached.host import isolated
from rkcached.plan.desired import DesiredModel
from rkcached.plan.worker_model import worker_model
from rkcached.sources.manifest import EngineConfig
from rkcached.worker.scratch import Scratch

SILENCE_S = 600.0
"""Loading a model and a long prefill both take less."""

LEAVE_S = 5.0
"""A process whose pipe has ended is gone by then, or is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as the worker gets it."""

    load: Path | None
    """The prompt cache to load first; None relies on the prefix that is still in memory."""
    prompt: str
    """The whole rendered request."""
    sampling: Sampling
    cold: bool = False
    """Forget the KV state first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    ttft_ms: float
    load_ms: float
    stats: RunStats


class DirectEngine:
    """The engine that a worker of `model` would host, from `with` to its end.

    Errors: EngineError where the model cannot be loaded, as where the daemon's worker has the NPU
    for itself.
    """

    def __init__(self, engine: EngineConfig, model: DesiredModel) -> None:
        hosted = worker_model(engine, model)
        try:
            self._scratch = Scratch()
        except OSError as error:
            raise EngineError(f"the engine's process cannot be started: {error}") from error

        spec = msgspec.structs.replace(hosted.spec, scratch_dir=self._scratch.path)
        self._pipe, theirs = Pipe()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    isolated.command("rkcached.cli.bench.direct", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(), self._scratch.lock),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=isolated.environment(),
                    cwd=self._scratch.path,
                )
            except OSError as error:
                self._pipe.close()
                self._scratch.remove()
                raise EngineError(f"the engine's process cannot be started: {error}") from error

        self._hosted = (hosted.implementation, spec)

    def __enter__(self) -> Self:
        try:
            self._send(self._hosted)
            self._receive()
        except BaseException:  # Ctrl-C, too: passed on, but first its process is taken down
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pipe.close()  # it leaves when its pipe ends
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.remove()

    def ask(self, ask: Ask) -> Timed:
        """Run it. Errors: EngineError; WorkerDied, WorkerTimeout."""
        self._send(ask)
        answer = self._receive()
        if answer is None:
            raise TypeError(answer)
        return answer

    def _send(self, message: Ask | tuple[str, ModelSpec]) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> Timed | None:
        """The next answer; None when the engine is ready."""
        try:
            if not self._pipe.poll(SILENCE_S):
                raise WorkerTimeout(f"the engine said nothing for {SILENCE_S:.0f} s")
            answer: Timed | str | None = self._pipe.recv()
        except (OSError, EOFError) as error:
            raise self._died() from error

        if isinstance(answer, str):
            raise EngineError(answer)
        return answer

    def _died(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_S)
        return WorkerDied(f"the engine's process ended with code {self._process.returncode}")


def main() -> None:
    """The child: answer what comes over the pipe that the argument names, until it ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, whose end of the pipe then closes
    pipe: Connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):
        implementation, spec = pipe.recv()
        try:
            module, _, name = implementation.partition(":")
            engine: Engine = getattr(importlib.import_module(module), name)(spec)
        except (RkcachedError, ImportError) as error:
            pipe.send(str(error))
            return

        pipe.send(None)
        while True:
            ask = pipe.recv()
            try:
                pipe.send(_run(engine, ask))
            except RkcachedError as error:
                pipe.send(error.message)

    engine.close()


def _run(engine: Engine, ask: Ask) -> Timed:
    first = 0.0

    def on_token(token: Token) -> bool:
        nonlocal first
        first = first or (time.perf_counter() if token.text else 0.0)
        return False

    if ask.cold:
        engine.clear()

    started = time.perf_counter()
    if ask.load is not None:
        engine.load(ask.load)

    loaded = time.perf_counter()
    stats = engine.generate(ask.prompt, ask.sampling, on_token)
    return Timed(ttft_ms=(first - started) * 1000, load_ms=(loaded - started) * 1000, stats=stats)
