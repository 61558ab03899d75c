"""OpenAI's Responses, by clients that we did not write: OpenAI's, its agents, and Pydantic AI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import httpx2
import openai
import pydantic
import pytest
from conftest import Workspace

from tests.system.harbour import TEXT
from tests.waiting import DEADLINE_S

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": PARAMETERS,
    "strict": True,
}


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


def client_of(space: Workspace) -> openai.OpenAI:
    http = httpx.Client(transport=httpx.HTTPTransport(uds=str(space.socket)), timeout=DEADLINE_S)
    return openai.OpenAI(
        api_key="none", base_url="http://rkcached/v1", http_client=http, max_retries=0
    )


def async_client_of(space: Workspace) -> openai.AsyncOpenAI:
    transport = httpx2.AsyncHTTPTransport(uds=str(space.socket))
    http = httpx2.AsyncClient(transport=transport, timeout=DEADLINE_S)
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://rkcached/v1", http_client=http, max_retries=0
    )


@pytest.fixture
def client(harbour: Workspace) -> Iterator[openai.OpenAI]:
    with client_of(harbour) as opened:
        yield opened


def test_a_declared_prompt_is_a_hit(harbour: Workspace, client: openai.OpenAI) -> None:
    """By its name, by the instructions, and by an item."""
    tokens = harbour.prompt("clerk")["artifact"]["tokens"]
    ways: list[dict[str, Any]] = [
        {"model": "m/clerk", "input": "hello"},
        {"model": "m", "instructions": TEXT, "input": "hello"},
        {
            "model": "m",
            "input": [
                {"role": "developer", "content": [{"type": "input_text", "text": TEXT}]},
                {"role": "user", "content": "hello"},
            ],
        },
    ]
    answers = [client.responses.create(max_output_tokens=8, **way) for way in ways]
    for answer in answers:
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage.input_tokens_details.cached_tokens >= tokens
        assert answer.usage.output_tokens == 8
        assert answer.rkcached["state"] == "hit"
    assert len({answer.output_text for answer in answers}) == 1
    same = harbour.ask("m/clerk", max_tokens=8)
    assert answers[0].output_text == same["choices"][0]["message"]["content"]


def without_ids(value: Any) -> Any:
    """Each answer has ids of its own."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key not in IDS}
    return value


IDS = {"id", "call_id", "item_id", "parsed", "parsed_arguments"}


@pytest.mark.parametrize("question", ["hello", "weather?", "nothing"])
def test_a_stream_is_the_same_answer(client: openai.OpenAI, question: str) -> None:
    """Its events are numbered, and each item of the end is what its events told."""
    asked: dict[str, Any] = {
        "model": "m/clerk",
        "input": question,
        "tools": [WEATHER],
        "max_output_tokens": 300,
    }
    client.responses.create(**asked)  # then both find the same in memory
    whole = client.responses.create(**asked)
    events = list(client.responses.create(stream=True, **asked))
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert without_ids([item.to_dict() for item in last.response.output]) == without_ids(
        [item.to_dict() for item in whole.output]
    )
    assert last.response.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]

    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in last.response.output]
    told = {"text": "", "call": "", "thought": ""}
    for event in events:
        if event.type == "response.output_text.delta":
            told["text"] += event.delta
        elif event.type == "response.function_call_arguments.delta":
            told["call"] += event.delta
        elif event.type == "response.reasoning_text.delta":
            told["thought"] += event.delta
    assert told["text"] == whole.output_text
    assert told["call"] == "".join(i.arguments for i in done if i.type == "function_call")
    assert told["thought"] == "".join(i.content[0].text for i in done if i.type == "reasoning")

    with client.responses.stream(**asked) as stream:  # the client puts it together itself
        for _ in stream:
            pass
        if whole.status == "completed":
            assert stream.get_final_response().output_text == whole.output_text


def test_tools_go_round(client: openai.OpenAI) -> None:
    """The client sends back all items that it got, with the results of the calls."""
    question: Any = {"role": "user", "content": "weather?"}
    asked: dict[str, Any] = {"model": "m/clerk", "tools": [WEATHER], "store": False}
    first = client.responses.create(input=[question], **asked)
    thought, text, call, second = first.output
    assert thought.content[0].text == "I should look.\n"
    assert text.content[0].text.strip() == "Let me see."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
    assert call.call_id != second.call_id

    results = [
        {"type": "function_call_output", "call_id": each.call_id, "output": "-5 C"}
        for each in (call, second)
    ]
    replayed = [item.to_dict() for item in first.output]
    last = client.responses.create(input=[question, *replayed, *results], **asked)
    assert (last.output_text, last.status) == ("It is cold.", "completed")
    cached = last.usage.input_tokens_details.cached_tokens
    assert cached > first.usage.input_tokens_details.cached_tokens

    one = client.responses.create(input=[question], parallel_tool_calls=False, **asked)
    assert [item.type for item in one.output] == ["reasoning", "message", "function_call"]


def test_an_answer_by_a_schema(client: openai.OpenAI) -> None:
    """As the client's own `parse` asks for it."""
    answer = client.responses.parse(model="m/clerk", input="as JSON", text_format=Weather)
    assert answer.output_parsed == Weather(city="Oslo", degrees=-5)


