"""Ollama's own clients, which we did not write, and requests as programs that use it send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from conftest import Workspace

from rkcached.api.ollama.requests import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    Options,
    known_name,
)
from rkcached.errors import RequestError

TOOL = {
    "type": "function",
    "function": {
        "name": "turn_on",
        "description": "Turns a lamp on.",
        "parameters": {
            "type": "object",
            "properties": {"lamp": {"type": "string"}},
            "required": ["lamp"],
        },
    },
}
CALL = '<tool_call>\n{"name": "turn_on", "arguments": {"lamp": "desk"}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    workspace.memory_model(
        script={"the lamp": CALL, "ponder": "<think>\nHmm.\n</think>\n\nYes.", "as JSON": '{"a":1}'}
    )
    workspace.memory_model("v.model")
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare(
        "{a: a.md}",
        model="  v: {path: v.model, embedding: true}\n  qwen3-0.6b: {path: m.model}\n",
    )
    workspace.start()
    workspace.wait_state("a", "fresh")
    return workspace


@pytest.fixture
def client(space: Workspace) -> Iterator[ollama.Client]:
    """The client over the socket: only its transport is changed."""
    client = ollama.Client(host="http://localhost:11434")
    client._client.close()
    transport = httpx.HTTPTransport(uds=str(space.socket))
    with httpx.Client(transport=transport, base_url="http://localhost:11434") as http:
        client._client = http
        yield client


def raw(space: Workspace, path: str, **body: Any) -> httpx.Response:
    return space.request("POST", path, json=body)


def test_a_chat_is_a_hit(client: ollama.Client, space: Workspace) -> None:
    """A prompt by its name, with a tag; a stream and a whole answer say the same."""
    whole = client.chat("m/a:latest", HELLO, options={"temperature": 0, "num_predict": 8})
    assert whole.message.content
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 8)
    assert whole.total_duration > whole.prompt_eval_duration >= 0
    pieces = list(
        client.chat("m/a", HELLO, stream=True, options={"temperature": 0, "num_predict": 8})
    )
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].eval_count == 8

    body = {"model": "m/a", "messages": HELLO, "stream": False}
    report = raw(space, "/api/chat", **body).json()["rkcached"]
    assert (report["state"], report["cache"]) == ("hit", "a")


def test_the_declared_system_message_is_a_hit(client: ollama.Client, space: Workspace) -> None:
    """Also where it comes as a parameter of its own."""
    del client
    asked = {"model": "m", "system": "You are prompt A.", "prompt": "hello", "stream": False}
    answered = raw(space, "/api/generate", **asked).json()
    assert answered["rkcached"]["state"] == "hit"
    assert answered["response"]


def test_text(client: ollama.Client) -> None:
    """With the template, and without it."""
    for raw_text in (False, True):
        whole = client.generate("m", "hello", raw=raw_text, options={"num_predict": 4, "seed": 1})
        pieces = list(
            client.generate(
                "m", "hello", raw=raw_text, stream=True, options={"num_predict": 4, "seed": 1}
            )
        )
        assert whole.response == "".join(piece.response for piece in pieces)


def test_tools_round_trip(client: ollama.Client) -> None:
    """A call comes as an object, and its result goes back by its name, or by its order."""
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Turn on the lamp"}]
    answered = client.chat("m", asked, tools=[TOOL])
    (call,) = answered.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("turn_on", {"lamp": "desk"})
    (streamed,) = [
        call
        for piece in client.chat("m", asked, tools=[TOOL], stream=True)
        for call in piece.message.tool_calls or ()
    ]
    assert streamed == call
    for names in ({"tool_name": "turn_on"}, {}):
        result = {"role": "tool", "content": "done", **names}
        after = client.chat("m", [*asked, answered.message, result], tools=[TOOL])
        assert after.message.content is not None


def test_thinking(client: ollama.Client) -> None:
    answered = client.chat("m", [{"role": "user", "content": "ponder"}], think=True)
    assert (answered.message.thinking or "").strip() == "Hmm."
    assert (answered.message.content or "").strip() == "Yes."
    text = client.generate("m", "ponder", think=True)
    assert (text.thinking or "").strip() == "Hmm."


def test_formats(client: ollama.Client) -> None:
    asked = [{"role": "user", "content": "Answer as JSON"}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for form in ("json", schema):
        answered = client.chat("m", asked, format=form)
        assert json.loads(answered.message.content or "") == {"a": 1}


def test_models(client: ollama.Client) -> None:
    """Those that are declared, each prompt beside its model; and those that are loaded."""
    listed = client.list().models
    assert [model.model for model in listed] == [
        *("m:latest", "v:latest", "qwen3-0.6b:latest"),
        "m/a:latest",
    ]
    assert all((model.size or 0) > 0 and model.digest and model.modified_at for model in listed)
    client.chat("m", HELLO)
    (loaded,) = client.ps().models
    assert (loaded.model, loaded.context_length) == ("m:latest", 4096)
    shown = client.show("m:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert client.show("v").capabilities == ["embedding"]


def test_vectors(client: ollama.Client) -> None:
    both = client.embed("v", ["hello", "world"])
    one = client.embeddings("v", "hello")
    assert len(both.embeddings) == 2
    assert list(both.embeddings[0]) == list(one.embedding)
    assert sum(number * number for number in one.embedding) == pytest.approx(1, abs=1e-4)


def test_a_request_without_words_loads_the_model(client: ollama.Client, space: Workspace) -> None:
    """So programs warm a model up."""
    assert client.ps().models[0].model == "m:latest"
    assert client.generate("qwen3:0.6b").done_reason == "load"
    assert client.chat("m", []).done_reason == "load"
    states = {model["name"]: model["worker"] for model in space.status()["models"]}
    assert states["qwen3-0.6b"] == "ready"


def test_what_cannot_be_is_said_and_not_refused(space: Workspace) -> None:
    """As Home Assistant and Open WebUI send it: what is about Ollama's own memory."""
    answered = raw(
        space,
        "/api/chat",
        model="m/a",
        messages=HELLO,
        stream=False,
        keep_alive=-1,
        options={"num_ctx": 8192, "temperature": 0.5, "mirostat": 0, "num_predict": -1},
        think=None,
    )
    assert answered.status_code == 200
    ignored = answered.json()["rkcached"]["ignored"]
    assert ignored == ["options.num_ctx", "options.mirostat", "keep_alive"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/chat", {"model": "nobody", "messages": HELLO}, 404, "'nobody' does not exist"),
        ("/api/chat", {"messages": HELLO}, 400, "model is missing"),
        (
            "/api/chat",
            {"model": "m", "messages": [{"role": "user", "content": "?", "images": ["aGk="]}]},
            400,
            "messages[0].images: models here read text only",
        ),
        ("/api/generate", {"model": "m", "prompt": "a", "suffix": "b"}, 400, "suffix: it is not"),
        ("/api/chat", {"model": "m", "messages": HELLO, "format": "xml"}, 400, "format: it is"),
        ("/api/embed", {"model": "v", "input": "a", "dimensions": 3}, 400, "dimensions"),
        ("/api/pull", {"model": "llama3"}, 403, "models are declared in the manifest"),
    ],
)
def test_refusals(
    space: Workspace, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    """In Ollama's form, which its clients show."""
    refused = raw(space, path, **body)
    assert refused.status_code == status
    assert list(refused.json()) == ["error"]
    assert words in refused.json()["error"]


def test_the_client_s_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as caught:
        client.chat("nobody", HELLO)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="models are declared in the manifest"):
        client.pull("llama3")
    with pytest.raises(ollama.ResponseError, match="models are declared in the manifest"):
        client.delete("m")


