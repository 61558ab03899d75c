"""What an answer may contain beside text, on a model whose answers are written in its file."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from conftest import Workspace

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object", "required": ["n"]}},
}


def says(
    space: Workspace, script: dict[str, str], *, template: str = "chatml", **more: Any
) -> Workspace:
    """A daemon whose model `m` answers what the script says."""
    space.memory_model(script=script)
    space.declare("{}", model=f"    chat_template: {template}", **more)
    space.start()
    return space


def choice(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]
    return found


def deltas(space: Workspace, **body: Any) -> tuple[list[dict[str, Any]], str]:
    """What a stream adds to the message, piece by piece, and why it ended."""
    body = {"model": "m", "messages": HELLO, "max_tokens": 200, "stream": True, **body}
    with (
        space.http() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        events = [
            json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")
        ]
    assert all("error" not in event for event in events), events
    return [choice(event)["delta"] for event in events], choice(events[-1])["finish_reason"]


def test_reasoning_is_not_content(workspace: Workspace) -> None:
    """What a model thinks goes into reasoning_content, whole and streamed."""
    space = says(workspace, {"hello": "<think>\nthey greet</think>\n\nGood day"})
    message = choice(space.ask("m", max_tokens=200))["message"]
    assert message == {
        "role": "assistant",
        "content": "Good day",
        "reasoning_content": "they greet",
    }
    pieces, finish = deltas(space)
    assert "".join(piece.get("reasoning_content", "") for piece in pieces) == "they greet"
    assert "".join(piece.get("content", "") for piece in pieces) == "Good day"
    assert (pieces[0]["role"], finish) == ("assistant", "stop")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("chatml", f"I look it up.<tool_call>\n{CALL}\n</tool_call>"),
        ("llama3", CALL.replace("arguments", "parameters")),
    ],
)
def test_tool_calls(workspace: Workspace, template: str, said: str) -> None:
    """Both styles become tool_calls, whole and streamed.

    The tool's result goes back to the model.
    """
    space = says(workspace, {"hello": said, "-5 C": "Cold."}, template=template)
    answer = choice(space.ask("m", max_tokens=200, tools=[WEATHER]))
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert answer["message"]["content"] == ("I look it up." if template == "chatml" else None)
    pieces, finish = deltas(space, tools=[WEATHER])
    (streamed,) = [call for piece in pieces for call in piece.get("tool_calls", ())]
    assert (streamed["index"], streamed["function"], finish) == (0, call["function"], "tool_calls")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "-5 C"}
    messages = [*HELLO, answer["message"], result]
    assert (
        choice(space.ask("m", messages=messages, tools=[WEATHER]))["message"]["content"] == "Cold."
    )


def test_without_tools_a_call_is_text(workspace: Workspace) -> None:
    """tool_choice none, or no tools at all: nothing is parsed.

    One call is what parallel_tool_calls false gives.
    """
    said = f"<tool_call>{CALL}</tool_call>"
    space = says(workspace, {"hello": said + said})
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert choice(space.ask("m", max_tokens=200, **body))["message"]["content"] == said + said
    both = choice(space.ask("m", max_tokens=200, tools=[WEATHER]))["message"]["tool_calls"]
    one = choice(space.ask("m", max_tokens=200, tools=[WEATHER], parallel_tool_calls=False))[
        "message"
    ]["tool_calls"]
    assert (len(both), len(one)) == (2, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_cannot_be_bound_is_asked_once_more(
    workspace: Workspace, *, stream: bool
) -> None:
    """The first answer does not fit; the model is told why and what is wanted; the second one does.

    Nothing leaks.
    """
    space = says(workspace, {"hello": "sure, here it is", "JSON schema": '```json\n{"n": 1}\n```'})
    if stream:
        pieces, _ = deltas(space, response_format=FORMAT)
        text = "".join(piece.get("content", "") for piece in pieces)
    else:
        text = choice(space.ask("m", max_tokens=200, response_format=FORMAT))["message"]["content"]
    assert json.loads(text) == {"n": 1}
    space.logged("asked again")
    assert "sure, here it is" not in space.log_text()


@pytest.mark.parametrize("said", ["never JSON", '{"m": 1}', '{"n": '])
def test_an_answer_that_never_fits_is_an_error(workspace: Workspace, said: str) -> None:
    """422 that says what is wrong with it, before anything was streamed; the next request works."""
    space = says(workspace, {"hello": said})
    for stream in (False, True):
        error = space.ask("m", status=422, max_tokens=200, response_format=FORMAT, stream=stream)[
            "error"
        ]
        assert error["code"] == "answer_does_not_fit"
        assert "JSON" in error["message"] or "'n' is a required property" in error["message"]
    assert choice(space.ask("m", max_tokens=200))["message"]["content"] == said


def test_a_tool_can_be_demanded(workspace: Workspace) -> None:
    """By `required`, or by its name."""
    space = says(workspace, {"hello": CALL})
    for wanted in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = choice(space.ask("m", max_tokens=200, tools=[WEATHER], tool_choice=wanted))
        assert answer["message"]["tool_calls"][0]["function"] == {
            "name": "weather",
            "arguments": '{"city": "Oslo"}',
        }
        assert answer["message"]["content"] is None


@pytest.mark.parametrize("form", [FORMAT, {"type": "json_object"}])
def test_tools_and_a_format_go_together(workspace: Workspace, form: dict[str, Any]) -> None:
    """The model calls a tool, or answers in the format: each comes back as what it is."""
    reply = '{"n": 1, "name": "weather"}'
    space = says(workspace, {"hello": CALL, "-5 C": reply, "never": "sure"})

    asked = {"max_tokens": 200, "tools": [WEATHER], "response_format": form}
    called = choice(space.ask("m", **asked))
    (call,) = called["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert called["finish_reason"] == "tool_calls"

    result = {"role": "tool", "tool_call_id": call["id"], "content": "-5 C"}
    answer = choice(space.ask("m", messages=[*HELLO, called["message"], result], **asked))
    assert (answer["message"]["content"], answer["finish_reason"]) == (reply, "stop")

    pieces, finish = deltas(space, tools=[WEATHER], response_format=form)
    (streamed,) = [call for piece in pieces for call in piece.get("tool_calls", ())]
    assert (streamed["function"], finish) == (call["function"], "tool_calls")
    error = space.ask("m", "never", status=422, **asked)["error"]
    assert error["code"] == "answer_does_not_fit"


@pytest.mark.parametrize("wanted", ["required", {"type": "function", "function": {"name": "go"}}])
def test_references_in_the_parameters_of_a_demanded_tool(workspace: Workspace, wanted: Any) -> None:
    """They lead inside the parameters, as they were written.

    Wherever these stand in the schema of the call.
    """
    place = {
        "$defs": {"city": {"enum": ["Oslo"]}},
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
    }
    tools = [WEATHER, {"type": "function", "function": {"name": "go", "parameters": place}}]
    space = says(workspace, {"hello": '{"name": "go", "arguments": {"city": "Oslo"}}'})
    answer = choice(space.ask("m", max_tokens=200, tools=tools, tool_choice=wanted))
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "go"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "no"}},
                }
            },
            "response_format",
            "invalid_schema",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_parameter",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_parameter"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.tool_call_id",
            "missing_parameter",
        ),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages.0", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content.0",
            "invalid_value",
        ),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        ({"stop": list("abcdefghijklmnopqrstuvwxyzABCDEFG")}, "stop", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value"),
    ],
)
def test_refusals_name_the_parameter(
    two_prompts: Workspace, body: dict[str, Any], param: str, code: str
) -> None:
    """400 with OpenAI's param and code."""
    error = two_prompts.ask("m", status=400, **body)["error"]
    assert (error["param"], error["code"]) == (param, code), error


