"""Makes a JSON body a record, or an error that names the first bad parameter. Pure.

A body may come from anyone, and all of this runs on the event loop, so its cost must depend on its
size alone: the values of a body are counted while it arrives, it is parsed once, and validation
ends with the first bad item of a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from rkcached.errors import RequestError
from rkcached.messages.bounds import ArgumentsBudget
from rkcached.messages.faults import first_fault
from rkcached.messages.record import Record

Body = TypeVar("Body", bound=Record)


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
    fault = first_fault(value, error)
    param = fault.place
    match fault.kind:
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
            message = f"{param or 'the body'}: {fault.words}"
            return RequestError(400, message, code="invalid_value", param=param)


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def in_words_of(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The error of a translated request, with the client's own names of its parameters.

    `names`: the client's, by those of the translation.
    """
    if error.param is None:
        return error

    name, _, _ = error.param.partition(".")
    own = names.get(name, name)
    if own == name:
        return error
    return RequestError(
        error.status,
        error.message.replace(name, own),
        code=error.code,
        param=own,
        hint=error.hint.replace(name, own),
        retry_after_s=error.retry_after_s,
    )
