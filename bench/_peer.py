"""llama.cpp's own server, as xllamacpp embeds it, in a process of its own; and one client for it and for the daemon.

The client keeps the moment of each event and reads them when the answer is whole, so that both are timed alike.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from _daemon import BenchError, UnixConnection

from rkcached.engines.base import ModelSpec
from rkcached.engines.llamacpp.engine import _params

START_S = 60
SOCKET = "peer.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """An answer as its client saw it, from before the first call to the last event with text."""

    ttft_ms: float
    per_token_ms: float
    """Between first and last event with text, by their number."""
    events: list[dict[str, Any]]

    @property
    def timings(self) -> dict[str, Any]:
        """llama.cpp's own figures."""
        return next(event["timings"] for event in reversed(self.events) if "timings" in event)

    @property
    def prefill_ms(self) -> float:
        """Of either, as llama.cpp measured it."""
        own = any("rkcached" in event for event in self.events)
        return float(self.report["prefill_ms"] if own else self.timings["prompt_ms"])

    @property
    def report(self) -> dict[str, Any]:
        """The daemon's."""
        return next(event["rkcached"] for event in reversed(self.events) if "rkcached" in event)


def stream(connection: UnixConnection, path: str, body: dict[str, Any], started: float) -> Streamed:
    """Post, and follow the stream to its end.

    Errors: BenchError unless there is text; OSError, HTTPException.
    """
    arrived: list[tuple[float, bytes]] = []
    connection.request(
        "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with connection.getresponse() as response:
        if response.status != http.HTTPStatus.OK:
            raise BenchError(f"HTTP {response.status}: {response.read()[:300]!r}")
        for line in iter(response.readline, b""):
            if line.startswith(b"data: {"):
                arrived.append((time.perf_counter(), line[6:]))  # noqa: PERF401 - each at its moment
    events = [json.loads(line) for _, line in arrived]
    texts = [moment for (moment, _), event in zip(arrived, events, strict=True) if _has_text(event)]
    if not texts:
        raise BenchError(f"an answer without text: {events[-1:]}")
    per_token = (texts[-1] - texts[0]) / (len(texts) - 1) if len(texts) > 1 else 0.0
    return Streamed(
        ttft_ms=(texts[0] - started) * 1000, per_token_ms=per_token * 1000, events=events
    )


def _has_text(event: dict[str, Any]) -> bool:
    return any(
        choice.get("text") or (choice.get("delta") or {}).get("content")
        for choice in event.get("choices", ())
    )


class Peer:
    """The server, from `with` to its end.

    `tuned`: with the daemon's settings; else with its own defaults.
    """

    def __init__(self, model: Path, context_tokens: int, slots: Path, *, tuned: bool) -> None:
        self._scratch = tempfile.mkdtemp(prefix="rkcached-")
        self._slots = slots
        self.calls = 0
        """HTTP calls so far: what a user has to send."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        spec = ModelSpec(path=str(model), context_tokens=context_tokens, scratch_dir=self._scratch)
        self.process = context.Process(
            target=_serve, args=(theirs, spec, str(slots), tuned), daemon=True
        )
        self.process.start()
        theirs.close()
        self._connection = UnixConnection(Path(self._scratch, SOCKET))

    def __enter__(self) -> Self:
        if not self._pipe.poll(START_S) or self._pipe.recv() != "ready":
            raise BenchError("llama.cpp's server did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._pipe.close()  # it leaves when its pipe ends
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One call with one answer.

        Errors: BenchError if it refuses; OSError or HTTPException if it died.
        """
        self.calls += 1
        try:
            response, document = self._post(path, body)
        except http.client.RemoteDisconnected:
            if not self.process.is_alive():
                raise
            response, document = self._post(
                path, body
            )  # it had just closed the connection, having been idle
        if response.status != http.HTTPStatus.OK:
            raise BenchError(f"llama.cpp's server answered {response.status}: {document}")
        return document

    def _post(
        self, path: str, body: dict[str, Any]
    ) -> tuple[http.client.HTTPResponse, dict[str, Any]]:
        connection = self._connection.ready()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            return response, json.loads(response.read())

    def tokens(self, text: str) -> int:
        return len(
            self.call("/tokenize", {"content": text, "add_special": True, "parse_special": True})[
                "tokens"
            ]
        )

    def save(self, prefix: str, name: str) -> int:
        """Make a cache by hand: prefill, then save. Returns its tokens."""
        self.call(
            "/completion", {"prompt": prefix, "n_predict": 0, "id_slot": 0, "cache_prompt": True}
        )
        return int(self.call("/slots/0?action=save", {"filename": name})["n_saved"])

    def restore(self, name: str) -> int:
        return int(self.call("/slots/0?action=restore", {"filename": name})["n_restored"])

    def ask(
        self, prompt: str, max_tokens: int, *, restore: str = "", cold: bool = False
    ) -> Streamed:
        """Stream an answer, after restoring a file if one is named; both count."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {"id_slot": 0, "cache_prompt": not cold}
        self._connection.ready()
        started = time.perf_counter()
        if restore:
            self.restore(restore)
        self.calls += 1
        return stream(self._connection.ready(), "/v1/completions", body, started)

    def death(self) -> str:
        """What ended it, if it has ended."""
        self.process.join(5)
        code = self.process.exitcode
        return (
            ""
            if code is None
            else f"ended by signal {-code}"
            if code < 0
            else f"ended with code {code}"
        )


def _serve(pipe: Connection, spec: ModelSpec, slots: str, tuned: bool) -> None:
    """The child."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
    library = importlib.import_module("xllamacpp")
    socket = str(Path(spec.scratch_dir, SOCKET))
    if tuned:
        params = _params(library, spec, socket)
    else:
        params = library.CommonParams()
        params.model.path = spec.path
        params.hostnames = [socket]
    params.slot_save_path = f"{slots}/"
    server = library.Server(params)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    del server
