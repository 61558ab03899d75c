"""Whether an answer is the JSON that its request asked for.

Runs in the worker: a schema comes from a client, and some take for ever to check. The check has a
time limit, and the daemon never evaluates a schema itself. `schemas` has checked the schema before;
if a library raises an error here all the same, the schema is invalid, and the worker goes on.
Nothing is fetched: a `$ref` leads inside the schema or nowhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jsonschema
import pydantic_core
import referencing
from jsonschema.protocols import Validator

from rkcached.errors import SchemaInvalid, SchemaMismatch
from rkcached.worker.schemas import MAX_SCHEMA_BYTES, no_constant, shortened

CHECK_LIMIT_S = 5.0
"""Patterns and alternatives can make a check take for ever."""

_DRESSED = (
    re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL),
    re.compile(r"<tool_call>(.*)</tool_call>", re.DOTALL),
    re.compile(r"<\|python_tag\|>(.*)", re.DOTALL),
)
# What models put around JSON.


class JsonAnswer:
    """One schema. Errors: SchemaInvalid."""

    def __init__(self, schema: str) -> None:
        if len(schema.encode()) > MAX_SCHEMA_BYTES:
            raise SchemaInvalid(
                f"the schema is larger than {MAX_SCHEMA_BYTES:,} bytes", hint="simplify it"
            )
        self._validator = _validator(schema)

    def check(self, text: str) -> str:
        """The JSON in `text`, without reasoning, tags and fences around it.

        Errors: SchemaMismatch; SchemaInvalid if the check takes too long.
        """
        answer = text.rpartition("</think>")[2].strip()
        for dress in _DRESSED:
            if dressed := dress.fullmatch(answer):
                answer = dressed[1].strip()

        try:
            value = json.loads(answer, parse_constant=no_constant, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise SchemaMismatch(
                f"the answer is not JSON: {error}", text=text, hint=_HINT
            ) from error

        try:
            with _limited():
                problem = next(iter(self._validator.iter_errors(value)), None)
        except _TooLongError as error:
            raise SchemaInvalid(
                f"the answer cannot be checked within {CHECK_LIMIT_S:g} s",
                hint="use simpler patterns and alternatives",
            ) from error
        except _ENDS:
            raise
        except BaseException as error:  # compiled libraries raise what they like
            raise SchemaInvalid(
                f"the schema cannot be checked: {type(error).__name__}: {error}"
            ) from error

        if problem is not None:
            raise SchemaMismatch(
                f"the answer does not fit the schema: {_words(problem)}", text=text, hint=_HINT
            )
        return answer

    def check_beginning(self, text: str) -> None:
        """Whether `text`, which was cut short, can go on to be JSON. Errors: SchemaMismatch."""
        try:
            pydantic_core.from_json(text.strip() or "{", allow_partial="trailing-strings")
        except ValueError as error:
            raise SchemaMismatch(
                f"the answer is not JSON: {error}", text=text, hint=_HINT
            ) from error


_HINT = "ask again, leave out stop, allow more tokens, or say in the messages what JSON to write"


_ENDS = (KeyboardInterrupt, SystemExit)


class _TooLongError(Exception):
    pass


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Interrupt the body when its time is over, also within a regular expression.

    That needs a signal, so it works in a process's main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_number: int, _frame: object) -> NoReturn:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, CHECK_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _validator(schema: str) -> Validator:
    try:
        value: Any = json.loads(schema)
        kind = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
        kind.check_schema(value)
        return kind(value, registry=referencing.Registry())
    except jsonschema.SchemaError as error:
        raise SchemaInvalid(f"not a JSON schema: {_words(error)}") from error
    except _ENDS:
        raise
    except BaseException as error:
        raise SchemaInvalid(f"not a JSON schema: {error}") from error


def _words(problem: Any) -> str:
    return f"{problem.json_path}: {shortened(str(problem.message))}"


def _finite(text: str) -> float:
    """Reject a number that a float cannot hold: arithmetic with infinity fails within a schema."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value
