"""The variables of a chat template that a request sets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rkcached.api.bodies import parse_body
from rkcached.api.requests import ChatRequest
from rkcached.api.variables import (
    MAX_VARIABLES,
    MAX_VARIABLES_BYTES,
    MAX_VARIABLES_DEPTH,
)
from rkcached.errors import RequestError
from rkcached.sources.values import OWN_VARIABLES

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "The answer is"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [USER]} | fields
    return parse_body(ChatRequest, json.dumps(body).encode())


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"chat_template_kwargs": None, "think": None, "documents": None}, {}),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May"}},
            {"enable_thinking": False, "date_string": "1 May"},
        ),
        ({"enable_thinking": True}, {"enable_thinking": True}),
        ({"think": False}, {"enable_thinking": False}),
        ({"think": True}, {"enable_thinking": True}),
        ({"think": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        ({"reasoning_effort": "xhigh"}, {"reasoning_effort": "xhigh"}),
        (
            {"reasoning_effort": "none"},
            {"reasoning_effort": "none", "enable_thinking": False},
        ),
        (
            {"documents": [{"title": "t", "text": "x"}]},
            {"documents": [{"title": "t", "text": "x"}]},
        ),
        (
            {"think": True, "enable_thinking": True, "reasoning_effort": "high"},
            {"enable_thinking": True, "reasoning_effort": "high"},
        ),
        (
            {"chat_template_kwargs": {"custom_tools": [{"name": "f"}], "documents": []}},
            {"custom_tools": [{"name": "f"}], "documents": []},
        ),
    ],
)
def test_words_of_clients_are_variables(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse(**fields).variables() == expected


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"think": False, "enable_thinking": True}, "think", "enable_thinking"),
        ({"think": True, "reasoning_effort": "none"}, "think", "reasoning_effort"),
        ({"think": "low", "reasoning_effort": "high"}, "think", "reasoning_effort"),
        ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_t", "reasoning_effort"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "think": False},
            "chat_template_kwargs.enable_thinking",
            "think",
        ),
        (
            {"chat_template_kwargs": {"documents": []}, "documents": [{"a": 1}]},
            "chat_template_kwargs.documents",
            "documents",
        ),
    ],
)
def test_contradictions_are_refused_with_both_names(
    fields: dict[str, Any], first: str, second: str
) -> None:
    error = refused(**fields)

    assert error.code == "invalid_value"
    assert first in error.message
    assert second in error.message
    assert "contradict" in error.message


@pytest.mark.parametrize("name", sorted(OWN_VARIABLES))
def test_some_variables_are_not_a_clients_to_set(name: str) -> None:
    error = refused(chat_template_kwargs={name: True})

    assert error.param == "chat_template_kwargs"
    assert f"{name} cannot be set" in error.message


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({f"v{at}": at for at in range(MAX_VARIABLES + 1)}, "more than 32 variables"),
        ({"a": nested(MAX_VARIABLES_DEPTH)}, "deeper than 16 levels"),
        ({"a": "x" * MAX_VARIABLES_BYTES}, "larger than 65,536 bytes"),
        ([], "should be an object"),
        ("enable_thinking", "should be an object"),
    ],
)
def test_variables_are_bounded(variables: Any, problem: str) -> None:
    error = refused(chat_template_kwargs=variables)

    assert error.param == "chat_template_kwargs"
    assert problem in error.message


def test_variables_within_the_bounds() -> None:
    variables = {f"v{at}": nested(MAX_VARIABLES_DEPTH - 1) for at in range(MAX_VARIABLES)}

    assert parse(chat_template_kwargs=variables).variables() == variables


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"think": "hard"}, "think"),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"documents": [1]}, "documents.0"),
        ({"documents": [{"a": nested(MAX_VARIABLES_DEPTH)}]}, "documents"),
    ],
)
def test_other_values_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    ("fields", "last", "expected"),
    [
        ({}, USER, False),
        ({}, ANSWER, True),
        ({}, ANSWER | {"tool_calls": [CALL]}, False),
        ({"continue_final_message": True}, ANSWER, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, ANSWER, True),
        ({"add_generation_prompt": False}, ANSWER, True),
        ({"continue_final_message": False}, ANSWER, False),
        ({"add_generation_prompt": True}, ANSWER, False),
        ({"continue_final_message": False, "add_generation_prompt": True}, USER, False),
    ],
)
def test_what_an_answer_continues(
    fields: dict[str, Any], last: dict[str, Any], *, expected: bool
) -> None:
    """The assistant's last message, as vLLM and llama.cpp are asked for it."""
    assert parse(messages=[USER, last], **fields).continues is expected


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({"continue_final_message": True}, USER),
        ({"add_generation_prompt": False}, USER),
        ({"continue_final_message": True}, ANSWER | {"tool_calls": [CALL]}),
        ({"continue_final_message": True, "add_generation_prompt": True}, ANSWER),
        ({"continue_final_message": False, "add_generation_prompt": False}, ANSWER),
    ],
)
def test_what_an_answer_cannot_continue(fields: dict[str, Any], last: dict[str, Any]) -> None:
    """400 with the name of the parameter."""
    assert next(iter(fields)) in refused(messages=[USER, last], **fields).message
