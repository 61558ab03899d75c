"""An answer that must be JSON of a certain shape.

What fits, what does not, and schemas that are none.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from rkcached.errors import SchemaInvalid, SchemaMismatch
from rkcached.worker.json_answer import JsonAnswer

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def check(text: str, schema: Any = PERSON) -> str:
    return JsonAnswer(json.dumps(schema)).check(text)


@pytest.mark.parametrize(
    "text", ['<think>\nhm {"age": 2}\n</think>\n\n{"age": 1}', 'hm</think>\n{"age": 1}']
)
def test_reasoning_is_not_the_answer(text: str) -> None:
    """Also where the prompt ended inside the tag."""
    assert check(text) == '{"age": 1}'


@pytest.mark.parametrize(
    "text", ['<tool_call>\n{"age": 1}\n</tool_call>', '<|python_tag|>{"age": 1}']
)
def test_a_call_may_come_in_its_tags(text: str) -> None:
    """As the template asks for it."""
    assert check(text) == '{"age": 1}'


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a+)+$"},
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)},
                "d40": {"type": "string"},
            },
        },
    ],
)
def test_a_check_has_a_limit(schema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern or alternatives that would take years."""
    monkeypatch.setattr("rkcached.worker.json_answer.CHECK_LIMIT_S", 0.2)
    with pytest.raises(SchemaInvalid, match="within"):
        check(json.dumps("a" * 40 + "b"), schema)


@pytest.mark.parametrize(
    "text", ['{"age": 1}', ' \n{"age": 1}\n', '```json\n{"age": 1}\n```', '```\n{"age": 1}\n```\n']
)
def test_what_fits_comes_without_its_fence(text: str) -> None:
    """Models like to put a code fence around JSON."""
    assert check(text) == '{"age": 1}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("Sure!", "not JSON"),
        ('{"age": 1} and more', "not JSON"),
        ('{"age": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not of type 'object'"),
        ("{}", "'age' is a required property"),
        ('{"age": "old"}', r"\$\.age: 'old' is not of type 'integer'"),
    ],
)
def test_what_does_not_fit_says_why(text: str, why: str) -> None:
    """And the error carries the text, for the model to be asked again."""
    with pytest.raises(SchemaMismatch, match=why) as refused:
        check(text)
    assert refused.value.text == text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"properties": 7},
        {"type": "object", "description": "x" * 70_000},
    ],
)
def test_what_is_no_schema_is_refused_before_the_run(schema: Any) -> None:
    """Also one of more than 64 KiB."""
    with pytest.raises(SchemaInvalid):
        JsonAnswer(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://example.invalid/schema.json"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"pattern": "("},
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema: Any) -> None:
    """A reference is never fetched.

    One that leads to itself or nowhere is an error, not an endless loop.
    """
    with pytest.raises(SchemaInvalid):
        check('"text"', schema)
