"""The official client on a real model: tools, formats, log-probabilities, embeddings, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from conftest import Workspace

pytestmark = pytest.mark.model

SYSTEM = (
    "You are a clerk at a town's register. You answer with exactly what is asked for, and nothing "
    "else. " * 3
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)


@pytest.fixture(scope="module")
def register(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Workspace]:
    """A daemon with a prompt on the real model, and the same model once more, for embeddings."""
    space = Workspace(tmp_path_factory.mktemp("register"))
    space.write("clerk.md", SYSTEM)
    space.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n"
        "    chat_template: chatml\n"  # the model's own cannot show tools
        "    params: {max_context_len: 1024, max_new_tokens: 64, temperature: 0}\n"
        "    prompts: {clerk: clerk.md}\n"
        f"  vectors: {{path: {small_model}, embedding: true, pooling: mean, params: "
        "{max_context_len: 512, "
        "max_new_tokens: 8}}\n",
    )
    space.start()
    space.wait_state("clerk", "fresh")
    yield space
    assert space.stop() == 0
    assert "Traceback" not in space.log_text()


@pytest.fixture
def client(register: Workspace) -> Iterator[openai.OpenAI]:
    transport = httpx.HTTPTransport(verify=False, uds=str(register.socket))
    with httpx.Client(transport=transport, timeout=120) as http:
        yield openai.OpenAI(
            api_key="none", base_url="http://rkcached/v1", http_client=http, max_retries=0
        )


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_chat_and_stream(client: openai.OpenAI) -> None:
    """The prompt cache serves both, and both say the same."""
    asked = {
        "model": "m/clerk",
        "messages": user("What is a register?"),
        "max_tokens": 16,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks)
        == whole.choices[0].message.content
    )
    assert whole.rkcached["state"] == chunks[-1].rkcached["state"] == "hit"
    assert whole.usage.prompt_tokens_details.cached_tokens > 50


def test_json_schema(client: openai.OpenAI) -> None:
    """The client's own parse() gets its record.

    The engine was held to the schema, also from a prompt cache.
    """
    answer = client.chat.completions.parse(
        model="m/clerk",
        messages=user("Name one person and an age, as JSON."),
        response_format=Person,
        max_tokens=120,
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert answer.rkcached["state"] == "hit"  # type: ignore[attr-defined]


def test_json_object(client: openai.OpenAI) -> None:
    """Any object."""
    answer = client.chat.completions.create(
        model="m",
        messages=user('Answer with the JSON object {"ok": true}'),
        response_format={"type": "json_object"},
        max_tokens=200,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length" or isinstance(
        json.loads(choice.message.content or ""), dict
    )
    assert (choice.message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_the_engine_cannot_keep_to(
    client: openai.OpenAI, register: Workspace, *, stream: bool
) -> None:
    """llama.cpp would silently ignore it.

    It is refused before a word is said, and is not in the log.
    """
    impossible = {
        "type": "array",
        "items": {"type": "string", "const": "my-own-word"},
        "uniqueItems": True,
    }
    response_format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": impossible},
    }
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="m",
            messages=user("Say hello."),
            response_format=response_format,
            max_tokens=20,
            stream=stream,
        )
    assert (refused.value.code, refused.value.param) == ("invalid_schema", "response_format")
    assert "uniqueItems" in refused.value.message
    assert "my-own-word" not in register.log_text()
    assert client.chat.completions.create(
        model="m", messages=user("Say hello."), max_tokens=4
    ).choices


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own
def test_what_parse_returned_goes_back(client: openai.OpenAI) -> None:
    """The client's own objects are messages again."""
    messages = user("Name one person and an age, as JSON.")
    first = client.chat.completions.parse(
        model="m", messages=messages, response_format=Person, max_tokens=120
    )
    messages = [*messages, first.choices[0].message, *user("Thanks.")]
    assert (
        client.chat.completions.create(model="m", messages=messages, max_tokens=4)
        .choices[0]
        .message.content
    )


