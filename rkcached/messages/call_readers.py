"""Readers: what stands between the marks of a call, made into calls. Pure.

A reader takes the text and the tools of the request, by name, each with the JSON schema of its
parameters. It gives the calls that the text consists of, all of it; anything else is a ValueError,
or a RecursionError from `json`. Nothing is mended: a reader that guesses would call a tool with
arguments that the model did not write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rkcached.messages.literals import Literals

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by the tool's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    name: str
    arguments: str
    """A JSON object as text."""
    id: str = ""
    """Where the model gave one that its template expects back."""


Read = Callable[[str, Tools], list[ToolCall]]

_BETWEEN: Final = re.compile(r"[\s,;]*")
_SPACE: Final = re.compile(r"\s*")
_ANY = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Models write line breaks into strings as they are, which strict JSON forbids.
_JSON = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def make_call(name: Any, arguments: Any, call_id: str = "") -> ToolCall:
    """Errors: ValueError, RecursionError."""
    if not isinstance(name, str) or not name:
        raise ValueError("a call has a name")
    if isinstance(arguments, str):  # some models write the object as text
        arguments = _JSON.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")  # noqa: TRY004 - one kind of error

    name.encode()
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not _is_text(written):
        written = json.dumps(arguments)  # half a surrogate pair can only be written as an escape
    return ToolCall(name=name, arguments=written, id=call_id)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_calls(*, between: str = "", name_is_key: bool = False) -> Read:
    """One or more objects, or lists of them, that have a name and arguments.

    `between` is a pattern of what may stand between them. `name_is_key`: as `{name: arguments}`.
    """
    gap = re.compile(rf"(?:[\s,;]|{between})*") if between else _BETWEEN

    def read(text: str, _: Tools) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = _end(gap, text, 0)
        while at < len(text):
            value, at = _json_value(text, at)
            found = value if isinstance(value, list) else [value]
            calls += (_json_call(item, name_is_key=name_is_key) for item in found)
            at = _end(gap, text, at)

        return calls

    return read


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _json_value(text: str, at: int) -> tuple[Any, int]:
    """A JSON value, or one as Python prints it, and its end."""
    at = _end(_SPACE, text, at)
    try:
        return _JSON.raw_decode(text, at)
    except ValueError:
        literals = Literals(text, at)
        return literals.value(), literals.at


def _json_call(value: Any, *, name_is_key: bool) -> ToolCall:
    if not isinstance(value, dict):
        raise ValueError("a call is an object")  # noqa: TRY004 - one kind of error
    if name_is_key:
        ((name, arguments),) = value.items()
        return make_call(name, arguments)

    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name", value.get("tool_name"))
    return make_call(name, value.get("arguments", value.get("parameters", {})))


def named_json(begin: str, end: str = "") -> Read:
    """Calls that are `begin`, a pattern with the name, then a JSON object, then `end`, a pattern.

    The name's group is `name`; a group `id` is the call's id.
    """
    head = re.compile(begin)
    tail = re.compile(end)

    def read(text: str, _: Tools) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = _end(_BETWEEN, text, 0)
        while at < len(text):
            match = head.match(text, at)
            if match is None:
                raise ValueError("a call begins otherwise")

            value, at = _json_value(text, match.end())
            call_id = match.groupdict().get("id") or ""
            calls.append(make_call(match["name"], value, call_id))
            at = _end(tail, text, at)
            at = _end(_BETWEEN, text, at)

        return calls

    return read


def tagged(begin: str, parameter: str, end: str) -> Read:
    """Calls that are `begin`, parameters and `end`: three patterns.

    Groups: `name` of the call; `key`, `value` and, where the model writes it, `type` of a
    parameter. Without `type`, it is that of the tool's schema.
    """
    head = re.compile(begin)
    item = re.compile(parameter, re.DOTALL)
    tail = re.compile(end)

    def read(text: str, tools: Tools) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = _end(_BETWEEN, text, 0)
        while at < len(text):
            match = head.match(text, at)
            if match is None:
                raise ValueError("a call begins otherwise")

            name = match["name"].strip()
            arguments: dict[str, Any] = {}
            at = _end(_BETWEEN, text, match.end())
            while (found := item.match(text, at)) is not None:
                written = found.groupdict().get("type")
                types = _ANY
                if written is None:
                    types = types_of(tools.get(name, {}), found["key"])
                elif written in ("string", "true"):
                    types = frozenset({"string"})
                arguments[found["key"]] = typed(found["value"], types)
                at = _end(_BETWEEN, text, found.end())

            closing = tail.match(text, at)
            if closing is None:
                raise ValueError("a call ends otherwise")
            at = _end(_BETWEEN, text, closing.end())
            calls.append(make_call(name, arguments))

        return calls

    return read


def types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a tool's schema allows for a parameter; all, if it does not say."""
    properties = schema.get("properties")
    found = None
    if isinstance(properties, Mapping):
        found = properties.get(key)
    return _types(found, schema, 0) or _ANY


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > 8:
        return frozenset()

    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(name for name in kind if isinstance(name, str))

    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        place: Any = root
        for step in reference[2:].split("/"):
            place = place.get(step) if isinstance(place, Mapping) else None
        return _types(place, root, depth + 1)

    if "const" in schema:
        return _types({"enum": [schema["const"]]}, root, depth)
    values = schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return frozenset({"string"})

    found: set[str] = set()
    for word in ("anyOf", "oneOf", "allOf"):
        options = schema.get(word)
        for option in options if isinstance(options, list) else ():
            found |= _types(option, root, depth + 1)
    return frozenset(found)


