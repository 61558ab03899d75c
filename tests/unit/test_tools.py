"""A prompt's tools: one rule for what they are, and no meaning in how their file is written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rkcached.api.bodies import parse_body
from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError, SourceError
from rkcached.messages.bounds import MAX_VALUES
from rkcached.messages.tools import MAX_TOOLS, parse_tools
from tests.documents import DOCS, blocks

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def refused(text: str) -> SourceError:
    with pytest.raises(SourceError) as error:
        parse_tools(text, name="tools.json")
    return error.value


def test_the_tools_of_a_file() -> None:
    """A template gets them as it gets those of a request; the names are for people."""
    tools = parse_tools(json.dumps([WEATHER]), name="tools.json")
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], "tools": [WEATHER]}
    request = parse_body(ChatRequest, json.dumps(body).encode())
    assert tools.plain() == [tool.plain() for tool in request.tools or ()] == [WEATHER]
    assert tools.names == ("get_weather",)


def test_white_space_changes_nothing() -> None:
    """Nor do escapes: the objects count, not their spelling."""
    compact = json.dumps([WEATHER], separators=(",", ":"))
    spaced = json.dumps([WEATHER], indent=4).replace("weather", "w\\u0065ather")
    assert parse_tools(compact, name="a") == parse_tools(spaced, name="b")


def test_what_no_template_gets_changes_nothing() -> None:
    """`strict` and what other programs add."""
    more = {**WEATHER, "cache_control": {}, "function": {**WEATHER["function"], "strict": True}}
    assert parse_tools(json.dumps([more]), name="a") == parse_tools(json.dumps([WEATHER]), name="b")


def test_the_order_of_keys_is_the_templates_business() -> None:
    """Those of the record come in one order. Parameters keep theirs, under the same digest."""
    function = dict(reversed(WEATHER["function"].items()))
    turned = json.dumps([{"function": function, "type": "function"}])
    first = parse_tools(json.dumps([WEATHER]), name="a")
    assert parse_tools(turned, name="b") == first

    parameters = dict(reversed(WEATHER["function"]["parameters"].items()))
    function = {**WEATHER["function"], "parameters": parameters}
    other = parse_tools(json.dumps([{**WEATHER, "function": function}]), name="c")
    assert other.digest == first.digest
    assert other != first


def test_another_description_is_another_digest() -> None:
    """And so is another order of the tools."""
    first = parse_tools(json.dumps([WEATHER]), name="a")
    other = json.dumps([WEATHER]).replace("of a city", "of a town")
    assert parse_tools(other, name="a").digest != first.digest


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('[\n {"type": "function",}\n]', "tools.json:2: not JSON: ", "write [{"),
        ("", "tools.json:1: not JSON: ", "write [{"),
        ("[NaN]", "tools.json:1: not JSON: ", "write [{"),
        ("[1e999]", "tools.json is not JSON: a number is out of range", "write [{"),
        ("[]", "tools.json has no tool", "or remove `tools:`"),
        (json.dumps({"tools": [WEATHER]}), "tools.json: the tools should be an array", "write [{"),
        ('["get_weather"]', "tools.json: 0: should be an object", "correct it"),
        (json.dumps([WEATHER, WEATHER["function"]]), "tools.json: 1.type is missing", "write [{"),
        (
            json.dumps([{"type": "function", "function": {"name": "get weather"}}]),
            "tools.json: 0.function.name: String should match pattern",
            "correct it",
        ),
        (
            json.dumps([{**WEATHER, "function": {"name": "f", "params": {}}}]),
            "tools.json: 0.function.params is not supported",
            "leave it out",
        ),
        (json.dumps([WEATHER] * (MAX_TOOLS + 1)), "should have at most 128 items", "write [{"),
        (
            json.dumps([0] * (MAX_VALUES + 1)),
            "tools.json has more than 32,768 values",
            "fewer tools",
        ),
        (
            json.dumps([WEATHER]).replace("of a city", "\\u0000"),
            "tools.json: a text has a NUL character",
            "remove it",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_file_is_told_by_its_place(text: str, message: str, hint: str) -> None:
    """The line where it is no JSON, else the place in the JSON; and the next step."""
    error = refused(text)
    assert message in error.message
    assert hint in error.hint


def test_a_backslash_before_a_u_is_no_nul() -> None:
    """Documentation of escapes is an honest text."""
    text = json.dumps([WEATHER]).replace("of a city", "\\\\u0000")
    assert "\\u0000" in parse_tools(text, name="a").plain()[0]["function"]["description"]


def test_a_request_is_refused_by_the_same_rule() -> None:
    """In the words that the file gets."""
    bad = {"type": "function", "function": {"name": "get weather"}}
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], "tools": [bad]}
    with pytest.raises(RequestError) as error:
        parse_body(ChatRequest, json.dumps(body).encode())
    of_file = refused(json.dumps([bad])).message.removeprefix("tools.json: ")
    assert error.value.message == f"tools.{of_file}"


def test_the_example_of_the_manual() -> None:
    """The file that docs/manifest.md shows is one."""
    (text,) = blocks(DOCS / "manifest.md", "json")
    assert parse_tools(text, name="a").names == ("get_weather",)
