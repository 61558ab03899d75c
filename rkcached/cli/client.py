"""The client of the daemon's socket, for commands, benchmarks and the demo."""

from __future__ import annotations

import contextlib
import http.client
import json
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import quote, urlencode

from rkcached.errors import (
    AnotherServer,
    DaemonUnreachable,
    ManifestError,
    NotAllowed,
    Problem,
    RequestError,
    RkcachedError,
)
from rkcached.host.unix_http import UnixConnection

# Connecting is quick or impossible; an answer takes as long as its model.
_CONNECT_S = 10.0

# The event stream has a sign of life every 15 s. One that is silent for longer is dead.
_SILENCE_S = 40.0

# Between two attempts to connect to a daemon that is not there.
_RETRY_S = 0.25

START_IT = (
    "start it with `sudo systemctl start rkcached` or `rkcached run`, "
    "or name its socket with RKCACHED_SOCKET"
)
"""The next step where no daemon answers."""

_SEE_LOG = "see its log: `journalctl -u rkcached`"

_NAME_IT = "name the daemon's socket with --socket or RKCACHED_SOCKET"

# All answers of the daemon have it.
_MARK = "X-Request-Id"

# The length of `sun_path` in sockaddr_un, without the NUL at its end.
_MAX_PATH_BYTES = 107


Sent = dict[str, Any] | Iterable[bytes] | None
"""A body: JSON, or bytes."""


