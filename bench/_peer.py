"""llama.cpp's own server, as xllamacpp embeds it, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import replace
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from _daemon import BenchError

from rkcached.cli.bench.asking import Answer, ask
from rkcached.cli.client import Client
from rkcached.engines.base import ModelSpec
from rkcached.engines.llamacpp.engine import _params

START_S = 60
SOCKET = "peer.sock"
ANY_SLOT = -1
"""The server chooses."""
AUTOMATIC = -1
"""Slots: four, which share the context."""
SLOTS = 4


class Settings(StrEnum):
    """What the server is started with."""

    SAME = "the daemon's settings"
    DEFAULTS = "its own"
    CACHING = "the daemon's, and its own caches: four slots, and the prompt cache in RAM"


class Peer:
    """The server, from `with` to its end.

    One that has a single slot, or is to use but one, gets that slot's number with each request.
    """

    def __init__(
        self, model: Path, context_tokens: int, slots: Path, settings: Settings = Settings.SAME
    ) -> None:
        self._scratch = tempfile.mkdtemp(prefix="rkcached-")
        self._slot = ANY_SLOT if settings is Settings.CACHING else 0
        self.calls = 0
        """HTTP calls so far: what a user has to send."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        spec = ModelSpec(path=str(model), context_tokens=context_tokens, scratch_dir=self._scratch)
        self.process = context.Process(
            target=_serve, args=(theirs, spec, str(slots), settings), daemon=True
        )
        self.process.start()
        theirs.close()
        self._client = Client(Path(self._scratch, SOCKET))

    def __enter__(self) -> Self:
        try:
            is_ready = self._pipe.poll(START_S) and self._pipe.recv() == "ready"
        except EOFError:
            is_ready = False
        if not is_ready:
            raise BenchError("llama.cpp's server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._pipe.close()  # it leaves when its pipe ends
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def slots(self) -> int:
        """Their number."""
        found: Any = self._client.request("GET", "/slots")
        return len(found)

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One call with one answer. Errors: RequestError if it refuses, DaemonUnreachable."""
        self.calls += 1
        return self._client.request("POST", path, body)

    def save(self, prefix: str, name: str) -> int:
        """Make a cache by hand: prefill, then save. Returns its tokens."""
        self.call(
            "/completion", {"prompt": prefix, "n_predict": 0, "id_slot": 0, "cache_prompt": True}
        )
        return int(self.call("/slots/0?action=save", {"filename": name})["n_saved"])

    def restore(self, name: str) -> int:
        return int(self.call("/slots/0?action=restore", {"filename": name})["n_restored"])

    def ask(self, prompt: str, max_tokens: int, *, restore: str = "", cold: bool = False) -> Answer:
        """Stream an answer, after restoring a file if one is named; both count."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"id_slot": self._slot, "cache_prompt": not cold}
        self._client.ready()
        started = time.perf_counter()
        if restore:
            self.restore(restore)
        restore_s = time.perf_counter() - started
        self.calls += 1
        answer = ask(self._client, body, "/v1/completions")
        self._client.close()  # so does the server after a stream, but a moment later
        return replace(answer, moments=tuple(moment + restore_s for moment in answer.moments))

    def death(self) -> str:
        """Name the signal or exit code that ended it, if it has ended."""
        self.process.join(5)
        code = self.process.exitcode
        if code is None:
            return ""
        return f"ended by signal {-code}" if code < 0 else f"ended with code {code}"


def _serve(pipe: Connection, spec: ModelSpec, slots: str, settings: Settings) -> None:
    """The child."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
    library = importlib.import_module("xllamacpp")
    socket = str(Path(spec.scratch_dir, SOCKET))
    if settings is Settings.DEFAULTS:
        params = library.CommonParams()
        params.model.path = spec.path
        params.hostnames = [socket]
    else:
        params = _params(library, spec, socket)

    if settings is Settings.CACHING:
        params.n_parallel = AUTOMATIC  # as in the program llama-server; xllamacpp's own is one slot
        params.cache_ram_mib = library.CommonParams().cache_ram_mib
        params.n_ctx_checkpoints = library.CommonParams().n_ctx_checkpoints
    params.slot_save_path = f"{slots}/"
    server = library.Server(params)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    del server
