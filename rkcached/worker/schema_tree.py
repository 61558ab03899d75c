"""Walks through a JSON schema: its keywords, its parts, and references that go with it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_DATA = frozenset({"enum", "const", "default", "examples"})
# Keywords whose values are schemas by name.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every keyword and its value, at any depth.

    A key of `patternProperties` comes as a pattern, too. Names of properties and of definitions are
    no keywords, and values that are data hold none.
    """
    waiting = [schema]
    while waiting:
        here = waiting.pop()
        if isinstance(here, list):
            waiting += here
        if not isinstance(here, dict):
            continue
        for key, value in here.items():
            yield key, value
            if key in _DATA:
                continue
            named = key in _NAMED and isinstance(value, dict)
            waiting += value.values() if named else (value,)
            if key == "patternProperties" and isinstance(value, dict):
                yield from (("pattern", pattern) for pattern in value)


def parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, at any depth, each with its JSON pointer."""
    waiting: list[tuple[str, Any, bool]] = [("", schema, True)]
    while waiting:
        place, here, is_schema = waiting.pop()
        if isinstance(here, list):
            waiting += [(f"{place}/{at}", value, True) for at, value in enumerate(here)]
        if not isinstance(here, dict):
            continue

        if is_schema:
            yield place, here
        for key, value in here.items():
            if is_schema and key in _DATA:
                continue
            name = key.replace("~", "~0").replace("/", "~1")
            waiting.append((f"{place}/{name}", value, not (is_schema and key in _NAMED)))


def relocated(schema: Any, place: str) -> Any:
    """A copy of a schema whose references still work when it stands at `place` of another one."""
    if isinstance(schema, list):
        return [relocated(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema

    copy = {key: relocated(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        copy["$ref"] = place + reference[1:]
    return copy