HALF = '{"a": "\\ud800"}'


def test_half_a_character_in_arguments(workspace: Workspace) -> None:
    """It comes from a model as the escape that it was, and goes back to it as the same text.

    Neither is a crash, or in the log.
    """
    space = says(
        workspace, {"hello": f'<tool_call>{{"name": "weather", "arguments": {HALF}}}</tool_call>'}
    )
    call = {"id": "1", "type": "function", "function": {"name": "g", "arguments": HALF}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]
    space.ask("m", messages=messages)
    (said,) = choice(space.ask("m", max_tokens=200, tools=[WEATHER]))["message"]["tool_calls"]
    assert said["function"]["arguments"] == HALF
    pieces, _ = deltas(space, tools=[WEATHER])
    assert [
        c["function"]["arguments"] for piece in pieces for c in piece.get("tool_calls", ())
    ] == [HALF]
    assert "ud800" not in space.log_text()


def test_an_engine_that_cannot_be_bound_may_think_and_call_as_it_learned(
    workspace: Workspace,
) -> None:
    """Its answer is looked at without the reasoning.

    Without the tags that its template asks for.
    """
    script = {
        "think": '<think>\nhm\n</think>\n\n{"n": 1}',
        "call": f"<tool_call>\n{CALL}\n</tool_call>",
    }
    space = says(workspace, script)
    think = choice(space.ask("m", "think", max_tokens=200, response_format={"type": "json_object"}))
    assert json.loads(think["message"]["content"]) == {"n": 1}
    call = choice(space.ask("m", "call", max_tokens=200, tools=[WEATHER], tool_choice="required"))
    assert call["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_a_demanded_call_in_the_words_of_llama(workspace: Workspace) -> None:
    """It says parameters, not arguments."""
    space = says(workspace, {"hello": CALL.replace("arguments", "parameters")}, template="llama3")
    call = choice(space.ask("m", max_tokens=200, tools=[WEATHER], tool_choice="required"))
    assert call["message"]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
    }


