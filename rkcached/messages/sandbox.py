"""Renders chat templates of other people in a process that can be killed.

A .jinja file comes with a model, from somebody. Jinja2's sandbox keeps it from reading what it
should not, but not from an endless loop or from a text of ten gigabytes, which it may make in one
step of C (`'a' * 10**10` at compile time, `x ~ x` forty times, `'%9999999999d'`): nothing inside a
process can interrupt that. So such a template is compiled and rendered in a child, with a deadline
and a limit of memory, which cannot write files; what it breaks is that child. The price is about
0.2 ms a request and one process of some 15 MB, started when it is first needed. Built-in templates
are ours and linear in their input: they are rendered in place and pay nothing.

Used from threads, one render at a time; never from the event loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.host import isolated, landlock
from rkcached.host.confine import confine
from rkcached.messages.environment import Write, compile_here
from rkcached.messages.message import Message

RENDER_TIMEOUT_S = 2.0
"""A render takes a millisecond. An overloaded board may take a hundred times as long."""

START_TIMEOUT_S = 30.0
"""The limit of the time from exec to the first answer."""

REST_S = 10.0
"""A template that used up its time or memory is refused at once for so long: it must not keep a
core busy."""

MEMORY_BYTES = 256 << 20
"""Memory that compiling and rendering may allocate."""

MAX_TEXT_BYTES = 16 << 20
"""The longest text, as long as a message to a worker may be."""

_LENGTH_BYTES = 4
_KEPT_VARIABLES = ("PATH", "LANG", "LC_")
_HINT = "choose another chat_template, or find its loop that does not end"


@dataclass(slots=True)
class Process:
    popen: subprocess.Popen[bytes]
    connection: socket.socket

    def end(self) -> None:
        self.connection.close()
        self.popen.kill()
        self.popen.wait()


class Renderer:
    """The child, started when it is needed and again after it was killed."""

    def __init__(self, *, timeout_s: float = RENDER_TIMEOUT_S, rest_s: float = REST_S) -> None:
        self._timeout_s = timeout_s
        self._rest_s = rest_s
        self._lock = threading.Lock()
        # The templates that are refused, by source, with the end of that time (monotonic) and why.
        self._resting: dict[str, tuple[float, TemplateExhausted]] = {}
        self._running: list[Process] = []
        self._finalizer = weakref.finalize(self, end_all, self._running)

    def compile(self, source: str, name: str) -> Write:
        """Do as `compile_here`, in the child. Errors: TemplateError, TemplateExhausted."""
        self._ask(source, name, {}, None)

        def write(variables: Mapping[str, Any], messages: Sequence[Message]) -> str:
            return self._ask(source, name, variables, messages)

        return write

    def close(self) -> None:
        """End the child. It is started again if it is needed."""
        with self._lock:
            end_all(self._running)

    def _ask(
        self,
        source: str,
        name: str,
        variables: Mapping[str, Any],
        messages: Sequence[Message] | None,
    ) -> str:
        question = {
            "source": source,
            "name": name,
            "variables": variables,
            "messages": messages,
            "timeout_s": self._timeout_s,
        }
        data = json.dumps(question).encode()

        with self._lock:
            self._refuse_resting(source)
            process = self._process()
            try:
                answer = self._exchange(process, data)
            except TimeoutError:
                raise self._exhausted(
                    source, f"template {name}: it did not end within {self._timeout_s:g} s"
                ) from None
            except (OSError, EOFError, ValueError):
                raise self._exhausted(
                    source, f"template {name}: it ended the process that rendered it"
                ) from None

            if answer.get("exhausted"):
                raise self._exhausted(source, answer["error"])

        if "error" in answer:
            raise TemplateError(answer["error"], hint=answer["hint"])

        text: str = answer["text"]
        return text

    def _refuse_resting(self, source: str) -> None:
        now = time.monotonic()
        for known, (until, _) in list(self._resting.items()):
            if until <= now:
                del self._resting[known]

        if source in self._resting:
            error = self._resting[source][1]
            raise TemplateExhausted(error.message, hint=error.hint)

    def _exhausted(self, source: str, message: str) -> TemplateExhausted:
        """End the child, which is of no more use, and refuse its template for some time."""
        end_all(self._running)
        error = TemplateExhausted(message, hint=_HINT)
        self._resting[source] = (time.monotonic() + self._rest_s, error)
        return error

    def _process(self) -> Process:
        """The running child, or a new one. Errors: TemplateExhausted."""
        if self._running and self._running[0].popen.poll() is not None:
            end_all(self._running)

        if not self._running:
            try:
                self._running.append(start("rkcached.messages.sandbox"))
            except OSError as error:
                message = f"the process that renders templates cannot be started: {error}"
                raise TemplateExhausted(
                    message, hint="is the machine out of memory or processes?"
                ) from error

        return self._running[0]

    def _exchange(self, process: Process, data: bytes) -> dict[str, Any]:
        """Errors: TimeoutError; OSError, EOFError, ValueError if the child is gone or broken."""
        process.connection.settimeout(self._timeout_s)
        send(process.connection, data)
        body = receive(process.connection, self._timeout_s)
        if body is None:
            raise EOFError

        return _checked(body)


def _checked(body: bytes) -> dict[str, Any]:
    """The answer of a child that may not be ours any more. Errors: ValueError."""
    try:
        answer = json.loads(body)
        texts = [answer["text"]] if "text" in answer else [answer["error"], answer.get("hint", "")]
        "".join(texts).encode()
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(error) from error
    return {"hint": "", **answer}


def end_all(running: list[Process]) -> None:
    while running:
        running.pop().end()


def start(module: str) -> Process:
    """Start a child that runs a module of ours, and wait until it is ready.

    Errors: OSError; TimeoutError when the machine is too busy to start a process.
    """
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(_KEPT_VARIABLES)
    }
    ours, theirs = socket.socketpair()

    with theirs:
        popen = subprocess.Popen(
            isolated.command(module, str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=isolated.CWD,
            start_new_session=True,
        )

    process = Process(popen, ours)
    try:
        ready = receive(ours, START_TIMEOUT_S)
    except BaseException:  # also for Ctrl-C: nobody else knows the process yet
        process.end()
        raise

    if ready is None:
        process.end()
        raise BrokenPipeError("it ended at once")
    return process


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)


def receive(connection: socket.socket, timeout_s: float | None) -> bytes | None:
    """The next message, None at the end.

    Errors: TimeoutError, OSError; ValueError for one that is too long.
    """
    deadline: float | None = None
    if timeout_s is not None:
        deadline = time.monotonic() + timeout_s

    data = bytearray()
    wanted = _LENGTH_BYTES

    while len(data) < wanted:
        if deadline is not None:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))

        part = connection.recv(min(1 << 20, wanted - len(data)))
        if not part:
            return None

        data += part
        if len(data) == _LENGTH_BYTES == wanted:
            wanted += int.from_bytes(data, "little")
            if deadline is not None and wanted > 8 * MAX_TEXT_BYTES:  # a text in JSON's escapes
                raise ValueError(wanted)

    return bytes(data[_LENGTH_BYTES:])


# The rest runs in the child.


_compile = lru_cache(maxsize=64)(compile_here)


def main() -> None:
    """The child: render for the daemon over the socket in the argument, until it closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    restrict()
    send(connection, b"ready")

    while (data := receive(connection, None)) is not None:
        question = json.loads(data)
        # The kernel ends a loop that does not end, also when the daemon was killed and cannot.
        signal.setitimer(signal.ITIMER_REAL, question["timeout_s"] + 1)
        send(connection, json.dumps(_answer(question)).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def restrict() -> None:
    """Close to this process what it does not need: also files, but those of the interpreter."""
    confine(with_sockets=False)
    landlock.restrict(landlock.Reach())
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, size_bytes + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
            resource.setrlimit(limit, (value, value))


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    name = question["name"]
    text = ""
    try:
        write = _compile(question["source"], name)
        if question["messages"] is not None:
            text = write(question["variables"], question["messages"])

        if len(text) > MAX_TEXT_BYTES:
            return {
                "error": f"template {name}: it wrote {len(text):,} characters",
                "exhausted": True,
            }

        return {"text": text}
    except TemplateExhausted as error:
        return {"error": error.message, "exhausted": True}
    except TemplateError as error:
        return {"error": error.message, "hint": error.hint}
