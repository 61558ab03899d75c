"""What one user takes of the daemon is bounded, and another one is served meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from conftest import Workspace
from test_learning import open_to_all
from test_reuse import as_user

from rkcached.api.exchange import BODIES_BYTES, MAX_BODY_BYTES
from rkcached.api.routes import EVENT_STREAMS
from rkcached.host.unix_http import UnixConnection
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")

GREEDY, OTHER = 12001, 12002
DECODE_US = 10_000
TOKENS = 20


@pytest.fixture
def shared(workspace: Workspace) -> Workspace:
    """A daemon whose answers of 20 tokens take 0.2 s."""
    workspace.memory_model(decode_us_per_token=DECODE_US)
    workspace.declare("{}")
    workspace.start()
    workspace.ask("m", max_tokens=1)
    open_to_all(workspace)
    return workspace


@contextlib.contextmanager
def connections(space: Workspace, uid: int, count: int) -> Iterator[list[UnixConnection]]:
    """Connections of this user: the kernel notes who opened one, not who uses it."""
    with contextlib.ExitStack() as opened:
        made = []
        with as_user(uid):
            for _ in range(count):
                connection = UnixConnection(str(space.socket))
                connection.connect()
                opened.callback(connection.close)
                made.append(connection)
        yield made


def ask(connection: UnixConnection) -> tuple[int, float]:
    """Status and seconds of an answer of 20 tokens."""
    body = {"model": "m", "max_tokens": TOKENS, "messages": [{"role": "user", "content": "hello"}]}
    started = time.monotonic()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    response.read()
    return response.status, time.monotonic() - started


def memory_bytes(space: Workspace) -> int:
    """Of the daemon alone."""
    assert space.process is not None
    return int(psutil.Process(space.process.pid).memory_info().rss)


def code_of(response: http.client.HTTPResponse) -> str:
    error: dict[str, Any] = json.loads(response.read())["error"]
    return str(error["code"])


def test_a_flood_of_one_user_delays_another_by_one_answer_at_most(shared: Workspace) -> None:
    """30 requests are kept going; today's second caller came behind all of them."""
    with (
        connections(shared, GREEDY, 30) as flood,
        connections(shared, OTHER, 1) as (other,),
        ThreadPoolExecutor(30) as pool,
    ):
        alone_s = min(ask(other)[1] for _ in range(3))
        answers = [pool.submit(ask, connection) for connection in flood]
        wait_until(lambda: shared.status()["running"] >= 25, "the flood waits")
        for _ in range(5):
            status, took_s = ask(other)
            assert status == 200
            # Its own time, and the rest of the answer that is being written.
            assert took_s < alone_s + TOKENS * DECODE_US / 1e6 + 1.0
        assert sum(answer.done() for answer in answers) < 25
        assert {answer.result()[0] for answer in answers} == {200}


@pytest.mark.long
def test_a_queue_that_one_user_has_filled_takes_requests_of_another(shared: Workspace) -> None:
    with (
        connections(shared, GREEDY, 40) as flood,
        connections(shared, OTHER, 1) as (other,),
        ThreadPoolExecutor(40) as pool,
    ):
        answers = [pool.submit(ask, connection) for connection in flood]
        wait_until(lambda: shared.status()["running"] >= 33, "the queue of one user is full")
        assert ask(other)[0] == 200
        statuses = [answer.result()[0] for answer in answers]
    assert statuses.count(503) >= 1
    assert set(statuses) == {200, 503}


def test_event_streams_of_one_user_leave_some_to_others(shared: Workspace) -> None:
    """And a place that is given back is there again."""
    with (
        connections(shared, GREEDY, EVENT_STREAMS + 1) as greedy,
        connections(shared, OTHER, 1) as (other,),
    ):
        for connection in (*greedy, other):
            connection.request("GET", "/v1/events")
        responses = [connection.getresponse() for connection in greedy]
        assert [response.status for response in responses] == [200] * EVENT_STREAMS + [503]
        assert code_of(responses[-1]) == "too_many_streams"
        assert other.getresponse().status == 200

        for connection, response in zip(greedy, responses, strict=True):
            response.close()
            connection.close()

        def is_free() -> bool:
            with connections(shared, GREEDY, 1) as (again,):
                again.request("GET", "/v1/events")
                return bool(again.getresponse().status == 200)

        wait_until(is_free, "a stream is given back")


def test_bodies_that_one_user_holds_leave_memory_to_others(shared: Workspace) -> None:
    """Each is sent but for its last byte, which never comes."""
    size_bytes = MAX_BODY_BYTES - (1 << 10)
    fitting = BODIES_BYTES // size_bytes
    before = memory_bytes(shared)
    part = b'{"model": "m", "x": "' + b"x" * (size_bytes - 22)
    with (
        connections(shared, GREEDY, 20) as greedy,
        connections(shared, OTHER, 1) as (other,),
    ):
        for connection in greedy:
            connection.putrequest("POST", "/v1/chat/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(size_bytes))
            connection.endheaders()
            connection.send(part)
        assert memory_bytes(shared) - before < 2 * BODIES_BYTES
        assert ask(other)[0] == 200

        greedy[-1].send(b" " * (size_bytes - len(part)))
        refused = greedy[-1].getresponse()
        assert (refused.status, code_of(refused)) == (503, "too_much_unanswered")
        assert refused.headers["retry-after"] == "1"
        assert fitting >= 3
    wait_until(
        lambda: memory_bytes(shared) - before < 10 << 20, "the memory of the bodies is given back"
    )


def test_connections_of_one_user_leave_some_to_others(shared: Workspace) -> None:
    with connections(shared, GREEDY, 301) as greedy:
        with connections(shared, OTHER, 1) as (other,):
            assert ask(other)[0] == 200
        answer = http.client.HTTPResponse(greedy[-1].sock)  # it came unasked
        answer.begin()
        assert (answer.status, code_of(answer)) == (503, "too_many_connections")
        greedy[0].request("GET", "/healthz")
        assert greedy[0].getresponse().status == 200


def slow_schema(number: int) -> dict[str, Any]:
    """Takes a check some seconds, and is refused then; no two are the same."""
    definitions = {
        f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)
    } | {"d40": {"type": "string"}}
    return {"title": str(number), "$ref": "#/$defs/d0", "$defs": definitions}


@pytest.mark.long
def test_slow_schemas_of_one_user_delay_another_by_one_check(shared: Workspace) -> None:
    """Each user has one place in the queue of checks; whoever has gone has none."""

    def send(connection: UnixConnection, schema: dict[str, Any]) -> None:
        kind = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body | {"response_format": kind}),
            {"Content-Type": "application/json"},
        )

    with (
        connections(shared, GREEDY, 6) as greedy,
        connections(shared, OTHER, 1) as (other,),
    ):
        for number, connection in enumerate(greedy):
            send(connection, slow_schema(number))
        started = time.monotonic()
        assert greedy[0].getresponse().status == 400
        one_check_s = time.monotonic() - started
        started = time.monotonic()
        send(other, {"type": "object"})
        other.getresponse()
        assert time.monotonic() - started < 3 * one_check_s + 3  # of five that wait
