"""Anthropic's requests become ours; what no model here can follow is refused by its own name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from rkcached.api.anthropic.requests import MessagesRequest
from rkcached.api.anthropic.writer import anthropic_error
from rkcached.api.bodies import parse_body
from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError

USER = {"role": "user", "content": "hello"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
HINT = {"type": "ephemeral", "ttl": "1h"}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": [USER], **fields}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def translated(**fields: Any) -> ChatRequest:
    return parse_body(MessagesRequest, json.dumps(body(**fields)).encode()).translated()


def turns(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The messages that a chat template gets."""
    request = translated(messages=list(messages), **fields)
    return [dict(message.plain()) for message in request.messages]


def test_the_system_text_is_the_first_message() -> None:
    """As a text, and as blocks, which become lines."""
    assert turns(USER, system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    blocks = [text("Be brief.") | {"cache_control": HINT}, text("Be kind.")]
    assert turns(USER, system=blocks)[0] == {"role": "system", "content": "Be brief.\nBe kind."}
    assert turns(USER, system=[]) == turns(USER, system="") == [USER]


def test_a_conversation() -> None:
    """Results of tools become messages of their own; thinking is the turn's reasoning."""
    called = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        text("I look."),
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [text("one"), text("two")]},
        {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
        text("So?"),
    ]
    assert turns(
        USER,
        {"role": "assistant", "content": called},
        {"role": "user", "content": results},
        {"role": "system", "content": "Stop."},
        {"role": "assistant", "content": "It"},
    ) == [
        USER,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "one\ntwo", "tool_call_id": "t1"},
        {"role": "tool", "content": "", "tool_call_id": "t2"},
        {"role": "user", "content": "So?"},
        {"role": "system", "content": "Stop."},
        {"role": "assistant", "content": "It"},
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stop_sequences": ["a"]}, {"stop": ["a"]}),
        ({"temperature": 1, "top_p": 0.5, "top_k": 3}, {"top_k": 3, "top_p": 0.5}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "xhigh"}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"parallel_tool_calls": False},
        ),
        ({"metadata": {"user_id": "1"}, "cache_control": HINT}, {"max_tokens": 9}),
        ({"stream": True}, {"stream": True}),
    ],
)
def test_parameters(given: dict[str, Any], expected: dict[str, Any]) -> None:
    request = translated(**given)
    assert {name: getattr(request, name) for name in expected} == expected


def test_tools_and_formats() -> None:
    """With the words that our own requests have for them."""
    (tool,) = translated(tools=[TOOL | {"cache_control": HINT, "type": "custom"}]).tools or ()
    function = {"name": "f", "parameters": {"type": "object"}}
    assert tool.plain() == {"type": "function", "function": function}

    named = translated(tools=[TOOL], tool_choice={"type": "tool", "name": "f"}).tool_choice
    assert named.function.name == "f"  # type: ignore[union-attr]

    schema = {"type": "object"}
    form = {"format": {"type": "json_schema", "schema": schema}}
    wanted = translated(output_config=form).response_format
    assert wanted.json_schema.schema_ == schema  # type: ignore[union-attr]

    both = translated(tools=[TOOL], output_config=form)
    assert both.tools
    assert both.response_format == wanted


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0"),
    ({"messages": [USER, {"role": "assistant", "content": [IMAGE]}]}, "messages.1.content.0"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}],
                }
            ]
        },
        "messages.0.content.0.content.0",
    ),
    ({"messages": [USER | {"name": "x"}]}, "messages.0.name"),
    ({"system": [IMAGE]}, "system.0"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [TOOL | {"name": "?"}]}, "tools.0.name"),
    ({"tool_choice": {"type": "some"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"temperature": -1}, "temperature"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"n": 1}, "n"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_body_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        translated(**fields)
    assert refused.value.status == 400
    assert refused.value.param == param
    words = anthropic_error(refused.value)
    assert words["error"]["type"] == "invalid_request_error"
    assert param in words["error"]["message"]


def test_what_is_not_supported_is_said_by_its_type() -> None:
    """The client knows its image by that word."""
    with pytest.raises(RequestError, match="'image' is not supported here; supported: text"):
        translated(messages=[{"role": "user", "content": [IMAGE]}])
    with pytest.raises(RequestError, match="'web_search_20250305' is not supported"):
        translated(tools=[{"type": "web_search_20250305", "name": "web_search"}])


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (413, "request_too_large"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropics_types(status: int, kind: str) -> None:
    error = RequestError(status, "it is so", code="c", hint="do that")
    assert anthropic_error(error) == {
        "type": "error",
        "error": {"type": kind, "message": "it is so (do that)"},
    }


def test_parameters_that_the_translation_renames_have_their_own_names() -> None:
    error = RequestError(
        400, "tools and response_format", code="c", param="response_format", hint="no tools"
    )
    assert anthropic_error(error)["error"]["message"] == (
        "tools and output_config.format (no tools)"
    )


def test_a_large_body_is_translated_quickly() -> None:
    """8 MB in as many blocks as a body may have: the work is linear, and copies no text."""
    many = [text("x" * 1000) for _ in range(8000)]
    data = json.dumps(body(messages=[{"role": "user", "content": many}])).encode()
    request = parse_body(MessagesRequest, data)
    begun = time.perf_counter()
    request.translated()
    assert time.perf_counter() - begun < 1