def test_tools_and_a_format_go_together(client: openai.OpenAI) -> None:
    """The model calls a tool, or answers in the format: each comes back as what it is."""
    asked: dict[str, Any] = {"model": "m", "tools": [WEATHER], "text_format": Weather}
    (call,) = client.responses.parse(input="by name", **asked).output
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"city": "Oslo"})
    answer = client.responses.parse(input="as JSON", **asked)
    assert answer.output_parsed == Weather(city="Oslo", degrees=-5)

    with client.responses.stream(input="by name", **asked) as stream:
        (streamed,) = stream.get_final_response().output
    assert (streamed.type, streamed.arguments) == ("function_call", call.arguments)


def test_errors(client: openai.OpenAI) -> None:
    """Each is the client's own class for its status, and names the parameter of this interface."""
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="zzz", input="hello")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model="m", input="x" * 9000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as kept:
        client.responses.create(model="m", input="x", previous_response_id="resp_1")
    assert kept.value.param == "previous_response_id"
    with pytest.raises(openai.ConflictError):
        client.responses.create(model="m/clerk", instructions="Other.", input="hello")
    form: Any = {"type": "json_schema", "name": "n", "schema": {"type": "wrong"}}
    with pytest.raises(openai.BadRequestError) as invalid:
        client.responses.create(model="m", input="x", text={"format": form})
    assert (invalid.value.code, invalid.value.param) == ("invalid_schema", "text.format")
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="keeps no responses"):
            ask("resp_1")


def test_a_stream_that_waits_and_fails(workspace: Workspace) -> None:
    """It begins at once, then comments come; an error is the response's failure."""
    workspace.memory_model(prefill_us_per_token=1000)
    workspace.declare("{}")
    workspace.hurry(api__answering__SIGN_OF_LIFE_S=0.2)
    workspace.start()
    workspace.wait_settled()
    asked: dict[str, Any] = {
        "model": "m",
        "input": "hello " * 200,
        "max_output_tokens": 4,
        "stream": True,
    }
    with (
        workspace.http() as http,
        http.stream("POST", "/v1/responses", json=asked) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line and not line.startswith("data:")]
    assert lines[:3] == ["event: response.created", "event: response.in_progress", ": waiting"]
    assert lines[-1] == "event: response.incomplete"

    with client_of(workspace) as client:
        events = iter(client.responses.create(**{**asked, "input": "goodbye " * 150}))
        assert next(events).type == "response.created"
        for child in workspace.children():
            if "rkcached.worker.child" in child.cmdline():
                child.kill()
        *_, last = events
    assert last.type == "response.failed"
    assert last.response.error.code == "server_error"
    assert "worker" in last.response.error.message


def test_agents_with_their_defaults(harbour: Workspace) -> None:
    """OpenAI's agents run a tool and get the answer, whole and as a stream."""
    import agents  # two seconds, which each of the processes that run tests would pay

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"-5 C in {city}"

    agents.set_tracing_disabled(disabled=True)
    agent = agents.Agent(name="clerk", instructions=TEXT, model="m", tools=[weather])

    async def run() -> tuple[Any, Any]:
        async with async_client_of(harbour) as client:
            agents.set_default_openai_client(client, use_for_tracing=False)
            whole = await agents.Runner.run(agent, "weather?")
            streamed = agents.Runner.run_streamed(agent, "weather?")
            async for _ in streamed.stream_events():
                pass
            return whole, streamed

    whole, streamed = asyncio.run(run())
    assert whole.final_output == streamed.final_output == "It is cold."
    tokens = harbour.prompt("clerk")["artifact"]["tokens"]
    assert whole.context_wrapper.usage.input_tokens_details.cached_tokens > tokens


@pytest.mark.parametrize("question", ["hello", "by a call"])
def test_pydantic_ai_with_its_defaults(harbour: Workspace, question: str) -> None:
    """A text; and an object, which it demands as a call of a tool of its own."""
    import pydantic_ai  # as above
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    output: Any = Weather if question == "by a call" else str

    async def run() -> Any:
        async with async_client_of(harbour) as client:
            model = OpenAIResponsesModel("m", provider=OpenAIProvider(openai_client=client))
            agent = pydantic_ai.Agent(model, instructions=TEXT.strip(), output_type=output)
            return await agent.run(question, model_settings={"max_tokens": 200})

    result = asyncio.run(run())
    if output is Weather:
        assert result.output == Weather(city="Oslo", degrees=-5)
    else:
        assert result.output


@pytest.mark.long
@pytest.mark.model
def test_on_a_real_model(workspace: Workspace, small_model: Any) -> None:
    """A named prompt is reused, and a stream is the whole answer."""
    workspace.write("clerk.md", TEXT * 5)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n"
        f"  m:\n    path: {small_model}\n"
        "    params: {max_context_len: 2048}\n    prompts: {clerk: clerk.md}\n",
    )
    workspace.start()
    workspace.wait_state("clerk", "fresh", 120)
    asked: dict[str, Any] = {
        "model": "m/clerk",
        "input": "hello",
        "max_output_tokens": 12,
        "temperature": 0,
    }
    with client_of(workspace) as client:
        client.responses.create(**asked)  # then both go on from the same state
        whole = client.responses.create(**asked)
        *_, last = client.responses.create(stream=True, **asked)
    assert whole.output_text
    assert last.response.output_text == whole.output_text
    cached = whole.usage.input_tokens_details.cached_tokens
    assert cached >= workspace.prompt("clerk")["artifact"]["tokens"]
