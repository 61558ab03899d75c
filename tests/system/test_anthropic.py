"""Anthropic's official client, which we did not write, over the socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest
from conftest import Workspace

from tests.system.harbour import TEXT
from tests.waiting import DEADLINE_S

HELLO = [{"role": "user", "content": "hello"}]
HINT = {"type": "ephemeral"}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "cache_control": HINT,
}


def client_of(space: Workspace) -> anthropic.Anthropic:
    transport = httpx2.HTTPTransport(uds=str(space.socket))
    http = httpx2.Client(transport=transport, timeout=DEADLINE_S)
    return anthropic.Anthropic(
        api_key="none", base_url="http://rkcached", http_client=http, max_retries=0
    )


@pytest.fixture
def client(harbour: Workspace) -> Iterator[anthropic.Anthropic]:
    with client_of(harbour) as opened:
        yield opened


def test_a_declared_prompt_is_a_hit(harbour: Workspace, client: anthropic.Anthropic) -> None:
    """By its name, and by its text; the tokens of the cache are not counted as input."""
    tokens = harbour.prompt("clerk")["artifact"]["tokens"]
    ways: list[dict[str, Any]] = [
        {"model": "m/clerk"},
        {"model": "m", "system": TEXT},
        {"model": "m", "system": [{"type": "text", "text": TEXT, "cache_control": HINT}]},
    ]
    answers = [client.messages.create(messages=HELLO, max_tokens=8, **way) for way in ways]
    for answer in answers:
        assert (answer.type, answer.role, answer.stop_reason) == (
            "message",
            "assistant",
            "max_tokens",
        )
        assert answer.usage.cache_read_input_tokens >= tokens
        assert answer.usage.cache_creation_input_tokens == 0
        assert 0 < answer.usage.input_tokens < 100
        assert answer.usage.output_tokens == 8
        assert answer.rkcached["state"] == "hit"
    assert len({answer.content[0].text for answer in answers}) == 1

    same = harbour.ask("m/clerk", max_tokens=8)
    assert answers[0].content[0].text == same["choices"][0]["message"]["content"]


def plain(block: Any) -> dict[str, Any]:
    """A block without the id of a call, which each answer has of its own."""
    fields: dict[str, Any] = block.to_dict()
    fields.pop("id", None)
    return fields


@pytest.mark.parametrize("question", ["hello", "weather?", "nothing"])
def test_a_stream_is_the_same_answer(client: anthropic.Anthropic, question: str) -> None:
    """Text, reasoning and calls; and its first event has the tokens of the request already."""
    asked: dict[str, Any] = {
        "model": "m/clerk",
        "messages": [{"role": "user", "content": question}],
        "tools": [WEATHER],
        "max_tokens": 300,
    }
    client.messages.create(**asked)  # then both find the same in memory
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    assert [plain(block) for block in streamed.content] == [plain(block) for block in whole.content]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.to_dict() == whole.usage.to_dict()

    (start,) = [event for event in events if event.type == "message_start"]
    assert start is events[0]
    counted = start.message.usage
    assert counted.input_tokens + counted.cache_read_input_tokens == (
        whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    )
    assert events[-1].type == "message_stop"


def test_tools_go_round(client: anthropic.Anthropic) -> None:
    """The client sends back what it got, thinking and all, with the result of the tool."""
    question = {"role": "user", "content": "weather?"}
    asked: dict[str, Any] = {"model": "m/clerk", "max_tokens": 300, "tools": [WEATHER]}
    first = client.messages.create(messages=[question], **asked)
    thinking, text, call, second = first.content
    assert (thinking.type, thinking.thinking) == ("thinking", "I should look.\n")
    assert text.text.strip() == "Let me see."
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Oslo"})
    assert first.stop_reason == "tool_use"
    assert call.id != second.id

    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": "-5 C"},
        {
            "type": "tool_result",
            "tool_use_id": second.id,
            "content": [{"type": "text", "text": "-5 C", "cache_control": HINT}],
        },
        {"type": "text", "text": "So?"},
    ]
    turns = [question, first.to_param(), {"role": "user", "content": results}]
    last = client.messages.create(messages=turns, **asked)
    assert last.content[0].text == "It is cold."
    assert last.stop_reason == "end_turn"
    assert last.usage.cache_read_input_tokens > first.usage.cache_read_input_tokens

    choice = {"type": "auto", "disable_parallel_tool_use": True}
    one = client.messages.create(messages=[question], tool_choice=choice, **asked)
    assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]

    none = client.messages.create(messages=[question], tool_choice={"type": "none"}, **asked)
    assert "<tool_call>" in none.content[-1].text


def test_a_call_can_be_demanded(harbour: Workspace, client: anthropic.Anthropic) -> None:
    """Any one, or one by its name; one that is not there is refused."""
    harbour.memory_model(script={"hello": '{"name": "weather", "arguments": {"city": "Bergen"}}'})
    harbour.hang_up()
    harbour.wait_settled()
    asked: dict[str, Any] = {
        "model": "m/clerk",
        "messages": HELLO,
        "max_tokens": 300,
        "tools": [WEATHER],
    }
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        (call,) = client.messages.create(tool_choice=choice, **asked).content
        assert (call.name, call.input) == ("weather", {"city": "Bergen"})
    with pytest.raises(anthropic.BadRequestError, match="one of weather"):
        client.messages.create(tool_choice={"type": "tool", "name": "moon"}, **asked)


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


def test_an_answer_by_a_schema(client: anthropic.Anthropic) -> None:
    """As the client's own `parse` asks for it."""
    asked = [{"role": "user", "content": "as JSON"}]
    answer = client.messages.parse(
        model="m/clerk", messages=asked, max_tokens=100, output_format=Weather
    )
    assert answer.parsed_output == Weather(city="Oslo", degrees=-5)