def test_what_contradicts_itself_is_refused(two_prompts: Workspace) -> None:
    """Two words for one thing that say different things, and a body that is compressed."""
    for body in (
        {"cache": "a", "use_cache": "b"},
        {"cache": False, "use_cache": "b"},
        {"top_logprobs": 2},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ):
        assert two_prompts.ask("m", status=400, **body)["error"]["code"] == "invalid_value"
    assert two_prompts.ask("m/", status=404)["error"]["code"] == "prompt_not_found"
    assert two_prompts.ask("m", status=404, use_cache="zzz")["error"]["param"] == "use_cache"
    with two_prompts.http() as client:
        refused = client.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            415,
            "unsupported_encoding",
        )
        assert client.post("/v1/chat/complete", content=b"x").status_code == 404


def test_a_template_that_cannot_show_tools_refuses_them(workspace: Workspace) -> None:
    """Never silence: the model would not have seen them."""
    space = says(workspace, {}, template="phi3")
    error = space.ask("m", status=400, tools=[WEATHER])["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")


MISTRAL = """\
{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{% for message in messages %}
[{{ message.role }}]{{ message.content }}
{% for call in message.tool_calls or [] %}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}
</s>
{% endfor %}
[assistant]
"""


def test_calls_come_back_as_the_template_writes_them(workspace: Workspace) -> None:
    """Of a template that somebody else wrote, rendered in another process."""
    workspace.write("own.jinja", MISTRAL)
    said = 'Let me see.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]weather[ARGS]{}'
    space = says(workspace, {"hello": said}, template="own.jinja")
    answer = choice(space.ask("m", max_tokens=200, tools=[WEATHER]))
    calls = [call["function"] for call in answer["message"]["tool_calls"]]
    assert answer["message"]["content"] == "Let me see."
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "Oslo"}, {}]
    pieces, finish = deltas(space, tools=[WEATHER])
    streamed = [call for piece in pieces for call in piece.get("tool_calls", ())]
    assert ([call["function"] for call in streamed], finish) == (calls, "tool_calls")


