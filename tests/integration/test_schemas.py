"""Schemas of clients, looked at by the real child.

Whatever is wrong with one is SchemaInvalid, and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from rkcached.errors import SchemaInvalid
from rkcached.worker.schemas import SchemaChecker, find_problem


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


GOOD: list[Any] = [
    {},
    {"type": "object"},
    {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "string", "maxLength": 500}, "maxItems": 100},
    {
        "$defs": {"t": {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    },
    {"type": "string", "pattern": "^[a-z]{1,64}$"},
    {"type": "string", "pattern": "^[^a]--&&\\[[\\[\\]]$"},
    {"type": "number", "multipleOf": 0.01},
    {"anyOf": [{"type": "null"}, {"enum": ["a", "b"]}]},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "integer", "minimum": 0},
    nested(20),
    {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 3000} for name in "abcd"},
    },
    {"enum": ["maxItems", {"maxItems": 99_999_999_999}]},
    {"type": "string", "default": {"pattern": "["}},
    {
        "type": "object",
        "properties": {"pattern": {"type": "string"}, "maxItems": {"type": "integer"}},
    },
]

BAD: list[Any] = [
    {"type": "no"},
    {"type": 5},
    {"$schema": 5},
    {"$ref": "#/definitions/nobody"},
    {"$ref": "https://example.com/schema"},
    {"$ref": "#/title", "title": "no schema"},
    {"type": "object", "properties": {"deep": {"$ref": "#/title"}}, "title": "no schema"},
    {"$ref": "#"},
    {"if": {"$ref": "#"}},
    {"type": "object", "required": ["a"], "properties": {"a": {"if": {"$ref": "#/properties/a"}}}},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "^a{99999999999}$"},
    {"type": "string", "pattern": "("},
    {"type": "object", "patternProperties": {"[": {}}},
    {"type": "string", "pattern": "a" * 1001},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 1_000_000_000},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 66_000},
    {"type": "string", "minLength": 10**300},
    {
        "type": "object",
        "properties": {f"p{at}": {"type": "array", "maxItems": 5000} for at in range(3)},
    },
    '{"type": "number", "multipleOf": 0.01, "maximum": 1e999}',
    '{"type": "number", "maximum": NaN}',
    '{"type": "number", "maximum": ' + "1" * 5000 + "}",
    '{"a":' * 2000 + "1" + "}" * 2000,
    nested(400),
]

NO_GRAMMAR: list[Any] = [
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"not": {"type": "object"}},
    {"type": "string", "pattern": "^(?=a)b$"},
    {"type": "string", "pattern": "^(a)\\1$"},
    {"type": "string", "format": "nobody-knows"},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"enum": []},
]
"""Schemas that an answer can be checked by, but that llama.cpp cannot keep to."""

ENDLESS = {
    "allOf": [{"type": "integer", "multipleOf": number} for number in (9973, 9967, 9949, 9941)]
}
"""What llguidance compiles for longer than anybody waits."""


def doubling(title: str, levels: int = 25) -> dict[str, Any]:
    """A small schema that is evaluated twice as long with each level, and takes as much memory."""
    schema: dict[str, Any] = {"title": title, "$ref": "#/$defs/d0", "$defs": {f"d{levels}": {}}}
    for level in range(levels):
        deeper = {"$ref": f"#/$defs/d{level + 1}"}
        schema["$defs"][f"d{level}"] = {"anyOf": [deeper, {"allOf": [deeper, {"type": "object"}]}]}
    return schema


def as_text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


@pytest.fixture(scope="module")
def checker() -> Iterator[SchemaChecker]:
    checker = SchemaChecker()
    yield checker
    checker.close()


def within(schema: Any) -> dict[str, Any]:
    """A schema that an answer comes to only after its first property."""
    return {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": schema},
        "required": ["a", "b"],
        "additionalProperties": False,
    }


TOO_MANY: list[Any] = [
    {"type": "object", "properties": {f"k{at}": {"type": "string"} for at in range(900)}},
    {"type": "string", "pattern": "^((a{100}){100}){10}$"},
    {"anyOf": [{"type": "array", "items": {"const": at}} for at in range(2100)]},
    {"type": "array", "items": {"anyOf": [within({"const": at}) for at in range(2100)]}},
]
READ_OTHERWISE: list[Any] = [
    {"x-guidance": {"item_separator": "####"}, "type": "object"},
    {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
    {"const": 12345678901234567890123},
    {"enum": ["a", -(2**60)]},
    {"type": "string", "pattern": "^[[:alpha:]]{3}$"},
    {"type": "string", "pattern": "^[a-z&&[^b]]{3}$"},
    {"type": "string", "pattern": "[a[b]]"},
]


@pytest.mark.parametrize("place", ["root", "property", "definition"])
@pytest.mark.parametrize("schema", TOO_MANY + READ_OTHERWISE, ids=lambda s: as_text(s)[:60])
def test_a_grammar_that_would_fail_later_is_refused_before(
    checker: SchemaChecker, schema: Any, place: str
) -> None:
    """Wherever it stands: after the first token there is no way back to an error."""
    placed = {
        "root": schema,
        "property": within(schema),
        "definition": within({"$ref": "#/$defs/d"}) | {"$defs": {"d": schema}},
    }[place]

    with pytest.raises(SchemaInvalid):
        checker.check(json.dumps(placed), compiled=True)


def test_honest_schemas_with_many_parts_pass(checker: SchemaChecker) -> None:
    """Patterns, choices and references in many places take milliseconds each."""
    part = {"type": "string", "pattern": "^[a-z]{1,20}$"}
    schema = {
        "type": "object",
        "properties": {f"k{at}": part for at in range(60)}
        | {"kind": {"enum": [f"v{at}" for at in range(300)]}, "again": {"$ref": "#"}},
        "required": [f"k{at}" for at in range(60)],
    }

    checker.check(json.dumps(schema), compiled=True)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#"}, "form a loop"),
        ({"$schema": 5}, r"\$schema"),
        ({"x-guidance": {}}, "x-guidance is not accepted"),
        ({"const": 2**60}, "beyond 2\\^53"),
    ],
)
def test_reasons_are_sentences(checker: SchemaChecker, schema: Any, words: str) -> None:
    """No name of a Python exception: the reader is somebody who wrote a schema."""
    with pytest.raises(SchemaInvalid, match=words) as raised:
        checker.check(json.dumps(schema), compiled=True)

    assert "Error:" not in raised.value.message


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schema", GOOD, ids=as_text)
def test_a_good_schema_passes(checker: SchemaChecker, schema: Any, *, compiled: bool) -> None:
    """For an engine that compiles it, and for one whose answer is checked."""
    checker.check(as_text(schema), compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schema", BAD, ids=lambda schema: as_text(schema)[:60])
def test_a_bad_schema_is_refused(checker: SchemaChecker, schema: Any, *, compiled: bool) -> None:
    """Whatever the libraries raise, panics included."""
    with pytest.raises(SchemaInvalid) as refused:
        checker.check(as_text(schema), compiled=compiled)
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("schema", NO_GRAMMAR, ids=lambda schema: as_text(schema)[:60])
def test_what_cannot_be_compiled_is_refused_where_it_is_compiled(
    checker: SchemaChecker, schema: Any
) -> None:
    """Elsewhere an answer can be checked by it."""
    checker.check(as_text(schema), compiled=False)
    with pytest.raises(SchemaInvalid, match=r"llama\.cpp cannot keep to this schema"):
        checker.check(as_text(schema), compiled=True)


def test_what_takes_for_ever_is_ended(checker: SchemaChecker) -> None:
    """By the child's limits of time and memory; the next schema is looked at by another child."""
    with pytest.raises(SchemaInvalid, match="too much time or memory"):
        checker.check(as_text(ENDLESS), compiled=True)
    checker.check(as_text({"type": "object", "title": "the next one"}), compiled=True)


