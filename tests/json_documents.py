"""Holds what commands print with `--json` to the schemas that `rkcached schema` prints.

A schema lets a form have more fields, as a later version may; here it may not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator

from rkcached.cli import schema

_ENDED_BY_OTHERS = (130, 141)


def check(arguments: Sequence[str], *, code: int, stdout: str, stderr: str) -> None:
    """A command with --json printed its document, or one line about its failure."""
    if stdout:
        check_document(name_of(arguments), json.loads(stdout))
    elif code not in _ENDED_BY_OTHERS:
        assert code != 0, arguments
        failed = json.loads(stderr.splitlines()[-1])
        check_document(schema.ERROR, failed)
        assert failed["error"]["exit_code"] == code


def check_document(name: str, document: Any) -> None:
    """It has the form of this command, and begins with its number."""
    validator(name).validate(document)
    assert next(iter(document)) == "format"
    assert document["format"] == schema.format_of(name)


def name_of(arguments: Sequence[str]) -> str:
    """The command of a command line, as `rkcached schema` names it."""
    return next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in schema.FORMS)


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """It refuses fields that the form does not have."""
    return Draft202012Validator(closed(schema.schema_of(name)))


def closed(form: Any) -> Any:
    """The schema, without room for further fields."""
    if isinstance(form, list):
        return [closed(part) for part in form]
    if not isinstance(form, dict):
        return form

    parts = {key: closed(value) for key, value in form.items()}
    if isinstance(form.get("properties"), dict) and form.get("type") == "object":
        parts.setdefault("additionalProperties", False)
    return parts
