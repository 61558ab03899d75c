"""What a worker's library prints: log events of the right level, and the reasons that it tells nowhere else."""

from __future__ import annotations

import asyncio
import re
from collections import deque

import structlog

from rkcached.errors import EngineError, ModelLoadError, Uncacheable

log = structlog.get_logger()

_KEPT_LINES = 20

_STAMP = re.compile(r"^\d+(\.\d+){3} ")
"""llama.cpp's time since its start, which would make every message another one."""

_MARKED = re.compile(r"[IWED] ")
"""How lines of RKLLM, its kernel driver's library and llama.cpp begin: 'W rkllm: ...', 'E RKNN:
...'."""

_LEVELS = {"E": "error", "W": "warning", "I": "info", "D": "debug"}


class LibraryLines:
    """Reads the pipes of one worker process after another, and keeps the last lines.

    On the event loop.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._recent: deque[str] = deque(maxlen=_KEPT_LINES)
        self._readers: tuple[asyncio.Task[None], ...] = ()

    @property
    def recent(self) -> tuple[str, ...]:
        return tuple(self._recent)

    @property
    def last(self) -> str:
        return self._recent[-1] if self._recent else ""

    def follow(self, process: asyncio.subprocess.Process) -> None:
        pipes = [pipe for pipe in (process.stdout, process.stderr) if pipe is not None]
        self._readers = tuple(asyncio.create_task(self._read(pipe)) for pipe in pipes)

    def forget(self) -> None:
        """Last words belong to the operation in which they were said."""
        self._recent.clear()

    async def catch_up(self) -> None:
        """Let lines be read that were printed before an answer: they are in the pipe, but its turn may come later."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def end(self, timeout_s: float) -> None:
        """Read to the end of the pipes, unless the library left a child of its own that keeps them open."""
        if self._readers:
            _, open_pipes = await asyncio.wait(self._readers, timeout=timeout_s)
            for task in open_pipes:
                task.cancel()
            self._readers = ()

    def explain(self, error: EngineError) -> EngineError:
        """A library tells the reason of a failed load or run, or of a save that saved nothing, in its log only."""
        match error:
            case ModelLoadError():
                reasons = [
                    line
                    for line in self._recent
                    if line.startswith("E ") or "error" in line.lower()
                ]
            case Uncacheable():
                reasons = [line for line in self._recent if line.startswith(("W ", "E "))]
            case _ if type(error) is EngineError:
                reasons = [line for line in self._recent if line.startswith("E ")]
            case _:
                return error
        return (
            type(error)(f"{error.message}: {reasons[0].strip()}", hint=error.hint)
            if reasons
            else error
        )

    async def _read(self, pipe: asyncio.StreamReader) -> None:
        """A line of any length is taken in pieces, never refused."""
        while True:
            try:
                raw = await pipe.readline()
            except ValueError:  # longer than the stream's limit: the reader has dropped it
                continue
            if not raw:
                return
            line = _STAMP.sub("", raw.decode(errors="replace").strip())
            if line:
                self._recent.append(line)
                level = _LEVELS[line[0]] if _MARKED.match(line) else "debug"
                getattr(log, level)("worker says", model=self._model, line=line)
