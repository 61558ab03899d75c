"""Requests to OpenAI's Responses become ours; what is refused has the name that it has there."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from rkcached.api.bodies import parse_body
from rkcached.api.openai_responses.requests import ResponsesRequest
from rkcached.api.openai_responses.writer import responses_error
from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
USER = {"role": "user", "content": "hello"}
REASONING = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "Hm."}],
}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "x"}
IMAGE = {"type": "input_image", "image_url": "http://x"}


def message(role: str, *texts: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, "text": text, "annotations": []} for text in texts]
    return {"type": "message", "role": role, "content": parts, "id": "msg_1", "status": "completed"}


def result(output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": "c1", "output": output}


def translated(**fields: Any) -> ChatRequest:
    data = json.dumps({"model": "m", "input": "hello", **fields}).encode()
    return parse_body(ResponsesRequest, data).translated()


def turns(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The messages that a chat template gets."""
    request = translated(input=list(items), **fields)
    return [dict(message.plain()) for message in request.messages]


PLAIN_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER], [USER]),
        (
            [message("developer", "Be brief."), message("user", "a", "b")],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}],
        ),
        (
            [USER, REASONING, message("assistant", "I look."), CALL, result("1")],
            [
                USER,
                {
                    "role": "assistant",
                    "content": "I look.",
                    "tool_calls": [PLAIN_CALL],
                    "reasoning_content": "Hm.",
                },
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
            ],
        ),
        (
            [USER, CALL, result("1"), CALL, CALL, result([{"type": "input_text", "text": "2"}])],
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL, PLAIN_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ],
        ),
        (
            [CALL, REASONING, message("assistant", "It is."), message("assistant", "Yes.")],
            [
                {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL]},
                {"role": "assistant", "content": "It is.", "reasoning_content": "Hm."},
                {"role": "assistant", "content": "Yes."},
            ],
        ),
        ([USER, REASONING], [USER]),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
            [{"role": "assistant", "content": "No."}, USER],
        ),
    ],
)
def test_items_become_messages(items: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Reasoning, a text and calls in a row are one answer."""
    assert turns(*items) == expected


def test_instructions_are_the_first_message() -> None:
    assert turns(USER, instructions="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert turns(USER, instructions="") == turns(USER, instructions=None) == [USER]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_output_tokens": 9}, {"max_tokens": 9}),
        ({"temperature": 1, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": "max"}}, {"reasoning_effort": "xhigh"}),
        ({"reasoning": {}}, {"reasoning_effort": None}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tool_choice": "required"}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"text": {"verbosity": "low"}}, {"response_format": None}),
        ({"store": True, "metadata": {"a": "b"}, "user": "u"}, {"max_tokens": None}),
        ({"include": ["reasoning.encrypted_content"], "truncation": "disabled"}, {"n": None}),
        ({"previous_response_id": None, "conversation": None, "background": False}, {}),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, {"stream": True}),
    ],
)
def test_parameters(given: dict[str, Any], expected: dict[str, Any]) -> None:
    request = translated(**given)
    assert {name: getattr(request, name) for name in expected} == expected


def test_tools_and_formats() -> None:
    """With the words that our own requests have for them."""
    (tool,) = translated(tools=[TOOL]).tools or ()
    function = {"name": "f", "parameters": {"type": "object"}}
    assert tool.plain() == {"type": "function", "function": function}
    choice = translated(tools=[TOOL], tool_choice={"type": "function", "name": "f"}).tool_choice
    assert choice.function.name == "f"  # type: ignore[union-attr]
    for form, kind in ((SCHEMA, "json_schema"), ({"type": "json_object"}, "json_object")):
        assert translated(text={"format": form}).response_format.type == kind  # type: ignore[union-attr]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [REASONING]}, "input"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": []}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0"),
    ({"input": [USER, {"type": "item_reference", "id": "x"}]}, "input.1"),
    ({"input": [{"type": "function_call", "call_id": "c"}]}, "input.0.name"),
    ({"input": [result(None)]}, "input.0.output"),
    ({"input": [CALL | {"arguments": "[" * 300_000}]}, "input.0.arguments"),
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tools": [TOOL | {"name": "?"}]}, "tools.0.name"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"truncation": "auto"}, "truncation"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": {"id": "x"}}, "conversation"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"top_logprobs": 1}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_body_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        translated(**fields)
    assert refused.value.status == 400
    worded = responses_error(refused.value)["error"]
    assert (worded["param"], worded["type"]) == (param, "invalid_request_error")


def test_what_is_refused_has_its_next_step() -> None:
    with pytest.raises(RequestError, match="send all items of the conversation in input"):
        translated(previous_response_id="resp_1")
    with pytest.raises(RequestError, match="as clients do with store: false"):
        translated(input=[USER, {"type": "item_reference", "id": "msg_1"}])
    with pytest.raises(RequestError, match="'web_search' is not supported here"):
        translated(tools=[{"type": "web_search"}])
    with pytest.raises(RequestError, match="'input_image' is not supported here"):
        translated(input=[{"role": "user", "content": [IMAGE]}])


def test_tools_and_a_format_go_together() -> None:
    both = translated(tools=[TOOL], text={"format": SCHEMA})
    assert both.tools
    assert both.response_format


@pytest.mark.parametrize(
    ("param", "own"),
    [
        ("messages", "input"),
        ("messages.3.tool_calls.0.function.arguments", "input"),
        ("response_format", "text.format"),
        ("tools", "tools"),
        (None, None),
    ],
)
def test_parameters_that_the_translation_renames_have_their_own_names(
    param: str | None, own: str | None
) -> None:
    error = RequestError(400, "it is so", code="c", param=param, hint=f"shorten {param}")
    worded = responses_error(error)["error"]
    assert worded["param"] == own
    assert (own or "None") in worded["message"]


def test_a_large_body_is_translated_quickly() -> None:
    """8 MB in as many items as a body may have: the work is linear, and copies no text."""
    many = [{"role": "user", "content": "x" * 1000} for _ in range(8000)]
    data = json.dumps({"model": "m", "input": many}).encode()
    request = parse_body(ResponsesRequest, data)
    begun = time.process_time()
    request.translated()
    assert time.process_time() - begun < 1
