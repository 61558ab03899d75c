"""The example manifest documents every key there is, with what it accepts and its default.

The convention: right above a key stands a comment block whose first line is `# key: bounds, default
value` or `# key: bounds, required`. That line is computed here from the JSON schema, so a new key,
bound or default that the example does not tell fails a test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rkcached.sources.manifest import Manifest, json_schema
from rkcached.sources.parser import parse

EXAMPLE = Path(__file__).parents[2] / "etc" / "rkcached" / "manifest.example.yaml"
TEXT = EXAMPLE.read_text(encoding="utf-8")
SCHEMA = json_schema()
INSTANCES = {
    "models": "qwen3-0.6b",
    "prompts": "coding_rules",
}  # where the example shows every key of a named thing
ELSEWHERE = {
    "embedding": "qwen3-embedding-0.6b",
    "rerank": "qwen3-embedding-0.6b",
    "pooling": "qwen3-embedding-0.6b",
}  # keys that a model of prompts lacks


def alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The plain schemas that `schema` allows, without null."""
    if "$ref" in schema:
        return alternatives(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [plain for option in schema["anyOf"] for plain in alternatives(option)]
    return [] if schema.get("type") == "null" else [schema]


def listed(items: dict[str, Any]) -> str:
    if items["type"] == "integer":
        return "numbers"
    if "://" in items.get("pattern", ""):
        return "origins"
    if items.get("pattern", "").startswith("^RW"):
        return "keys"
    return "names" if "pattern" in items else "paths"


def bounds(key: str, schema: dict[str, Any]) -> str:
    """What a key accepts, in the words of the example."""
    match {option["type"]: option for option in alternatives(schema)}:
        case {"object": _}:
            return "mapping"
        case {"boolean": _, "array": option}:
            return f"true | false, a name or {option['minItems']}..{option['maxItems']} names"
        case {"array": option}:
            noun = listed(option["items"])
            return f"{schema.get('minItems', 0)}..{option['maxItems']} {noun}"
        case {"integer": option} | {"number": option}:
            return span(key, option)
        case {"boolean": _}:
            return "true | false"
        case {"string": {"enum": values}}:
            return " | ".join(values)
        case {"string": {"format": "path"}}:
            return "path"
        case {"string": {"maxLength": length}}:
            return f"text of 0..{length} characters"
        case {"string": _}:
            return "text"
    raise AssertionError(f"no words for {schema}")


def span(key: str, schema: dict[str, Any]) -> str:
    match schema:
        case {"const": value}:
            return f"{value}"
        case {"minimum": low, "maximum": high} if key.endswith("_bytes"):
            assert (low, high) == (2**20, 2**60)
            return "1 MiB..1 EiB"
        case {"minimum": low, "maximum": high}:
            return f"{low}..{high}"
    return f"more than {schema['exclusiveMinimum']} to {schema['maximum']}"


def default(steps: tuple[str, ...], schema: dict[str, Any], *, required: bool) -> str:
    match schema.get("default"):
        case _ if required:
            return "required"
        case None if "default" not in schema:
            return "default empty"
        case None:
            of_prompt = "prompts" in steps and "params" in steps
            return "default the model's" if of_prompt else "default none"
        case bool() as value:
            return f"default {json.dumps(value)}"
        case int() | float() as number:
            return f"default {number:g}"
        case str(word) if schema.keys() & {"$ref", "enum"}:
            return f"default {word}"
        case value:
            return f"default {json.dumps(value)}"


def documented(
    schema: dict[str, Any], steps: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key that the schema knows, as the way to it in the example.

    The line that must stand above it.
    """
    for option in alternatives(schema):
        for key, child in option.get("properties", {}).items():
            here = (
                (*steps[:-1], ELSEWHERE[key], key)
                if steps[:1] == ("models",) and key in ELSEWHERE
                else (*steps, key)
            )
            line = (
                f"# {key}: {bounds(key, child)}, "
                f"{default(here, child, required=key in option.get('required', []))}"
            )
            yield here, line
            yield from documented(child, here)
        named = (
            option.get("patternProperties", {}) if steps else {}
        )  # at the top: keys of the administrator's own
        for child in named.values():
            yield from documented(child, (*steps, INSTANCES[steps[-1]]))


KEYS = dict(documented(SCHEMA))


@pytest.fixture(scope="module")
def example() -> Manifest:
    return parse(TEXT, file=EXAMPLE)


def test_the_example_parses(example: Manifest) -> None:
    """The shipped example is a manifest without problems."""
    assert list(example.models) == ["qwen3-0.6b", "qwen3-embedding-0.6b", "smollm2-135m"]
    assert (
        example.models["qwen3-0.6b"].prompts["system"].files[0]
        == EXAMPLE.parent / "prompts" / "system.md"
    )


def test_the_walk_finds_the_keys() -> None:
    """The schema is walked to its leaves: a key of each section is among those to be documented."""
    known = set(KEYS)
    assert {("version",), ("engine", "kind"), ("cache", "max_bytes")} <= known
    assert ("models", "qwen3-0.6b", "prompts", "coding_rules", "params", "top_k") in known


def test_keys_for_anchors_are_documented(example: Manifest) -> None:
    """The schema's pattern is no key; the example shows one, and a model that uses its anchor."""
    assert SCHEMA["patternProperties"] == {"^x-": {}}
    assert "\n# x-...: anything\n" in TEXT
    assert example.models["smollm2-135m"].params.top_k == 20


@pytest.mark.parametrize("steps", KEYS, ids=".".join)
def test_each_key_is_documented(example: Manifest, steps: tuple[str, ...]) -> None:
    """Each key is in the example.

    Its comment begins with its bounds and default as the schema has them.
    """
    number = example.line_of(*steps)
    lines = TEXT.splitlines()
    assert lines[number - 1].strip().startswith(f"{steps[-1]}:"), (
        f"{'.'.join(steps)} is not in the example"
    )
    first = number - 1
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    assert KEYS[steps] == lines[first].strip()