def test_calls_that_nobody_could_read_are_refused(workspace: Workspace) -> None:
    """Before the model writes them, with the forms that can be read."""
    workspace.write("own.jinja", MISTRAL.replace("[ARGS]", " with "))
    space = says(workspace, {}, template="own.jinja")
    error = space.ask("m", status=400, tools=[WEATHER])["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "in a form that is not known; known forms: Hermes" in error["message"]


def test_tools_and_the_prompt_cache(workspace: Workspace) -> None:
    """Where the template shows tools after the prompt, the prompt cache serves.

    Where before its end, it is cold.
    """
    workspace.memory_model()
    workspace.memory_model("n.model")
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare(
        "{a: a.md}", model="    chat_template: llama3\n  n: {path: n.model, prompts: {a: a.md}}"
    )
    workspace.start()
    workspace.wait_settled()
    assert workspace.ask("m/a", tools=[WEATHER])["rkcached"]["state"] == "hit"
    report = workspace.ask("n/a", tools=[WEATHER])["rkcached"]
    assert report["state"] == "partial"
    assert report["reason"].endswith(
        "after the system message: the request's tools; declare them with the prompt (tools: FILE)"
    )


def test_documents_are_ranked(workspace: Workspace) -> None:
    """The best first, with its place in the request. llama.cpp's and Cohere's paths do the same."""
    workspace.memory_model()
    workspace.declare("{}", model="  r: {path: m.model, rerank: true}")
    workspace.start()
    documents = ["A panda is a bear.", "Bread needs flour.", {"text": "A recipe for bread."}]

    def rank(status: int = 200, path: str = "/v1/rerank", **body: Any) -> dict[str, Any]:
        body = {"model": "r", "query": "bread recipe", "documents": documents} | body
        response = workspace.request("POST", path, json=body)
        assert response.status_code == status, response.text
        answer: dict[str, Any] = response.json()
        return answer

    everything = rank()
    assert [item["index"] for item in everything["results"]] == [2, 1, 0]
    assert [item["relevance_score"] for item in everything["results"]] == [1.0, 0.5, 0.0]
    assert everything["usage"]["total_tokens"] == sum(
        len("bread recipe\n") + len(text)
        for text in ("A panda is a bear.", "Bread needs flour.", "A recipe for bread.")
    )
    assert "document" not in everything["results"][0]
    best = rank(top_n=1, return_documents=True)["results"]
    assert best == [
        {"index": 2, "relevance_score": 1.0, "document": {"text": "A recipe for bread."}}
    ]
    for path in ("/rerank", "/reranking", "/v1/reranking", "/v2/rerank"):
        assert rank(path=path)["results"] == everything["results"]
    assert len(rank(top_n=9)["results"]) == 3

    for wrong, param in (
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": [""]}, "documents.0"),
        ({"documents": ["a\0b"]}, "documents"),
        ({"query": "a\0b"}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"max_chunks_per_doc": 3}, "max_chunks_per_doc"),
    ):
        assert rank(400, **wrong)["error"]["param"] == param
    assert rank(400, model="m")["error"]["code"] == "model_not_reranker"
    assert rank(404, model="zzz")["error"]["code"] == "model_not_found"
    assert rank(400, documents=["x" * 5000])["error"]["code"] == "context_length_exceeded"
    refused = workspace.ask("r", status=400)["error"]
    assert (refused["code"], refused["param"]) == ("model_is_reranker", "model")
    assert "/v1/rerank" in refused["message"]
    text = {"cache_name": "a", "content": "b"}
    stored = workspace.request("POST", "/v1/cache/r", admin=True, json=text)
    assert (stored.status_code, stored.json()["error"]["code"]) == (400, "model_is_reranker")
    vector = workspace.request("POST", "/v1/embeddings", json={"model": "r", "input": "a"})
    assert vector.json()["error"]["code"] == "model_not_embedding"


def test_embeddings(workspace: Workspace) -> None:
    """A text, tokens, lists of both; as numbers or base64; of length 1.

    The same text gives the same vector.
    """
    workspace.memory_model()
    workspace.declare("{}", model="  v: {path: m.model, embedding: true}")
    workspace.start()

    def embed(status: int = 200, **body: Any) -> dict[str, Any]:
        response = workspace.request("POST", "/v1/embeddings", json={"model": "v", **body})
        assert response.status_code == status, response.text
        answer: dict[str, Any] = response.json()
        return answer

    one = embed(input="hello")
    vector = one["data"][0]["embedding"]
    assert sum(value * value for value in vector) == pytest.approx(1)
    assert one["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    several = embed(input=["hello", "other"], encoding_format="base64")
    assert [item["index"] for item in several["data"]] == [0, 1]
    data = base64.b64decode(several["data"][0]["embedding"])
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(vector)
    assert several["data"][0]["embedding"] != several["data"][1]["embedding"]
    assert embed(input=list(b"hello"))["data"][0]["embedding"] == pytest.approx(vector)
    assert embed(input=[list(b"hello"), list(b"x")])["usage"]["prompt_tokens"] == 6
    for wrong, param in (
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [999]}, "input"),
    ):
        assert embed(400, **wrong)["error"]["param"] == param
    assert embed(400, input="x", dimensions=3)["error"]["param"] == "dimensions"
    assert embed(400, input="x", model="m")["error"]["code"] == "model_not_embedding"
    assert embed(404, input="x", model="zzz")["error"]["code"] == "model_not_found"
    assert embed(400, input="x" * 5000)["error"]["code"] == "context_length_exceeded"
    assert workspace.ask("v", status=400)["error"]["code"] == "model_is_embedding"
