"""The daemon's end of a worker's socket, over a real one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from rkcached.worker import protocol
from rkcached.worker.process import _Link

LONG = protocol.Failed(id=1, error="EngineError", message="é" * 150_000)
"""More than a socket holds: it arrives in pieces, whoever sends it."""


class Line:
    def __init__(self, link: _Link, theirs: socket.socket) -> None:
        self.link = link
        self.theirs = theirs

    async def next(self, timeout_s: float = 10) -> protocol.FromWorker:
        return protocol.decode_from_worker(await self.link.next(timeout_s))


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    _, link = await asyncio.get_running_loop().create_connection(_Link, sock=ours)
    with theirs:
        yield Line(link, theirs)
        link.transport.close()


async def test_a_frame_in_parts_is_no_silence(line: Line) -> None:
    data = protocol.frame(LONG)
    waiting = asyncio.create_task(line.next())
    loop = asyncio.get_running_loop()
    for begin in (0, 2, 4, 10, 36_544, 100_000):
        end = {0: 2, 2: 4, 4: 10, 10: 36_544, 36_544: 100_000}.get(begin, len(data))
        await loop.sock_sendall(line.theirs, data[begin:end])
        await asyncio.sleep(0.01)
        assert waiting.done() == (end == len(data))
    assert await waiting == LONG


async def test_several_frames_in_one_part(line: Line) -> None:
    frames = b"".join(protocol.frame(protocol.Loading(id=number)) for number in range(3))
    line.theirs.send(frames)
    assert [await line.next() for _ in range(3)] == [protocol.Loading(id=n) for n in range(3)]


async def test_silence_ends_the_wait(line: Line) -> None:
    """Also of somebody who sends a part of a frame and no more."""
    line.theirs.send(protocol.frame(LONG)[:100])
    with pytest.raises(TimeoutError):
        await line.next(0.2)


async def test_what_came_before_the_end_is_heard(line: Line) -> None:
    line.theirs.send(protocol.frame(protocol.Loading(id=7)))
    line.theirs.close()
    assert await line.next() == protocol.Loading(id=7)
    for _ in range(2):
        with pytest.raises(EOFError):
            await line.next()


async def test_nonsense_ends_the_connection(line: Line) -> None:
    line.theirs.send(protocol.frame(protocol.Loading(id=7)) + b"\xff\xff\xff\xff")
    await asyncio.sleep(0.05)
    assert await line.next() == protocol.Loading(id=7)
    with pytest.raises(protocol.ProtocolError):
        await line.next()
    line.theirs.setblocking(True)
    line.theirs.settimeout(10)
    assert await asyncio.to_thread(line.theirs.recv, 1) == b""


async def test_a_wait_that_is_cancelled_loses_nothing(line: Line) -> None:
    waiting = asyncio.create_task(line.next())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    line.theirs.send(protocol.frame(protocol.Loading(id=7)))
    assert await line.next() == protocol.Loading(id=7)