class Client:
    """A client with one connection, which it keeps from request to request; for one thread.

    Errors of every call: DaemonUnreachable, AnotherServer, RequestError.
    """

    def __init__(self, socket: Path, *, patience_s: float | None = None) -> None:
        """`patience_s`: give up when the daemon sends nothing for so long; None waits for it."""
        self._socket = socket
        self._patience_s = patience_s
        self._kept = self._new_connection()
        # A second request while a stream is open takes a connection of its own.
        self._in_use = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._kept.close()

    def ready(self) -> None:
        """Connect now, so that the next request takes no time for it."""
        with self._translated():
            self._connect(self._kept)

    def status(self, *, look: bool = False) -> dict[str, Any]:
        """The status document. `look`: the daemon looks at the files first."""
        return self.request("GET", "/v1/status?look=true" if look else "/v1/status")

    def reload(self) -> str:
        """Make the daemon read its manifest, on the admin socket; returns its summary.

        Errors: ManifestError.
        """
        return str(self.request("POST", "/v1/reload")["summary"])

    def regenerate(self, model: str, prompt: str) -> dict[str, Any]:
        path = f"/v1/cache/{quote(model)}/generate-binary"
        return self.request("POST", path, {"cache_name": prompt})

    def collect(self, *, strangers: bool) -> dict[str, Any]:
        return self.request("POST", "/v1/gc", {"dry_run": False, "strangers": strangers})

    def import_bundle(self, pieces: Iterable[bytes], *, prove: bool) -> dict[str, Any]:
        """Send a bundle; the answer says what became of its prompts. On the admin socket."""
        return self.request("POST", "/v1/import?prove=true" if prove else "/v1/import", pieces)

    def store(self, model: str, prompt: str, text: str) -> None:
        """Store a text as a prompt, and wait until its cache is built. On the admin socket."""
        self.request("POST", f"/v1/cache/{quote(model)}", {"cache_name": prompt, "content": text})

    def delete(self, model: str, prompt: str) -> None:
        """Delete a stored prompt and its cache. On the admin socket."""
        self.request("DELETE", f"/v1/cache/{quote(model)}/{quote(prompt)}")

    def suggestions(self) -> list[dict[str, Any]]:
        """Beginnings that requests repeat: the caller's, or on the admin socket everybody's."""
        data: list[dict[str, Any]] = self.request("GET", "/v1/suggestions")["data"]
        return data

    def store_next(self, suggestion: str, name: str) -> dict[str, Any]:
        """Have the next request with this beginning stored as a prompt."""
        return self.request("POST", "/v1/suggestions", {"id": suggestion, "name": name})

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return self.request("POST", "/v1/chat/completions", body)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        for data in self.stream_data("/v1/chat/completions", {**body, "stream": True}):
            yield json.loads(data)

    def stream_data(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        """The chunks of a streamed answer as they arrive, not parsed yet."""
        with self._lines("POST", path, body) as lines:
            for line in lines:
                if line.startswith(b'data: {"error"'):
                    error = json.loads(line[6:])["error"]
                    raise RequestError(502, error["message"], code=error["code"])
                if line == b"data: [DONE]":
                    break
                if line.startswith(b"data: "):
                    yield line[6:]
            else:
                raise _broken_off("its answer has no end")

            for _ in lines:  # what follows belongs to this answer, too
                pass

    @contextlib.contextmanager
    def lent(self, model: str) -> Iterator[None]:
        """Wait until the daemon has unloaded a model for us; it may load it again at the end.

        On the admin socket.
        """
        with self._lines("POST", "/v1/models/lend", {"model": model}) as lines:
            next(lines, b"")
            yield

    def events(self, waits_for: Sequence[str] = ()) -> Iterator[str]:
        """The kind of each event.

        The builds of what `waits_for` names (MODEL/PROMPT, MODEL, or * for all) are not held back
        meanwhile. First "listening", and "still here" after each silence. Ends with the daemon.
        """
        kind = ""
        query = urlencode([("waits_for", name) for name in waits_for])
        with self._lines("GET", f"/v1/events?{query}" if query else "/v1/events") as lines:
            for line in lines:
                if line.startswith((b"event: ", b": ")):
                    kind = line.partition(b": ")[2].decode()
                if not line:  # ends an event
                    yield kind

    def request(self, method: str, path: str, body: Sent = None) -> dict[str, Any]:
        """Send a request that is answered by one JSON document."""
        with self._response(method, path, body) as response:
            with self._translated():
                data = response.read()
            answer: dict[str, Any] = json.loads(data)
            return answer

    @contextlib.contextmanager
    def _lines(self, method: str, path: str, body: Sent = None) -> Iterator[Iterator[bytes]]:
        """The lines of an answer, without their ends, as they arrive."""

        def read(response: http.client.HTTPResponse) -> Iterator[bytes]:
            with self._translated():
                while line := response.readline():
                    yield line.rstrip(b"\r\n")

        with self._response(method, path, body) as response:
            yield read(response)

    @contextlib.contextmanager
    def _response(self, method: str, path: str, body: Sent) -> Iterator[http.client.HTTPResponse]:
        """An answer whose status is 200 or 202."""
        is_second = self._in_use
        connection = self._new_connection() if is_second else self._kept
        self._in_use = True
        is_whole = False

        try:
            with self._translated():
                self._connect(connection)
                _send(connection, method, path, body)
                response = connection.getresponse()
                if response.headers[_MARK] is None:
                    raise self._another("it does not answer as rkcached does")
                if response.status not in (HTTPStatus.OK, HTTPStatus.ACCEPTED):
                    _refuse(response.status, response.read())

            with response:
                yield response
                is_whole = response.isclosed()
        finally:
            self._in_use = is_second
            if is_second or not is_whole:  # the rest of this answer must not precede the next one
                connection.close()

    def _connect(self, connection: UnixConnection) -> None:
        try:
            connection.ready()
        except PermissionError as error:
            raise NotAllowed(str(self._socket)) from error
        except TimeoutError:
            raise
        except OSError as error:
            raise _unreachable(self._socket) from error

    def _new_connection(self) -> UnixConnection:
        return UnixConnection(self._socket, connect_s=_CONNECT_S, silence_s=self._patience_s)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors: DaemonUnreachable for those of the connection; AnotherServer if it is no HTTP."""
        try:
            yield
        except TimeoutError as error:
            raise DaemonUnreachable("the daemon did not answer in time", hint=_SEE_LOG) from error
        except OSError as error:
            raise _broken_off(str(error)) from error
        except http.client.IncompleteRead as error:
            raise _broken_off("its answer has no end") from error
        except http.client.HTTPException as error:
            raise self._another("it does not speak HTTP") from error

    def _another(self, why: str) -> AnotherServer:
        return AnotherServer(f"another program has the socket {self._socket}: {why}", hint=_NAME_IT)


def follow(socket: Path, waits_for: Sequence[str] = ()) -> Iterator[str | RkcachedError]:
    """The kinds of events, as `Client.events` has them, of this daemon and of the next. Never ends.

    An error each time that no daemon answers; it then tries again.
    """
    while True:
        try:
            with Client(socket, patience_s=_SILENCE_S) as client:
                yield from client.events(waits_for)
            yield DaemonUnreachable("the daemon has ended", hint=_SEE_LOG)
        except RkcachedError as error:
            yield error
        time.sleep(_RETRY_S)


def _send(connection: UnixConnection, method: str, path: str, body: Sent) -> None:
    if body is None:
        connection.request(method, path)
    elif not isinstance(body, dict):
        with contextlib.suppress(BrokenPipeError):  # a refusal may come before all is sent
            connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
    else:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body).encode(), headers)


def _unreachable(socket: Path) -> DaemonUnreachable:
    """The error where nothing can be connected to, with the reason if it is the path's."""
    length = len(str(socket).encode(errors="replace"))
    if length > _MAX_PATH_BYTES:
        return DaemonUnreachable(
            f"the path {socket} is too long for a socket: {length} bytes, "
            f"{_MAX_PATH_BYTES} are possible",
            hint=_NAME_IT,
        )

    with contextlib.suppress(OSError):
        mode = socket.stat().st_mode
        if not stat.S_ISSOCK(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a file"
            return DaemonUnreachable(f"{socket} is {kind}, and no socket", hint=_NAME_IT)
    return DaemonUnreachable(f"no daemon answers on {socket}", hint=START_IT)


def _broken_off(why: str) -> DaemonUnreachable:
    return DaemonUnreachable(f"the daemon broke the connection: {why}", hint=_SEE_LOG)


def _refuse(status: int, body: bytes) -> NoReturn:
    """Errors: ManifestError, RequestError."""
    try:
        refusal = json.loads(body)["error"]
        error = RequestError(status, refusal["message"], code=refusal["code"])
        problems = tuple(Problem(**problem) for problem in refusal.get("problems") or ())
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")[:200]
        raise RequestError(status, f"HTTP {status}: {text}", code="unknown") from None

    if problems:
        raise ManifestError(problems)
    raise error