def test_a_base_exception_is_a_bad_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled libraries raise panics that are no Exception.

    The cause: one that passed every `except Exception` ended the worker, and the prompt cache was
    blamed for it.
    """

    class Panic(BaseException):
        pass

    def panic(_: Any) -> str:
        raise Panic("called unwrap on None")

    monkeypatch.setattr("rkcached.worker.schemas._not_a_schema", panic)
    assert "used: called unwrap on None" in find_problem("{}", compiled=False)


def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that took the child down is not tried again each time that it comes."""
    checker = SchemaChecker()
    for _ in range(2):
        with pytest.raises(SchemaInvalid):
            checker.check(as_text(ENDLESS), compiled=True)
        monkeypatch.setattr("rkcached.worker.schemas.start", None)  # no child any more
    checker.close()


def test_a_schema_is_not_blamed_for_what_another_used_up() -> None:
    """A child that is out of memory by one schema ended at the next one.

    That one was refused from then on.
    """
    checker = SchemaChecker()
    checker.check("{}", compiled=True)
    for at in range(3):
        with pytest.raises(SchemaInvalid):
            checker.check(as_text(doubling(f"number {at}")), compiled=True)
        good = {"type": "object", "properties": {"a": {"type": "integer", "maximum": at}}}
        checker.check(as_text(good), compiled=True)
    checker.close()


def test_a_used_child_s_death_blames_nobody() -> None:
    """The schema is looked at again by a new child.

    Only if that one dies of it, too, it is refused.
    """
    checker = SchemaChecker()
    checker.check("{}", compiled=True)
    (process,) = checker._running
    pid = process.popen.pid
    os.kill(pid, signal.SIGABRT)
    checker.check('{"type": "integer"}', compiled=True)
    checker.close()
