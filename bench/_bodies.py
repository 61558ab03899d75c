"""Measures how long others wait while bodies of the largest size are read, rendered and refused.

Each is a right request as far as its form goes, so it goes through everything that a request goes
through before its tokens are counted.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from _daemon import BenchError, Daemon
from _figures import Figure
from _workspaces import MODEL, Bench, memory

from rkcached.api.exchange import MAX_BODY_BYTES
from rkcached.cli.bench.samples import median
from rkcached.host.unix_http import UnixConnection

LONGEST_MS = 100
USUAL_MS = 5
_ROOM_BYTES = 2000
"""For what stands around the large part of a body."""
_HELLO = {"role": "user", "content": "hello"}


def _chat(*messages: dict[str, Any], **others: Any) -> bytes:
    body = {"model": MODEL, "max_tokens": 1, "messages": [*messages, _HELLO], **others}
    return json.dumps(body, ensure_ascii=False).encode()


def _full(piece: str) -> str:
    """As much of it as a body may have."""
    return piece * ((MAX_BODY_BYTES - _ROOM_BYTES) // len(piece.encode()))


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _tool(number: int) -> dict[str, Any]:
    properties = {f"p{name}": {"type": "string", "description": "x"} for name in range(10)}
    parameters = {"type": "object", "properties": properties}
    function = {"name": f"f{number}", "description": "Does it.", "parameters": parameters}
    return {"type": "function", "function": function}


def _call(number: int) -> dict[str, Any]:
    arguments = json.dumps({"a": "x" * 20})
    function = {"name": "f", "arguments": arguments}
    return {"id": f"c{number}", "type": "function", "function": function}


def _schema(**schema: Any) -> dict[str, Any]:
    named = {"name": "n", "schema": {"type": "object", **schema}}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _escaped() -> bytes:
    text = '"' + "\\u00e9" * ((MAX_BODY_BYTES - _ROOM_BYTES) // 6) + '"'
    return _chat(_user("@")).replace(b'"@"', text.encode())


BODIES: dict[str, Callable[[], bytes]] = {
    "one word": lambda: _chat(_user(_full("a"))),
    "words": lambda: _chat(_user(_full("word "))),
    "escapes": _escaped,
    "emoji": lambda: _chat(_user(_full("😀"))),
    "control tokens": lambda: _chat(_user(_full("<|im_start|>"))),
    "signs that begin tokens": lambda: _chat(_user(_full("<"))),
    "signs of reasoning": lambda: _chat(
        {"role": "assistant", "content": "x", "reasoning_content": _full("<think>")}
    ),
    "a system message": lambda: _chat({"role": "system", "content": _full("Be kind. ")}),
    "6,000 messages": lambda: _chat(*[_HELLO] * 6000),
    "4,000 long messages": lambda: _chat(*[_user("hello " * 330)] * 4000),
    "6,000 parts": lambda: _chat(_user([{"type": "text", "text": "hello"}] * 6000)),
    "120 tools": lambda: _chat(tools=[_tool(number) for number in range(120)]),
    "a large tool": lambda: _chat(
        tools=[{"type": "function", "function": {"name": "f", "description": _full("d")}}]
    ),
    "2,500 calls": lambda: _chat(
        _HELLO,
        {"role": "assistant", "content": "", "tool_calls": [_call(at) for at in range(2500)]},
    ),
    "a stop": lambda: _chat(stop=[_full("s")]),
    "metadata": lambda: _chat(metadata={"a": _full("m")}),
    "documents": lambda: _chat(documents=[{"text": "hello"}] * 1000),
    "a schema": lambda: _chat(**_schema(properties={f"p{n}": {} for n in range(2000)})),
    "a large schema": lambda: _chat(**_schema(description=_full("d"))),
    "a named prompt": lambda: _chat({"role": "system", "content": _full("Be kind. ")}).replace(
        f'"{MODEL}"'.encode(), f'"{MODEL}/greenhouse"'.encode(), 1
    ),
}


def measure_bodies(bench: Bench) -> list[Figure]:
    """The longest that /healthz takes, and its median over all bodies."""
    figures = []
    usual: list[float] = []
    with Daemon(bench.workspace(memory)) as daemon:
        daemon.wait_fresh()
        for name, make in BODIES.items():
            body = make()
            bench.say(f"bodies: {name}, {len(body):,} bytes")
            waits = [wait for _ in range(bench.runs) for wait in _waits(daemon, body)]
            usual += waits
            figures.append(
                Figure(
                    part="bodies",
                    name=f"/healthz during {name}, {len(body):,} bytes: longest",
                    value=max(waits),
                    unit="ms",
                    aim=LONGEST_MS,
                    note=f"median {median(waits):.1f} ms, n={len(waits)}",
                    samples=tuple(waits),
                )
            )
    figures.append(
        Figure(
            part="bodies",
            name="/healthz during all of them: median",
            value=median(usual),
            unit="ms",
            aim=USUAL_MS,
            note=f"n={len(usual)}",
        )
    )
    return figures


def _waits(daemon: Daemon, body: bytes) -> list[float]:
    """Milliseconds of each /healthz while this body is sent and answered. Errors: BenchError."""
    answered: list[int] = []

    def send() -> None:
        connection = UnixConnection(str(daemon.workspace.socket))
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        response.read()
        connection.close()
        answered.append(response.status)

    thread = threading.Thread(target=send)
    thread.start()
    waits = []
    asking = UnixConnection(str(daemon.workspace.socket))
    while thread.is_alive() or not waits:
        started = time.perf_counter()
        asking.request("GET", "/healthz")
        asking.getresponse().read()
        waits.append((time.perf_counter() - started) * 1000)
        thread.join(0.002)
    asking.close()
    if not answered or answered[0] >= 500:
        raise BenchError(f"a large body was not answered, or with a defect: {answered}")
    return waits
