"""JSON bodies in and errors out: a body becomes a record, or an error that names the first bad parameter. Pure."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rkcached.errors import RequestError

Body = TypeVar("Body", bound=BaseModel)


def parse_body(record: type[Body], data: bytes) -> Body:
    """Decode and validate a JSON body. Errors: RequestError 400 that names the first bad parameter."""
    try:
        return record.model_validate_json(data)
    except ValidationError as error:
        param, first = _most_telling(data, error)
        match first["type"]:
            case "json_invalid":
                raise RequestError(
                    400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json"
                ) from error
            case "extra_forbidden":
                raise RequestError(
                    400, f"{param} is not supported", code="unsupported_parameter", param=param
                ) from error
            case "missing":
                raise RequestError(400, f"{param} is missing", code="missing_parameter", param=param) from error
            case _:
                raise RequestError(
                    400, f"{param or 'the body'}: {first['msg']}", code="invalid_value", param=param
                ) from error


def _most_telling(data: bytes, error: ValidationError) -> tuple[str | None, ErrorDetails]:
    """The first problem and its place. Of a union's alternatives, the one that came furthest."""
    found = [(_parameter(data, e["loc"], missing=e["type"] == "missing"), e) for e in error.errors(include_url=False)]
    place = found[0][0]
    same = [(param, e) for param, e in found if f"{param}.".startswith(f"{place}.")]
    param, telling = max(same, key=lambda one: (one[0].count("."), not one[1]["type"].endswith("_type")))
    return param or None, telling


def _parameter(data: bytes, steps: tuple[str | int, ...], *, missing: bool) -> str:
    """The place in the body; empty for the body itself.

    Between its steps pydantic names the alternatives of unions, which are left out.
    """
    try:
        here = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    found = []
    for at, step in enumerate(steps):
        inside = (isinstance(here, dict) and step in here) or (isinstance(here, list) and isinstance(step, int))
        if inside:
            here = here[step]
        if inside or (missing and at == len(steps) - 1):
            found.append(str(step))
    return ".".join(found)


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    message = error.message + (f" ({error.hint})" if error.hint else "")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