def test_the_version_is_one_that_programs_take(space: Workspace) -> None:
    told = space.request("GET", "/api/version").json()
    assert tuple(map(int, told["version"].split("."))) >= (0, 6, 4)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("m", "m"),
        ("m:latest", "m"),
        ("m/a:latest", "m/a"),
        ("qwen3:0.6b", "qwen3-0.6b"),
        ("qwen3:7b", "qwen3:7b"),
        ("", ""),
    ],
)
def test_names(name: str, known: str) -> None:
    assert known_name(name, {"m", "m/a", "qwen3-0.6b"}) == known


def test_options_are_ours_by_another_name() -> None:
    options = Options.model_validate(
        {"num_predict": 5, "top_k": 3, "stop": ["x"], "tfs_z": 0.1, "numa": None, "seed": 4.0}
    )
    assert options.parameters() == {"max_tokens": 5, "top_k": 3, "stop": ["x"], "seed": 4}
    assert list(options.unknown()) == ["tfs_z"]
    assert Options.model_validate({"num_predict": -2, "stop": []}).parameters() == {}


def test_results_find_their_calls() -> None:
    """By id, by name, or by their order: OpenAI's template needs the ids."""
    calls = [{"function": {"name": name, "arguments": {"n": at}}} for at, name in enumerate("abab")]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_name": "b"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3", "tool_name": "b"},
        {"role": "tool", "content": "4", "tool_name": "unheard of"},
    ]
    body = OllamaChatRequest.model_validate({"model": "m", "messages": messages})
    internal = body.internal("m")
    ids = [message.tool_call_id for message in internal.messages[1:]]  # type: ignore[union-attr]
    assert ids == ["call_2", "call_1", "call_4", "call_0"]


def test_a_bad_role_is_the_client_s_mistake() -> None:
    body = OllamaChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "pirate", "content": "arr"}]}
    )
    with pytest.raises(RequestError, match="messages"):
        body.internal("m")
    with pytest.raises(RequestError):
        OllamaGenerateRequest.model_validate(
            {"model": "m", "prompt": "a", "options": {"temperature": 99.0}}
        ).internal("m")
