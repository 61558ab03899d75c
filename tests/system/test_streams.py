"""Streams that wait: for a turn, for a prefill. They give signs of life, and say how far it is."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S, wait_until

QUESTION = [{"role": "user", "content": "hello " * 200}]
ASKED = {"model": "m/a", "messages": QUESTION, "max_tokens": 4, "stream": True}
SLOW_US = 1000
"""Of a token's prefill: the question's 1,200 take more than a second."""


@pytest.fixture
def slow(workspace: Workspace) -> Workspace:
    workspace.memory_model(prefill_us_per_token=SLOW_US)
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md}")
    workspace.hurry(api__answering__SIGN_OF_LIFE_S=0.2)
    workspace.start()
    workspace.wait_state("a", "fresh")
    return workspace


def lines_of(space: Workspace, **body: Any) -> list[str]:
    """What a stream sends, without the empty lines between its events."""
    asked = {**ASKED, **body}
    with (
        space.http() as client,
        client.stream("POST", "/v1/chat/completions", json=asked, timeout=DEADLINE_S) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        return [line for line in answer.iter_lines() if line]


def test_a_long_prefill_is_not_silent(slow: Workspace) -> None:
    """Comments come before the first piece, and none after it. Clients pass over them."""
    lines = lines_of(slow)
    first = next(at for at, line in enumerate(lines) if line.startswith("data:"))
    assert set(lines[:first]) == {": waiting"}
    assert 2 <= first < 50
    assert not any(line.startswith(":") for line in lines[first:])
    assert lines[-1] == "data: [DONE]"

    transport = httpx.HTTPTransport(uds=str(slow.socket))
    with httpx.Client(transport=transport) as http:
        client = openai.OpenAI(api_key="none", base_url="http://rkcached/v1", http_client=http)
        asked = [{"role": "user", "content": "welcome " * 150}]
        chunks = list(
            client.chat.completions.create(  # type: ignore[call-overload]
                model="m/a", messages=asked, max_tokens=4, stream=True
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_who_asks_hears_how_much_is_read(slow: Workspace) -> None:
    """As llama.cpp's server says it, and instead of comments."""
    lines = lines_of(slow, return_progress=True)
    events = [json.loads(line[6:]) for line in lines[:-1]]
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert [event for event in events if "prompt_progress" in event] == events[: len(told)]
    assert len(told) > 3
    cached = slow.prompt("a")["artifact"]["tokens"]
    assert {figures["cache"] for figures in told} == {cached}
    assert [figures["processed"] for figures in told] == sorted(
        figures["processed"] for figures in told
    )
    assert told[0]["processed"] == cached
    assert told[-1]["processed"] == told[-1]["total"] > 1000
    usage = events[-1]["rkcached"]
    assert usage["state"] == "hit"


def test_an_error_has_its_status_until_there_was_a_sign_of_life(slow: Workspace) -> None:
    """Then it is the last event of the stream."""
    refused = slow.request(
        "POST",
        "/v1/chat/completions",
        json={"model": "m", "messages": [{"role": "user", "content": "x" * 9000}], "stream": True},
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"

    with (
        slow.http() as client,
        client.stream("POST", "/v1/chat/completions", json=ASKED) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == ": waiting"
        for child in slow.children():
            if "rkcached.worker.child" in child.cmdline():
                child.kill()
        *_, last = filter(None, lines)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_died"


def test_a_client_that_leaves_while_it_waits_leaves_its_place(slow: Workspace) -> None:
    """Also one that has had a sign of life, and no piece yet."""
    with (
        slow.http() as client,
        client.stream("POST", "/v1/chat/completions", json=ASKED) as answer,
    ):
        assert next(answer.iter_lines()) == ": waiting"
    wait_until(lambda: slow.status()["models"][0]["worker"] == "ready", "it is not read any more")
