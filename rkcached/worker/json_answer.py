"""Whether an answer is the JSON that its request asked for.

Runs in the worker: a schema is a client's, and some take for ever to check. A worker that does is killed by its
deadline; the daemon never evaluates a schema itself. Nothing is fetched: a `$ref` leads inside the schema or nowhere.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import referencing
from jsonschema.protocols import Validator

from rkcached.errors import SchemaInvalid, SchemaMismatch

MAX_SCHEMA_BYTES = 64 << 10

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)


class JsonAnswer:
    """One schema. Errors: SchemaInvalid."""

    def __init__(self, schema: str) -> None:
        if len(schema.encode()) > MAX_SCHEMA_BYTES:
            raise SchemaInvalid(f"the schema is larger than {MAX_SCHEMA_BYTES:,} bytes", hint="simplify it")
        self._validator = _validator(schema)

    def check(self, text: str) -> str:
        """The JSON in `text`, without the code fence that models like to put around it. Errors: SchemaMismatch."""
        fenced = _FENCED.fullmatch(text)
        said = fenced[1] if fenced else text.strip()
        try:
            value = json.loads(said, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise SchemaMismatch(f"the answer is not JSON: {error}", text=text, hint=_HINT) from error
        try:
            problem = next(iter(self._validator.iter_errors(value)), None)
        except (referencing.exceptions.Unresolvable, re.error, RecursionError) as error:
            raise SchemaInvalid(f"the schema cannot be checked: {type(error).__name__}: {error}") from error
        if problem is not None:
            raise SchemaMismatch(f"the answer does not fit the schema: {_said(problem)}", text=text, hint=_HINT)
        return said


_HINT = "ask again, allow more tokens, or say in the messages what the JSON shall contain"


def _validator(schema: str) -> Validator:
    try:
        value: Any = json.loads(schema)
        kind = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
        kind.check_schema(value)
        return kind(value, registry=referencing.Registry())
    except jsonschema.SchemaError as error:
        raise SchemaInvalid(f"not a JSON schema: {_said(error)}") from error
    except (ValueError, RecursionError, re.error) as error:
        raise SchemaInvalid(f"not a JSON schema: {error}") from error


def _said(problem: Any) -> str:
    message = str(problem.message)
    return f"{problem.json_path}: {message if len(message) <= 200 else message[:200] + '...'}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
