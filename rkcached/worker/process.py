"""The process of a worker: its socket, its scratch folder, and the lines that it prints.

It is started, heard and ended here; what that means for the worker is for `supervisor` to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections import deque
from typing import cast

from rkcached.errors import WorkerDied
from rkcached.host import isolated
from rkcached.worker import memory, protocol
from rkcached.worker.lines import LibraryLines
from rkcached.worker.scratch import Scratch

MAX_WAITING_BYTES = 1 << 20
"""Of what a worker sent and nobody has taken."""


class WorkerProcess:
    """One process after the other. On the event loop."""

    def __init__(self, model: str, *, stop_s: float) -> None:
        """`stop_s`: seconds from asking a process to leave to killing it."""
        self._model = model
        self._stop_s = stop_s
        self.handle: asyncio.subprocess.Process | None = None
        """The process that runs now."""
        self.lines = LibraryLines(model)
        self.kernel_kills = 0
        """Of our cgroup, when the process was started."""
        self._link: _Link | None = None
        self._scratch: Scratch | None = None

    @property
    def scratch_dir(self) -> str:
        return self._scratch.path if self._scratch is not None else ""

    def settle(self) -> None:
        """The engine has made its sockets: from now on, none of them may vanish."""
        # A scratch folder that is gone already is missed at the first operation.
        if self._scratch is not None:
            with contextlib.suppress(OSError):
                self._scratch.settle()

    def lost_scratch(self) -> bool:
        """Whether somebody deleted its scratch folder, or a socket in it."""
        return self._scratch is not None and not self._scratch.is_whole()

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process, connect its socket and read what it prints.

        If that fails, `end` and `clean_up` take away what there is of it. Errors: OSError.
        """
        self.lines.forget()
        self._scratch = Scratch()

        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_connected:
            unless_connected.callback(ours.close)
            self.kernel_kills = memory.kernel_kills()
            handle = self.handle = await self._execute(theirs, self._scratch)
            self.lines.follow(handle)
            loop = asyncio.get_running_loop()
            _, self._link = await loop.create_connection(_Link, sock=ours)
            unless_connected.pop_all()

        return handle

    async def _execute(self, theirs: socket.socket, scratch: Scratch) -> asyncio.subprocess.Process:
        with theirs:
            return await asyncio.create_subprocess_exec(
                *isolated.command("rkcached.worker.child", str(theirs.fileno())),
                pass_fds=(theirs.fileno(), scratch.lock),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=isolated.environment(),
                cwd=scratch.path,
                start_new_session=True,
            )

    def send(self, message: protocol.ToWorker) -> None:
        """Errors: WorkerDied if none runs; of one that dies now, the next read finds out how."""
        if self._link is None:
            raise self._gone()
        self._link.transport.write(protocol.frame(message))

    async def receive(self, timeout_s: float) -> protocol.FromWorker:
        """The next event.

        Errors: WorkerDied if none runs; TimeoutError; EOFError when it closed its socket;
        ProtocolError.
        """
        if self._link is None:
            raise self._gone()
        return protocol.decode_from_worker(await self._link.next(timeout_s))

    async def end(self, *, kill: bool = False) -> int:
        """Close the socket, and wait for the process or kill it; returns its exit code."""
        handle = self.handle
        link = self._link
        self.handle = self._link = None
        if link is not None:
            link.transport.close()
        if handle is None:
            return 0

        if kill:
            _kill(handle)
        try:
            async with asyncio.timeout(self._stop_s):
                return await handle.wait()
        except TimeoutError:
            _kill(handle)
            return await handle.wait()

    async def clean_up(self) -> None:
        """Read the last lines of a process that has ended, and remove its scratch folder."""
        await self.lines.end(self._stop_s)
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _gone(self) -> WorkerDied:
        return WorkerDied(f"the worker of {self._model} is gone")


class _Link(asyncio.Protocol):
    """Our end of the socket: what comes is cut into frames, which wait until they are taken."""

    transport: asyncio.WriteTransport

    def __init__(self) -> None:
        self._frames = protocol.FrameReader()
        self._received: deque[bytes] = deque()
        self._waiting_bytes = 0
        # Why nothing more will be received.
        self._end: EOFError | protocol.ProtocolError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)
        self._reading = cast(asyncio.ReadTransport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._received.append(frame)
                self._waiting_bytes += len(frame)
        except protocol.ProtocolError as error:
            self._end = error
            self.transport.close()
        if self._waiting_bytes > MAX_WAITING_BYTES:  # of a worker that nobody has asked
            self._reading.pause_reading()
        if self._received or self._end is not None:  # else it was a part of a frame
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._end = self._end or EOFError()
        self._wake()

    async def next(self, timeout_s: float) -> bytes:
        """The next frame. Errors: TimeoutError, EOFError, ProtocolError."""
        if not self._received and self._end is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None

        if self._received:
            frame = self._received.popleft()
            self._waiting_bytes -= len(frame)
            if self._waiting_bytes <= MAX_WAITING_BYTES:
                self._reading.resume_reading()
            return frame
        raise self._end or TimeoutError

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def describe(code: int) -> str:
    """How a process ended, from its exit code."""
    if code >= 0:
        return f"exited with code {code}"
    if -code == signal.SIGILL:
        return "was killed by SIGILL: the library uses an instruction that this CPU does not have"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
