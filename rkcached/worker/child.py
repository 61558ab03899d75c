"""The worker process. It hosts one engine on the inherited socket that its argument names.

The main thread runs the engine; a reader thread receives operations and aborts. When the daemon
goes away the socket ends and the process leaves at once, whatever the engine is doing. Only this
module may import an engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import assert_never

from rkcached.engines.base import Engine
from rkcached.errors import EngineError
from rkcached.host import landlock
from rkcached.host.confine import confine
from rkcached.worker import memory, protocol
from rkcached.worker.operations import Session

_PR_SET_PDEATHSIG = 1
_IOLBF = 1
_OOM_SCORE_ADJ = "800"


class _Channel:
    """The worker's end of the socket: operations in, events out."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._frames = protocol.FrameReader()
        self._inbox: queue.SimpleQueue[protocol.ToWorker | None] = queue.SimpleQueue()
        self._aborted: set[int] = set()
        self.engine: Engine | None = None
        self.scratch_dir = ""
        self.idle = False
        """Whether the main thread waits for a message."""

    def send(self, message: protocol.FromWorker) -> None:
        try:
            self._socket.sendall(protocol.frame(message))
        except OSError:
            self._leave()

    def receive(self) -> protocol.ToWorker | None:
        """The next message; None when the daemon wants us gone."""
        self.idle = True
        message = self._inbox.get()
        self.idle = False
        return message

    def is_waited_for(self) -> bool:
        """Whether the next operation is there already."""
        return not self._inbox.empty()

    def is_aborted(self, operation_id: int) -> bool:
        return operation_id in self._aborted

    def read_first(self) -> protocol.ToWorker | None:
        """The first message, before there is another thread; None when the daemon is gone."""
        while self._inbox.empty():
            data = self._recv()
            if not data:
                return None
            self._feed(data)
        return self._inbox.get()

    def read_forever(self) -> None:
        try:
            while data := self._recv():
                self._feed(data)
        except protocol.ProtocolError as error:
            sys.stderr.write(f"E rkcached: the daemon sent {error}\n")  # becomes a log line
            sys.stderr.flush()
        self._leave()

    def _feed(self, data: bytes) -> None:
        """Errors: ProtocolError."""
        for body in self._frames.feed(data):
            self._take(protocol.decode_to_worker(body))

    def _take(self, message: protocol.ToWorker) -> None:
        if not isinstance(message, protocol.Abort):
            self._inbox.put(message)
            return
        self._aborted = {message.id}
        if self.engine is not None:
            self.engine.abort()

    def _recv(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except OSError:
            return b""

    def _leave(self) -> None:
        """End the process: the daemon has closed the socket, or is gone.

        An idle engine is closed first; a busy one may be deep in native code.
        """
        if self.idle:
            self._inbox.put(None)
            return
        if self.scratch_dir:
            shutil.rmtree(self.scratch_dir, ignore_errors=True)
        os._exit(0)


def _confine(message: protocol.Start) -> str:
    """Take away what the worker does not need; returns what the kernel lacks for that.

    The files are closed to this thread and those that it starts, so it must be the only one.
    Errors: EngineError.
    """
    if message.max_memory_bytes is not None:
        try:
            memory.limit(message.max_memory_bytes)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"engine.max_memory_bytes cannot be kept: {error}", hint="remove it"
            ) from error

    if not message.confine:
        return ""
    lacks = [confine()]
    if message.reach is not None:
        lacks.append(landlock.restrict(message.reach))
    return "; ".join(filter(None, lacks))


def _start(channel: _Channel, message: protocol.Start, unconfined: str) -> Session:
    """Load the model. Errors: EngineError."""
    channel.scratch_dir = message.spec.scratch_dir
    started = time.perf_counter()
    module, _, name = message.implementation.partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(message.spec)
    channel.engine = engine
    load_ms = (time.perf_counter() - started) * 1000
    channel.send(protocol.Ready(info=engine.info, load_ms=load_ms, unconfined=unconfined))
    return Session(engine)


def _run(session: Session, channel: _Channel, operation: protocol.Operation) -> None:
    def stopped() -> bool:
        return channel.is_aborted(operation.id)

    answer: protocol.FromWorker
    try:
        match operation:
            case protocol.Build():
                answer = session.build(operation, channel.send, stopped)
            case protocol.Generate():
                answer = session.generate(operation, channel.send, stopped)
            case protocol.Check():
                answer = session.check(operation, channel.send)
            case protocol.Keep():
                answer = session.keep(operation, channel.send)
            case protocol.Tokenize():
                answer = session.tokenize(operation)
            case protocol.Embed():
                answer = session.embed(operation)
            case protocol.Rank():
                answer = session.rank(operation)
            case _:
                assert_never(operation)
    except EngineError as error:
        answer = protocol.failed(operation.id, error)
    channel.send(answer)


def _print_at_once(libc: ctypes.CDLL) -> None:
    """Make C's stdout line-buffered: in a pipe, a crash would lose the last 4 kB."""
    with contextlib.suppress(ValueError):  # a C library that names it otherwise
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _IOLBF, ctypes.c_size_t(0))


def main() -> None:
    """Serve operations on the socket until the other end closes it."""
    # Ctrl-C is for the daemon, which then ends this process in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # even a daemon that was killed leaves no worker
    _print_at_once(libc)
    # Where memory runs out, the kernel kills this process and not the daemon.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ)

    channel = _Channel(socket.socket(fileno=int(sys.argv[1])))
    first = channel.read_first()
    if first is None:
        return
    if not isinstance(first, protocol.Start):
        raise protocol.ProtocolError(f"expected start, got {type(first).__name__}")
    try:
        unconfined = _confine(first)
        threading.Thread(target=channel.read_forever, name="reader", daemon=True).start()
        session = _start(channel, first, unconfined)
    except EngineError as error:
        channel.send(protocol.failed(0, error))
        return

    while (message := channel.receive()) is not None:
        if isinstance(message, protocol.Start | protocol.Abort):
            raise protocol.ProtocolError(f"{type(message).__name__} is no operation")
        _run(session, channel, message)
        session.tidy()
        if not channel.is_waited_for():
            session.rest()

    session.engine.close()
    shutil.rmtree(channel.scratch_dir, ignore_errors=True)
