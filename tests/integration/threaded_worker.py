"""A worker whose child is a thread: thousands of starts and deaths in seconds.

The supervisor, the protocol, the child's channel, the operations and the memory engine are the real
ones; only the process is missing. To be killed is to lose the socket; the death is over when the
thread has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

import msgspec

from rkcached.errors import EngineError
from rkcached.worker import child, protocol
from rkcached.worker.model import Deadlines, WorkerModel
from rkcached.worker.process import WorkerProcess
from rkcached.worker.supervisor import Worker


class _Channel(child._Channel):
    def _leave(self) -> None:
        if self.engine is not None:
            self.engine.abort()
        self._inbox.put(None)


class ThreadProcess:
    """As much of `asyncio.subprocess.Process` as the supervisor uses."""

    stdout = stderr = None
    pid = 2**22 + 1  # beyond what Linux gives to a process

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._code = 0
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        self._code = -9
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def wait(self) -> int:
        await self._ended.wait()
        return self._code

    def _run(self) -> None:
        channel = _Channel(self._socket)
        reader = threading.Thread(target=channel.read_forever, daemon=True)
        reader.start()
        with contextlib.suppress(OSError):
            self._serve(channel)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        reader.join()
        self._socket.close()
        with contextlib.suppress(RuntimeError):  # the loop is gone
            self._loop.call_soon_threadsafe(self._ended.set)

    def _serve(self, channel: _Channel) -> None:
        start = channel.receive()
        if not isinstance(start, protocol.Start):
            return
        try:
            # What limits a process would limit the one that runs the tests.
            start = msgspec.structs.replace(start, confine=False, max_memory_bytes=None)
            session = child._start(channel, start, "")
        except EngineError as error:
            channel.send(protocol.failed(0, error))
            return
        while isinstance(
            message := channel.receive(), protocol.Build | protocol.Generate | protocol.Check
        ):
            child._run(session, channel, message)
        session.engine.close()


class ThreadedWorkerProcess(WorkerProcess):
    async def _execute(self, theirs: socket.socket, _: object) -> Any:
        return ThreadProcess(theirs)


class ThreadedWorker(Worker):
    def __init__(self, model: WorkerModel, *, deadlines: Deadlines, **options: Any) -> None:
        super().__init__(model, deadlines=deadlines, **options)
        self._process = ThreadedWorkerProcess(model.name, stop_s=deadlines.stop_s)