def test_tools_and_a_format_go_together(client: anthropic.Anthropic) -> None:
    """The model calls a tool, or answers in the format: each comes back as what it is."""
    asked: dict[str, Any] = {
        "model": "m",
        "max_tokens": 100,
        "tools": [WEATHER],
        "output_format": Weather,
    }
    by_name = [{"role": "user", "content": "by name"}]
    called = client.messages.parse(messages=by_name, **asked)
    (call,) = called.content
    assert (call.type, call.input, called.stop_reason) == ("tool_use", {"city": "Oslo"}, "tool_use")
    answer = client.messages.parse(messages=[{"role": "user", "content": "as JSON"}], **asked)
    assert answer.parsed_output == Weather(city="Oslo", degrees=-5)

    with client.messages.stream(messages=by_name, **asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.type, streamed.input) == (call.type, call.input)


def test_errors(client: anthropic.Anthropic) -> None:
    """Each is the client's own class for its status, in Anthropic's form."""
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="zzz", messages=HELLO, max_tokens=8)
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as long:
        client.messages.create(
            model="m", messages=[{"role": "user", "content": "x" * 9000}], max_tokens=8
        )
    assert long.value.body["type"] == "error"
    assert "context holds" in long.value.body["error"]["message"]
    with pytest.raises(anthropic.ConflictError):
        client.messages.create(model="m/clerk", system="Other.", messages=HELLO, max_tokens=8)
    with pytest.raises(anthropic.BadRequestError, match="top_k") as wrong:
        client.messages.create(model="m", messages=HELLO, max_tokens=8, extra_body={"top_k": -1})
    assert wrong.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="does not support count_tokens"):
        client.messages.count_tokens(model="m", messages=HELLO)


def test_what_a_hint_is_and_what_is_about_their_service(client: anthropic.Anthropic) -> None:
    """It changes nothing."""
    plain = client.messages.create(model="m/clerk", messages=HELLO, max_tokens=8)
    hinted = client.messages.create(
        model="m/clerk",
        messages=HELLO,
        max_tokens=8,
        cache_control=HINT,
        metadata={"user_id": "1"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "max"},
        extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"},
    )
    assert hinted.content == plain.content


def test_a_stream_that_waits_and_fails(workspace: Workspace) -> None:
    """Pings come first, which the client passes over; then an error is an event."""
    workspace.memory_model(prefill_us_per_token=1000)
    workspace.declare("{}")
    workspace.hurry(api__answering__SIGN_OF_LIFE_S=0.2)
    workspace.start()
    workspace.wait_settled()
    asked: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello " * 200}],
        "max_tokens": 4,
        "stream": True,
    }
    with (
        workspace.http() as http,
        http.stream("POST", "/v1/messages", json=asked) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line]
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds[:2] == ["ping", "ping"]
    assert kinds[kinds.count("ping")] == "message_start"
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [event["type"] for event in data] == kinds
    start = next(event for event in data if event["type"] == "message_start")
    assert start["message"]["usage"]["input_tokens"] > 1000

    other = {**asked, "messages": [{"role": "user", "content": "welcome " * 150}]}
    with client_of(workspace) as client:
        events = client.messages.create(**other)
        assert next(iter(events)).type == "message_start"
        list(events)

        third = {**asked, "messages": [{"role": "user", "content": "goodbye " * 150}]}
        events = client.messages.create(**third)
        for child in workspace.children():
            if "rkcached.worker.child" in child.cmdline():
                child.kill()
        with pytest.raises(anthropic.APIStatusError, match="worker"):
            list(events)


@pytest.mark.long
@pytest.mark.model
def test_on_a_real_model(workspace: Workspace, small_model: Any) -> None:
    """A named prompt is a hit, and a stream is the whole answer."""
    workspace.write("clerk.md", TEXT * 5)
    workspace.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: llamacpp}}\nmodels:\n  m:\n    path: {small_model}\n"
        "    params: {max_context_len: 2048}\n    prompts: {clerk: clerk.md}\n",
    )
    workspace.start()
    workspace.wait_state("clerk", "fresh", 120)
    asked: dict[str, Any] = {
        "model": "m/clerk",
        "messages": HELLO,
        "max_tokens": 12,
        "extra_body": {"temperature": 0},
    }
    with client_of(workspace) as client:
        client.messages.create(**asked)  # then both go on from the same state
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    assert streamed.content[0].text == whole.content[0].text
    assert whole.usage.cache_read_input_tokens >= workspace.prompt("clerk")["artifact"]["tokens"]
