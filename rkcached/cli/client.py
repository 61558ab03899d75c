"""The command line's side of the socket: HTTP over the daemon's Unix socket, errors as this program's own."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from rkcached.errors import DaemonUnreachable, NotAllowed, RequestError, RkcachedError

_CONNECT_S = 10.0
"""Connecting is quick or impossible; an answer takes as long as its model."""

_SILENCE_S = 40.0
"""The event stream has a sign of life every 15 s. One that is silent for longer belongs to nobody.
"""

_RETRY_S = 0.25
"""Between two attempts to connect to a daemon that is not there."""


START_IT = "start it with `sudo systemctl start rkcached` or `rkcached run`, or name its socket with --socket"
"""The next step where no daemon answers."""


class Client:
    """A connection to the daemon. Errors of every call: DaemonUnreachable, RequestError."""

    def __init__(self, socket: Path, *, patience_s: float | None = None) -> None:
        """`patience_s`: a daemon that is silent for longer is given up; None waits for it."""
        self._socket = socket
        # There is no TLS on a Unix socket, and reading certificates takes 30 ms.
        transport = httpx.HTTPTransport(verify=False, uds=str(socket))
        self._http = httpx.Client(
            transport=transport,
            base_url="http://rkcached",
            timeout=httpx.Timeout(_CONNECT_S, read=patience_s),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def status(self, *, look: bool = False) -> dict[str, Any]:
        """`look`: the daemon looks at the files first."""
        return self._json("GET", "/v1/status?look=true" if look else "/v1/status")

    def regenerate(self, model: str, prompt: str) -> dict[str, Any]:
        return self._json("POST", f"/v1/cache/{model}/generate-binary", {"cache_name": prompt})

    def collect(self, *, strangers: bool) -> dict[str, Any]:
        return self._json("POST", "/v1/gc", {"dry_run": False, "strangers": strangers})

    def store(self, model: str, prompt: str, text: str) -> None:
        """Store a text as a prompt, and wait until its cache is built. On the admin socket."""
        self._json("POST", f"/v1/cache/{model}", {"cache_name": prompt, "content": text})

    def delete(self, model: str, prompt: str) -> None:
        """Delete a stored text and its cache. On the admin socket."""
        self._json("DELETE", f"/v1/cache/{model}/{prompt}")

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._json("POST", "/v1/chat/completions", body)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": True}
            ) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunk: dict[str, Any] = json.loads(line[6:])
                        if "error" in chunk:
                            raise RequestError(
                                502, chunk["error"]["message"], code=chunk["error"]["code"]
                            )
                        yield chunk
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    @contextlib.contextmanager
    def lent(self, model: str) -> Iterator[None]:
        """Wait until the daemon leaves a model to us; it gets it back at the end.

        On the admin socket.

        Errors: DaemonUnreachable, RequestError.
        """
        try:
            with self._http.stream("POST", "/v1/models/lend", json={"model": model}) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise _refusal(response)
                lines = (
                    response.iter_lines()
                )  # kept until the end: without it, the connection is closed
                next(lines, "")
                yield
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def events(self) -> Iterator[str]:
        """The kind of each event.

        First "listening", and "still here" after each silence. Ends with the daemon.
        """
        kind = ""
        try:
            with self._http.stream("GET", "/v1/events") as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if line.startswith(("event: ", ": ")):
                        kind = line.partition(": ")[2]
                    if not line:  # ends an event
                        yield kind
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        answer: dict[str, Any] = response.json()
        return answer

    def _unreachable(self, error: httpx.TransportError) -> DaemonUnreachable:
        if isinstance(error, httpx.ConnectError):
            if "Permission denied" in str(error):
                return NotAllowed(str(self._socket))
            return DaemonUnreachable(
                f"no daemon answers on {self._socket}",
                hint=START_IT,
            )
        return DaemonUnreachable(f"the daemon broke off: {error}", hint="its log says why")


def follow(socket: Path) -> Iterator[str | RkcachedError]:
    """The kinds of events, as `Client.events` has them, of this daemon and of the next. Never ends.

    An error each time that nobody answers, which is tried again.
    """
    while True:
        try:
            with Client(socket, patience_s=_SILENCE_S) as client:
                yield from client.events()
            yield DaemonUnreachable("the daemon has ended", hint="its log says why")
        except RkcachedError as error:
            yield error
        time.sleep(_RETRY_S)


def _refusal(response: httpx.Response) -> RequestError:
    try:
        said = response.json()["error"]
        return RequestError(response.status_code, said["message"], code=said["code"])
    except (ValueError, KeyError, TypeError):
        return RequestError(
            response.status_code,
            f"HTTP {response.status_code}: {response.text[:200]}",
            code="unknown",
        )