def typed(text: str, types: frozenset[str]) -> Any:
    """The value that a text stands for, if it may have one of these types."""
    if types == {"string"}:
        return text

    stripped = text.strip()
    try:
        if types == _ANY and not stripped.startswith(("{", "[")):
            value = _JSON.decode(stripped)
            end = len(stripped)
        else:
            value, end = _json_value(stripped, 0)
    except (ValueError, RecursionError):
        return text
    if end != len(stripped):
        return text
    if "string" in types and types != _ANY and not _fits(value, types - {"string"}):
        return text
    return value


def _fits(value: Any, types: frozenset[str]) -> bool:
    kind = _type(value)
    return kind in types or (kind == "integer" and "number" in types)


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def pythonic(*, around: str = "") -> Read:
    """Calls as Python has them, one after the other or in a list.

    `around` is a pattern of what may stand around them.
    """
    gap = re.compile(rf"(?:[\s,;]|{around})*") if around else _BETWEEN

    def read(text: str, _: Tools) -> list[ToolCall]:
        literals = Literals(text, _end(gap, text, 0))
        listed = literals.take("[")
        calls: list[ToolCall] = []
        while literals.at < len(text) and not (listed and literals.take("]")):
            name, arguments = literals.call()
            calls.append(make_call(name, arguments))
            literals.at = _end(gap, text, literals.at)

        if _end(gap, text, literals.at) < len(text):
            raise ValueError("there is more than calls")
        return calls

    return read


def gemma(quote: str) -> Read:
    """`call:NAME{key:value}`, with strings between two of `quote`."""

    def read(text: str, _: Tools) -> list[ToolCall]:
        literals = Literals(text.rstrip(), quote=quote)
        literals.need("call:")
        name = literals.word()
        value = literals.value()
        if literals.at < len(literals.text):
            raise ValueError("there is more than a call")
        return [make_call(name, value)]

    return read


_TAG = re.compile(r"<(/?)([^<>]*)>")


def nested_tags(noise: str) -> Read:
    """`<invoke name="NAME">` around tags that are named as the parameters: MiniMax M3.

    `noise` stands before each tag; tags without it are text. A list is made of `<item>`.
    """
    tag = re.compile(re.escape(noise) + _TAG.pattern)

    def read(text: str, tools: Tools) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = _end(_BETWEEN, text, 0)
        while at < len(text):
            match = tag.match(text, at)
            if match is None or match[1] or not match[2].startswith('invoke name="'):
                raise ValueError("a call begins otherwise")

            name = match[2].removeprefix('invoke name="').removesuffix('"')
            schema = tools.get(name, {})
            arguments, at = _children(text, match.end(), tag, schema)
            calls.append(make_call(name, arguments))
            at = _end(_BETWEEN, text, at)

        return calls

    return read


def _children(
    text: str, at: int, tag: re.Pattern[str], schema: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """The parameters up to the tag that ends the call, and the end of it."""
    # Each open tag: its name, where its text begins, and what stands in it.
    stack: list[tuple[str, int, list[tuple[str, Any]]]] = [("invoke", at, [])]
    while stack:
        match = tag.search(text, at)
        if match is None or len(stack) > MAX_TAGS:
            raise ValueError("a tag is not closed")

        at = match.end()
        if not match[1]:
            stack.append((match[2], at, []))
            continue

        name, begin, children = stack.pop()
        if match[2] != name:
            raise ValueError("tags overlap")
        if not stack:
            return dict(children), at

        value: Any = text[begin : match.start()]
        if children:
            value = _container(children)
        else:
            types = types_of(schema, name) if len(stack) == 1 else _ANY
            value = typed(value, types)
        stack[-1][2].append((name, value))

    raise ValueError("a tag is not closed")


MAX_TAGS: Final = 64


def _container(children: list[tuple[str, Any]]) -> Any:
    if all(name == "item" for name, _ in children):
        return [value for _, value in children]
    return dict(children)
