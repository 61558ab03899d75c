"""Messages as clients send them, and as templates get them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.api.bodies import parse_body
from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError
from rkcached.messages.bounds import MAX_DEPTH, is_deeper

USER = {"role": "user", "content": "hello"}


def plain(*messages: Any) -> list[Any]:
    body = {"model": "m", "messages": messages}
    request = parse_body(ChatRequest, json.dumps(body).encode())
    return [message.plain() for message in request.messages]


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call | more]}


def given_arguments(arguments: Any) -> Any:
    (message,) = plain(calling(arguments))
    return message["tool_calls"][0]["function"]["arguments"]


def test_names_and_ids_reach_the_template() -> None:
    """Who says it, which call it is, and which call a result belongs to."""
    messages = [
        {"role": "user", "name": "Ann", "content": "hello"},
        {"role": "assistant", "name": "Bot", "content": "I look."} | calling("{}"),
        {"role": "tool", "name": "f", "tool_call_id": "c", "content": "4"},
        {"role": "developer", "name": "boss", "content": "Be brief."},
    ]

    user, assistant, tool, system = plain(*messages)

    assert user == {"role": "user", "name": "Ann", "content": "hello"}
    assert tool == {"role": "tool", "name": "f", "tool_call_id": "c", "content": "4"}
    assert system == {"role": "system", "name": "boss", "content": "Be brief."}
    assert assistant["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Oslo"}', {"city": "Oslo"}),
        ('\n {"a": [1, {"b": null}]} ', {"a": [1, {"b": None}]}),
        ({"city": "Oslo"}, {"city": "Oslo"}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("{}", {}),
    ],
)
def test_arguments_are_an_object(arguments: Any, expected: Any) -> None:
    """As JSON in a text, which is OpenAI's way, or as it is, which is Ollama's."""
    assert given_arguments(arguments) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        '{"city": ',
        "Oslo",
        "[1]",
        "null",
        '"{}"',
        "4",
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"a":' * 900 + "1" + "}" * 900,
        '{"a":' * 10_000,
        "9" * 5000,
    ],
)
def test_arguments_that_are_no_object_stay_as_they_came(arguments: str) -> None:
    """Some model wrote them in an earlier turn: that must not end the conversation."""
    assert given_arguments(arguments) == arguments


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_may_be_the_arguments(text: str) -> None:
    """It becomes an object, or stays what it was."""
    arguments = given_arguments(text)

    assert arguments == text or isinstance(arguments, dict)


@pytest.mark.parametrize("levels", [1, MAX_DEPTH, MAX_DEPTH + 1])
def test_depth_is_counted(levels: int) -> None:
    """Of objects and lists in each other."""
    value: Any = 1
    for at in range(levels):
        value = {"a": value, "b": 2} if at % 2 else [value]

    assert is_deeper(value, levels - 1)
    assert not is_deeper(value, levels)


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system"},
        {"role": "developer"},
        {"role": "user"},
        {"role": "assistant"},
        {"role": "tool", "tool_call_id": "c"},
    ],
)
def test_parts_are_lines(message: dict[str, Any]) -> None:
    (told,) = plain(message | {"content": PARTS})

    assert told["content"] == "a\nb"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "content": []},
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "tool", "tool_call_id": "c"},
        {"role": "tool", "tool_call_id": "c", "content": []},
    ],
)
def test_an_answer_and_a_result_may_be_nothing(message: dict[str, Any]) -> None:
    """A tool that returns nothing, and an answer that was cut off."""
    (told,) = plain(message)

    assert told["content"] == ""


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("content", [None, []])
def test_a_question_is_something(role: str, content: Any) -> None:
    with pytest.raises(RequestError) as refused:
        plain({"role": role, "content": content})

    assert (refused.value.status, refused.value.param) == (400, "messages.0.content")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning_content": "hm"}, "hm"),
        ({"reasoning": "hm"}, "hm"),
        ({"thinking": "hm"}, "hm"),
        ({"reasoning": None, "thinking": "hm"}, "hm"),
        ({"reasoning_content": "hm", "reasoning": "other"}, "hm"),
        ({"reasoning": "other", "thinking": "hm"}, "hm"),
        ({"reasoning": {"effort": "low"}}, None),
        ({"reasoning": None}, None),
        ({"reasoning_content": ""}, None),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}, None),
        ({"thinking_blocks": [{"type": "thinking", "thinking": "hm"}]}, None),
    ],
)
def test_reasoning_comes_back_in_several_words(
    fields: dict[str, Any], expected: str | None
) -> None:
    """The template gets it under the name that templates know, if it is a text."""
    (told,) = plain({"role": "assistant", "content": "4"} | fields)

    assert told == {"role": "assistant", "content": "4"} | (
        {"reasoning_content": expected} if expected else {}
    )


def test_fields_of_other_programs_are_accepted() -> None:
    """In messages, parts, calls and functions, and in tools; no template gets them."""
    foreign = {"cache_control": {"type": "ephemeral"}, "provider_specific_fields": {"a": 1}}
    call = calling("{}", **foreign)
    call["tool_calls"][0]["function"] |= foreign
    messages = [
        {"role": "system", "content": [PARTS[0] | foreign]} | foreign,
        USER | foreign,
        call | foreign,
        {"role": "tool", "tool_call_id": "c", "content": "4"} | foreign,
    ]
    tool = {"type": "function", "function": {"name": "f"}} | foreign
    body = {"model": "m", "messages": messages, "tools": [tool]}

    request = parse_body(ChatRequest, json.dumps(body).encode())

    told = [message.plain() for message in request.messages]
    assert request.tools is not None
    tools = [tool.plain() for tool in request.tools]
    assert "ephemeral" not in json.dumps([told, tools])


def test_a_message_comes_back_with_all_that_was_noted() -> None:
    """Its id, when it was made and by which model; reasoning in other words; null for anything."""
    noted = {
        "id": "msg_1",
        "created_at": 1,
        "model": "m",
        "reasoning_opaque": "x",
        "reasoning_text": None,
        "images": None,
        "function_call": None,
    }

    user, assistant = plain(
        USER | {"id": "msg_0", "images": None}, {"role": "assistant", "content": "4"} | noted
    )

    assert user == USER
    assert assistant == {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("field", [{"images": ["x"]}, {"reasoning_text": "x"}])
def test_a_question_with_more_than_text_is_refused(field: dict[str, Any]) -> None:
    """Nothing that the model should see is dropped in silence."""
    with pytest.raises(RequestError) as refused:
        plain(USER | field)

    assert refused.value.code == "unsupported_parameter"


def test_a_refusal_is_what_the_assistant_said() -> None:
    (told,) = plain({"role": "assistant", "content": None, "refusal": "No."})

    assert told["content"] == "No."
