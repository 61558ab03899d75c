"""The HTTP server itself, with clients that do not take what they asked for."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncGenerator, AsyncIterator
from importlib import metadata
from pathlib import Path

import h11
import httpx
import pytest
import uvicorn
from packaging.requirements import Requirement
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkcached.api import connection as connections
from rkcached.api.callers import PEER
from rkcached.api.connection import Connection
from rkcached.api.exchange import DEFECT, Exchanges, error_response
from rkcached.api.listening import SOCKET_MODE, OwnSocket
from rkcached.api.server import HttpServer
from rkcached.api.shares import Share
from rkcached.api.streamed import Streamed, unless_gone
from tests.waiting import DEADLINE_S

ROOT = Path(__file__).parents[2]
GRACE_S = 2
SHARE = Share(each=1 << 20, total=1 << 20)
PIECES, PIECE = 400, b"x" * 65_536
"""Far more than the socket's and the server's buffers take."""


class Site:
    """A server whose every answer is PIECES long.

    `ended` has an item for each that is over, for whatever reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended = asyncio.Queue[None]()
        self.asked = 0
        self.server = HttpServer(Exchanges(self._app, SHARE), grace_s=GRACE_S)
        self.stopped: asyncio.Task[None]

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        Request(scope)
        self.asked += 1
        await Streamed(self._pieces(), media_type="text/plain")(scope, receive, send)

    async def _pieces(self) -> AsyncGenerator[bytes]:
        try:
            for _ in range(PIECES):
                yield PIECE
        finally:
            self.ended.put_nowait(None)

    async def ask(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.path, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        return reader, writer


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    place = OwnSocket(tmp_path / "s", SOCKET_MODE)
    site = Site(tmp_path / "s")
    site.stopped = asyncio.create_task(site.server.serve(sockets=[place.listener]))
    await asyncio.wait_for(site.server.answering.wait(), DEADLINE_S)
    yield site
    site.server.stop()
    await asyncio.wait_for(site.stopped, DEADLINE_S)
    place.close()


async def test_a_client_that_takes_nothing_loses_its_place(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer ends and the connection is closed.

    One that takes its time with it gets the whole.
    """
    monkeypatch.setattr(connections, "STALLED_S", 0.5)
    _, stalled = await site.ask()
    reader, slow = await site.ask()
    size = 0
    for _ in range(20):  # longer than a client may take nothing
        size += len(await reader.readexactly(65_536))
        await asyncio.sleep(0.05)  # the pace of the client
    while data := await reader.read(1 << 20):
        size += len(data)
    assert size > PIECES * len(PIECE)
    for _ in range(2):
        await asyncio.wait_for(site.ended.get(), DEADLINE_S)
    for writer in (stalled, slow):
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_small_writes_over_tcp_do_not_wait_for_each_other(site: Site) -> None:
    """Nagle's algorithm is off, also for a listener that does not know its protocol by number.

    It cost 41 ms of each streamed answer.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    stopped = asyncio.create_task(site.server.serve(sockets=[listener]))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    (connection,) = site.server.server_state.connections
    taken = connection.transport.get_extra_info("socket")
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    await writer.wait_closed()
    site.server.stop()
    await asyncio.wait_for(stopped, DEADLINE_S)
    listener.close()


ASK = """
import socket, sys
if sys.argv[2] == "grandchild" and os.fork():
    os._exit(0)
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    client.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    print(client.recv(12).decode())
"""


@pytest.mark.parametrize(("who", "answer"), [("child", ""), ("grandchild", "HTTP/1.1 200")])
async def test_a_process_of_ours_gets_no_answer(site: Site, who: str, answer: str) -> None:
    """It has the daemon's user, and could do all that this may.

    One that it started would be answered, but a worker cannot start any.
    """
    asking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"import os{ASK}", str(site.path), who),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await asyncio.wait_for(asking.communicate(), DEADLINE_S)
    assert said.decode().strip() == answer, complaint
    if answer:
        await asyncio.wait_for(site.ended.get(), DEADLINE_S)


async def test_a_process_that_has_ended_gets_nothing_done(site: Site) -> None:
    """It connects, sends all it wants, and ends before anybody looks whose child it is."""
    code = f"import os{ASK}".replace("print(client.recv(12).decode())", "os._exit(0)")
    asking = [sys.executable, "-c", code, str(site.path), "child"]
    # It blocks the loop, on purpose: nobody accepts meanwhile.
    subprocess.run(asking, check=True)  # noqa: ASYNC221
    reader, writer = await site.ask()
    while await reader.read(1 << 20):
        pass
    await asyncio.wait_for(site.ended.get(), DEADLINE_S)
    assert site.asked == 1, "by the test itself"
    writer.close()


async def test_a_client_that_takes_nothing_does_not_disturb_the_end(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The server stops within its grace, and has nothing to complain of."""
    _, writer = await site.ask()
    async with asyncio.timeout(DEADLINE_S):
        connections = site.server.server_state.connections
        while not any(one.flow.write_paused for one in connections):  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
    with caplog.at_level(logging.INFO, "uvicorn.error"):
        site.server.stop()
        await asyncio.wait_for(site.ended.get(), GRACE_S)
        await asyncio.wait_for(site.stopped, DEADLINE_S)
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ] == []
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def test_a_defect_has_its_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At error, with every line of ours that led there, and nothing of what was said.

    That may be a prompt.
    """
    words = ["said", "by", "somebody"]

    async def break_down(_: Request) -> Response:
        said = "-".join(words)
        try:
            {}[said]
        except KeyError as error:
            raise ValueError(said) from error

    app = Exchanges(
        Starlette(
            routes=[Route("/x", break_down)],
            exception_handlers={Exception: lambda *_: error_response(DEFECT)},
        ),
        SHARE,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://d") as client:
        answer = await client.get("/x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    crash = record.__dict__["fields"]
    assert (record.getMessage(), crash["path"], crash["error"]) == (
        "request crashed",
        "/x",
        "ValueError",
    )
    assert crash["request_id"] == answer.headers["x-request-id"]
    lines = crash["exception"].splitlines()
    assert lines.count("Traceback (most recent call last):") == 2
    assert lines[-1] == "builtins.ValueError"
    assert "in break_down" in crash["exception"]
    assert "builtins.KeyError" in lines
    assert "said-by-somebody" not in crash["exception"]


def test_uvicorn_is_a_version_that_was_tried() -> None:
    """Our server overrides parts of uvicorn that its authors may change in any release."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (text,) = (text for text in dependencies if Requirement(text).name == "uvicorn")
    bounds = Requirement(text).specifier
    assert {bound.operator for bound in bounds} == {">=", "<"}
    installed = metadata.version("uvicorn")
    assert installed in bounds, f"uvicorn {installed}: try it, then move the bound {bounds}"


def test_what_we_override_of_uvicorn_is_there() -> None:
    """A method that uvicorn calls by another name would leave ours without an effect."""
    overridden = {
        H11Protocol: (
            "connection_made",
            "connection_lost",
            "data_received",
            "eof_received",
            "on_response_complete",
            "send_400_response",
            "pause_writing",
            "resume_writing",
        ),
        uvicorn.Server: ("shutdown", "main_loop", "capture_signals"),
    }
    for theirs, names in overridden.items():
        (ours,) = (part for part in (Connection, HttpServer) if issubclass(part, theirs))
        for name in names:
            assert name in vars(ours)
            before = inspect.signature(getattr(theirs, name))
            after = inspect.signature(getattr(ours, name))
            assert list(before.parameters) == list(after.parameters), name


async def test_what_we_read_of_uvicorn_is_there(site: Site) -> None:
    """Of a server and of a connection in the middle of an answer."""
    _, writer = await site.ask()
    (connection,) = site.server.server_state.connections
    assert isinstance(connection, Connection)
    assert connection.connections is site.server.server_state.connections
    assert not connection.transport.is_closing()
    assert connection.loop is asyncio.get_running_loop()
    assert connection.conn.their_state is h11.MUST_CLOSE  # as the client asked for it
    assert connection.app_state[PEER]["pid"] == os.getpid()
    assert connection.flow.read_paused in (False, True)
    assert connection.flow.write_paused in (False, True)
    assert connection.cycle is not None
    assert connection.cycle.response_started
    assert connection._deadline is None
    assert len(site.server.servers) == 1
    assert site.server.lifespan.state == {}
    assert not site.server.should_exit
    assert inspect.iscoroutinefunction(site.server.on_tick)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def test_a_client_that_leaves_just_as_its_answer_is_there() -> None:
    """What comes after is not cancelled for it.

    Regression: the stream that began with this answer was, and the log had a traceback.
    """
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> str:
        await asyncio.sleep(0)  # whoever listens for the client is listening
        gone.set()
        await asyncio.sleep(0)  # and has heard of it, but has not been asked what to do
        return "the answer"

    request = Request({"type": "http", "path": "/", "headers": []}, receive)
    assert await unless_gone(request, work()) == "the answer"
    await asyncio.sleep(0.01)
