"""Makes log events of the lines that a worker's library prints, and finds reasons in them."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable

from rkcached.errors import EngineError, ModelLoadError, Uncacheable
from rkcached.host.logs import log

_KEPT_LINES = 20

# llama.cpp's time since its start, which would make every message another one.
_STAMP = re.compile(r"^\d+(\.\d+){3} ")

# The first letters of lines from RKLLM, its kernel driver's library and llama.cpp:
# 'W rkllm: ...', 'E RKNN: ...'.
_MARKED = re.compile(r"[IWED] ")

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
        """Drop the lines of the operation before."""
        self._recent.clear()

    async def catch_up(self) -> None:
        """Read the lines that were printed before an answer, and may still be in the pipe."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def end(self, timeout_s: float) -> None:
        """Read to the end of the pipes, for at most `timeout_s`.

        The library may have left a child of its own that keeps them open.
        """
        if self._readers:
            _, open_pipes = await asyncio.wait(self._readers, timeout=timeout_s)
            for task in open_pipes:
                task.cancel()
            self._readers = ()

    def explain(self, error: EngineError) -> EngineError:
        """The error with its reason, which a library prints and does not return.

        That goes for a failed load or run, and for a save that saved nothing.
        """
        match error:
            case ModelLoadError():
                reason = self._first(lambda line: line[:2] == "E " or "error" in line.lower())
            case Uncacheable():
                reason = self._first(lambda line: line[:2] in ("W ", "E "))
            case _ if type(error) is EngineError:
                reason = self._first(lambda line: line[:2] == "E ")
            case _:
                return error

        if not reason:
            return error
        return type(error)(f"{error.message}: {reason}", hint=error.hint)

    def _first(self, matches: Callable[[str], bool]) -> str:
        return next(filter(matches, self._recent), "").strip()

    async def _read(self, pipe: asyncio.StreamReader) -> None:
        """Log each line. A line that is too long for the stream is dropped."""
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
