"""Keeps what programs may rely on of each command's JSON: tests/unit/json_formats.json.

A form may gain fields. When it loses one, or the type or a value of one, its format number must be
raised where the form is declared; this script refuses to write the file until then, and the tests
fail. Run it after a change to a form:

    python scripts/json_formats.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rkcached.cli import schema

FILE = Path(__file__).parents[1] / "tests" / "unit" / "json_formats.json"


def formats() -> dict[str, dict[str, Any]]:
    """Of each command: its format number, and all that can be relied on, each fact a line."""
    return {
        name: {"format": schema.format_of(name), "facts": facts(schema.schema_of(name))}
        for name in schema.FORMS
    }


def facts(form: Mapping[str, Any]) -> list[str]:
    """The fields of a form with their types, `?` behind those that may be absent, and words."""
    return sorted(set(_facts(form, form, "")))


def broken(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """The promises that no longer hold although the format number is the same."""
    for name, kept in before.items():
        if name not in now:
            yield f"{name}: it has no --json any more"
        elif kept["format"] == now[name]["format"]:
            lost = set(kept["facts"]) - set(now[name]["facts"])
            yield from (f"{name}: no longer so: {fact}" for fact in sorted(lost))


def _facts(
    node: Mapping[str, Any], form: Mapping[str, Any], way: str, mark: str = ""
) -> Iterator[str]:
    """Those of one part, which `way` leads to; `mark` is `?` where it may be absent."""
    options = list(_options(node, form))
    kinds = {kind for option in options if (kind := _kind(option))}
    yield f"{way}{mark}: {' or '.join(sorted(kinds)) or 'anything'}"

    for option in options:
        for value in [*option.get("enum", ()), *([option["const"]] if "const" in option else ())]:
            yield f"{way} = {json.dumps(value)}"
        for name, child in option.get("properties", {}).items():
            absent = "" if name in option.get("required", ()) else "?"
            yield from _facts(child, form, f"{way}.{name}", absent)
        if "items" in option:
            yield from _facts(option["items"], form, f"{way}[]")
        if isinstance(option.get("additionalProperties"), dict):
            yield from _facts(option["additionalProperties"], form, f"{way}.*")


def _options(node: Mapping[str, Any], form: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The forms that this part can have."""
    if "$ref" in node:
        node = form["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" not in node:
        yield node
    for option in node.get("anyOf", ()):
        yield from _options(option, form)


def _kind(option: Mapping[str, Any]) -> str:
    """Its JSON type; a msgspec enumeration states only values."""
    values = option.get("enum") or [None]
    named = {str: "string", int: "integer"}
    return str(option.get("type") or named.get(type(values[0]), ""))


def main() -> int:
    now = formats()
    if FILE.exists():
        losses = list(broken(json.loads(FILE.read_text(encoding="utf-8")), now))
        for loss in losses:
            print(loss, file=sys.stderr)
        if losses:
            print("raise the format number of each, or keep what it had", file=sys.stderr)
            return 1

    FILE.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