@pytest.mark.long
def test_tools_beside_a_format(client: openai.OpenAI) -> None:
    """llama.cpp writes either a call or the format, and nothing else; min_p beside it is taken."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"word": {"enum": ["yes", "no"]}},
        "type": "object",
        "properties": {"answer": {"$ref": "#/$defs/word"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    kind: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tools: Any = [WEATHER]
    seen = set()
    for seed in range(6):
        answer = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Is it raining?"}],
            tools=tools,
            response_format=kind,
            max_tokens=80,
            temperature=2.0,
            seed=seed,
            extra_body={"min_p": 0.01},
        )
        (choice,) = answer.choices
        if choice.message.tool_calls:
            (call,) = choice.message.tool_calls
            assert call.type == "function"
            assert isinstance(json.loads(call.function.arguments), dict)
        elif choice.finish_reason == "stop":
            assert json.loads(choice.message.content or "")["answer"] in ("yes", "no")
        seen.add(choice.finish_reason)
    assert seen & {"stop", "tool_calls"}


def test_tools(client: openai.OpenAI) -> None:
    """A demanded call, whole and streamed.

    The conversation that goes on with the tool's result.
    """
    messages = user("What is the weather in Oslo?")
    asked: Any = {"model": "m", "tools": [WEATHER], "tool_choice": "required", "max_tokens": 80}
    choice = client.chat.completions.create(messages=messages, **asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **asked))
    (streamed,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert streamed.function.arguments == call.function.arguments
    messages = [
        *messages,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "4 degrees, rain"},
    ]
    answer = client.chat.completions.create(
        model="m", messages=messages, tools=[WEATHER], max_tokens=24
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_the_model_may_decide_to_call(client: openai.OpenAI) -> None:
    """With tool_choice auto, what the model writes between tags is a call."""
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
    shown: Any = []
    for city in ("Rome", "Paris", "Lima"):
        shown += [*user(f"Weather in {city}?"), {"role": "assistant", "content": call % city}]
    shown += user("Weather in Oslo?")
    answer = client.chat.completions.create(
        model="m", messages=shown, tools=[WEATHER], max_tokens=60
    )
    calls = answer.choices[0].message.tool_calls or []
    assert [c.function.name for c in calls if c.type == "function"] == ["get_weather"]


def test_logprobs(client: openai.OpenAI) -> None:
    """Of each token, and of the likeliest; greedy takes the likeliest one."""
    answer = client.chat.completions.create(
        model="m", messages=user("Say hello."), max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
    older = client.completions.create(
        model="m", prompt="One, two, three,", max_tokens=4, logprobs=2
    )
    listed = older.choices[0].logprobs
    assert listed is not None
    assert len(listed.tokens or ()) == len(listed.token_logprobs or ()) == 4
    assert "".join(listed.tokens or ()) == older.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    """Texts that mean the like are nearer than others; tokens work; each vector has length 1."""
    texts = [
        "The cat sleeps on the sofa.",
        "A cat is sleeping on a couch.",
        "def main(): return 42",
    ]
    made = client.embeddings.create(model="vectors", input=texts)
    cat, couch, code = (item.embedding for item in made.data)
    assert math.hypot(*cat) == pytest.approx(1, abs=1e-4)
    assert sum(a * b for a, b in zip(cat, couch, strict=True)) > sum(
        a * b for a, b in zip(cat, code, strict=True)
    )
    assert made.usage.prompt_tokens > 15
    again = client.embeddings.create(model="vectors", input=texts[0], encoding_format="float")
    assert again.data[0].embedding == pytest.approx(cat, abs=1e-5)
    assert len(client.embeddings.create(model="vectors", input=[1, 2, 3]).data[0].embedding) == len(
        cat
    )
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="vectors", input=[999_999])
    assert refused.value.param == "input"


def test_errors(client: openai.OpenAI) -> None:
    """Too long for the context: OpenAI's code."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="m", messages=user("word " * 2000))
    assert refused.value.code == "context_length_exceeded"
