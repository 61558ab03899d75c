"""Makes a JSON body a record, or an error that names the first bad parameter. Pure.

A body may come from anyone, and all of this runs on the event loop, so its cost must depend on its
size alone: the values of a body are counted while it arrives, it is parsed once, and validation
ends with the first bad item of a list.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from rkcached.api.bounds import ArgumentsBudget
from rkcached.api.record import Record
from rkcached.errors import RequestError

Body = TypeVar("Body", bound=Record)

_MAX_COMPARED = 20  # errors of one body; a union has one for each of its alternatives

# JSON's words for what pydantic calls by Python's.
_WORDS = {
    "model_type": "should be an object",
    "model_attributes_type": "should be an object",
    "dict_type": "should be an object",
    "list_type": "should be an array",
}

_MAX_QUOTED = 300  # characters of the body in an error: enough to find the place


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
                400,
                f"{param} is not supported",
                code="unsupported_parameter",
                param=param,
                hint="leave it out",
            )
        case "missing":
            return RequestError(
                400,
                f"{param} is missing",
                code="missing_parameter",
                param=param,
                hint="add it to the body",
            )
        case _:
            problem = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
            message = f"{param or 'the body'}: {_shortened(problem)}"
            return RequestError(400, message, code="invalid_value", param=param)


def _most_telling(value: Any, error: ValidationError) -> tuple[str | None, ErrorDetails]:
    """The first problem and its place. Of a union's alternatives, the one that came furthest."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    places = []
    for problem in problems[:_MAX_COMPARED]:
        missing = problem["type"] == "missing"
        places.append((_parameter(value, problem["loc"], missing=missing), problem))

    first = places[0][0]
    same = [pair for pair in places if f"{pair[0]}.".startswith(f"{first}.")]

    def depth(pair: tuple[str, ErrorDetails]) -> tuple[int, bool]:
        param, problem = pair
        return param.count("."), not problem["type"].endswith("_type")

    param, telling = max(same, key=depth)
    return param or None, telling


def _parameter(body: Any, steps: tuple[str | int, ...], *, missing: bool) -> str:
    """The place in the body; empty for the body itself.

    Between its steps pydantic names the alternatives of unions, which are left out.
    """
    here = body
    path = []
    for at, step in enumerate(steps):
        inside = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int)
        )
        if inside:
            here = here[step]
        if inside or (missing and at == len(steps) - 1):
            path.append(_shortened(str(step)))
    return ".".join(path)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_QUOTED:
        return text
    return text[:_MAX_QUOTED] + "..."


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
