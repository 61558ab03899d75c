"""JSON bodies in and errors out: a body becomes a record, or an error that names the first bad parameter. Pure.

A body is a stranger's, and all of this runs on the event loop, so its cost is bounded by its size alone: the values
of a body are counted while it arrives, it is parsed once, and validation ends with the first bad item of a list.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from rkcached.api.bounds import ArgumentsBudget
from rkcached.api.requests import Record
from rkcached.errors import RequestError

Body = TypeVar("Body", bound=Record)

_LOOKED_AT = 20
"""So many errors of one body are compared; a union has one for each of its alternatives."""

_WORDS = {
    "model_type": "should be an object",
    "model_attributes_type": "should be an object",
    "dict_type": "should be an object",
    "list_type": "should be an array",
}
"""JSON's words for what pydantic calls by Python's."""

_SHOWN_CHARACTERS = 300
"""An error may quote the body; this much of it is enough to find the place."""


def parse_body(record: type[Body], data: bytes) -> Body:
    """Decode and validate a JSON body.

    Errors: RequestError 400 that names the first bad parameter.
    """
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="invalid_json") from error

    try:
        return record.model_validate(value, context=ArgumentsBudget())
    except ValidationError as error:
        raise _refusal(value, error) from error


def _refusal(value: Any, error: ValidationError) -> RequestError:
    param, first = _most_telling(value, error)
    match first["type"]:
        case "extra_forbidden":
            return RequestError(
                400, f"{param} is not supported", code="unsupported_parameter", param=param
            )
        case "missing":
            return RequestError(400, f"{param} is missing", code="missing_parameter", param=param)
        case _:
            problem = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
            message = f"{param or 'the body'}: {_shortened(problem)}"
            return RequestError(400, message, code="invalid_value", param=param)


def _most_telling(value: Any, error: ValidationError) -> tuple[str | None, ErrorDetails]:
    """The first problem and its place. Of a union's alternatives, the one that came furthest."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)[
        :_LOOKED_AT
    ]
    found = [(_parameter(value, e["loc"], missing=e["type"] == "missing"), e) for e in problems]
    place = found[0][0]
    same = [(param, e) for param, e in found if f"{param}.".startswith(f"{place}.")]
    param, telling = max(
        same, key=lambda one: (one[0].count("."), not one[1]["type"].endswith("_type"))
    )
    return param or None, telling


def _parameter(body: Any, steps: tuple[str | int, ...], *, missing: bool) -> str:
    """The place in the body; empty for the body itself.

    Between its steps pydantic names the alternatives of unions, which are left out.
    """
    here = body
    found = []
    for at, step in enumerate(steps):
        inside = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int)
        )
        if inside:
            here = here[step]
        if inside or (missing and at == len(steps) - 1):
            found.append(_shortened(str(step)))
    return ".".join(found)


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return text[:_SHOWN_CHARACTERS] + "..."


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    message = error.message + (f" ({error.hint})" if error.hint else "")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
