"""The official client, which we did not write, over the socket: only its transport is changed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from conftest import Workspace


@pytest.fixture
def client(two_prompts: Workspace) -> Iterator[openai.OpenAI]:
    transport = httpx.HTTPTransport(verify=False, uds=str(two_prompts.socket))
    with httpx.Client(transport=transport) as http:
        yield openai.OpenAI(
            api_key="none", base_url="http://rkcached/v1", http_client=http, max_retries=0
        )


def test_chat(client: openai.OpenAI, two_prompts: Workspace) -> None:
    """An answer with usage, and how many tokens came from the cache."""
    answer = client.chat.completions.create(
        model="m/a",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        temperature=0,
        seed=1,
        stop=["zzz"],
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (
        answer.usage.prompt_tokens_details.cached_tokens
        == two_prompts.prompt("a")["artifact"]["tokens"]
    )


def test_stream(client: openai.OpenAI) -> None:
    """The same text in pieces, with the usage at the end if asked for."""
    question = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    whole = client.chat.completions.create(
        model="m/a", messages=question, max_tokens=8, temperature=0
    )  # type: ignore[call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="m/a",
        messages=question,
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8


def test_completions(client: openai.OpenAI) -> None:
    """The older endpoint."""
    answer = client.completions.create(model="m", prompt="Once upon a time", max_tokens=5)
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_models(client: openai.OpenAI) -> None:
    """Models and their prompts, each retrievable."""
    assert [model.id for model in client.models.list()] == ["m", "m/a", "m/b"]
    assert client.models.retrieve("m").id == "m"


def test_errors(client: openai.OpenAI) -> None:
    """Each is the client's own class for its status, with code and param."""
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="zzz", messages=hello)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="m", messages=hello, logit_bias={"1": 1})  # type: ignore[arg-type]
    assert (unsupported.value.code, unsupported.value.param) == (
        "unsupported_parameter",
        "logit_bias",
    )
    with pytest.raises(openai.BadRequestError) as several:
        client.chat.completions.create(model="m", messages=hello, n=2)  # type: ignore[arg-type]
    assert several.value.param == "n"
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(
            model="m/a", messages=[{"role": "system", "content": "Other."}, *hello]
        )  # type: ignore[arg-type,list-item]
