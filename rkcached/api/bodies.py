"""Makes a JSON body a record, or an error that names the first bad parameter. Pure.

A body may come from anyone, and all of this runs on the event loop, so its cost must depend on its
size alone: the values of a body are counted while it arrives, it is parsed once, and validation
ends with the first bad item of a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from rkcached.api.requests import GenerationRequest, NeutralOnly
from rkcached.errors import RequestError
from rkcached.messages.bounds import ArgumentsBudget
from rkcached.messages.faults import first_fault
from rkcached.messages.record import MAX_KEYS, Record
from rkcached.messages.strict_json import strict_json
from rkcached.serving.failures import IGNORE_IT
from rkcached.sources.names import meant

Body = TypeVar("Body", bound=Record)

ERROR_BODY: Final = "rkcached.error_body"
"""Key of the request's scope for what gives an error the form that its endpoint's clients know."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"

_MAX_NAMED: Final = 64
"""Letters of a parameter that an answer names."""

_AN_OBJECT: Final = 'send one JSON object, such as {"model": ...}'

_LEAVE_OUT: Final = f"leave it out, or set {IGNORE_IT}"


def parse_body(record: type[Body], data: bytes, *, ignores_unsupported: bool = False) -> Body:
    """Decode and validate a JSON body.

    `ignores_unsupported`: parameters of a generation that are not supported are left out, and noted
    in the record. Errors: RequestError 400 that names the first bad parameter.
    """
    text = data.removeprefix(_BYTE_ORDER_MARK)
    if not text.strip():
        raise RequestError(400, "the request has no body", code="invalid_json", hint=_AN_OBJECT)
    try:
        value = strict_json(text)
    except ValueError as error:
        raise RequestError(
            400, f"the body is not JSON: {error}", code="invalid_json", hint=_AN_OBJECT
        ) from error

    ignored: tuple[str, ...] = ()
    if ignores_unsupported and issubclass(record, GenerationRequest):
        ignored = _unsupported(record, value)
        value = {name: item for name, item in value.items() if name not in ignored}
    return valid(record, value, ignored)


def valid(record: type[Body], value: Any, ignored: Iterable[str] = ()) -> Body:
    """The record of a body. `ignored`: what its client sent besides, and nothing is done about.

    Errors: RequestError 400 that names the first bad parameter.
    """
    try:
        body = record.model_validate(value, context=ArgumentsBudget())
    except ValidationError as error:
        raise _refusal(record, value, error) from error

    if isinstance(body, GenerationRequest):
        body.note_ignored(tuple(name[:_MAX_NAMED] for name in ignored))
    return body


def _unsupported(record: type[GenerationRequest], body: Any) -> tuple[str, ...]:
    """The parameters that are unknown, or that have a value that would change the answer."""
    if not isinstance(body, dict) or len(body) > MAX_KEYS:
        return ()  # it is refused as a whole

    fields = record.__pydantic_fields__
    unknown = [name for name, item in body.items() if name not in fields and item is not None]
    neutral = {name: body[name] for name in NeutralOnly.__pydantic_fields__ if name in body}
    try:
        NeutralOnly.model_validate(neutral)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        unknown += dict.fromkeys(str(fault["loc"][0]) for fault in faults)
    return tuple(unknown)


def _refusal(record: type[Record], value: Any, error: ValidationError) -> RequestError:
    fault = first_fault(value, error)
    param = fault.place
    if issubclass(record, GenerationRequest):
        first = (param or "").partition(".")[0]
        if first in NeutralOnly.__pydantic_fields__:
            return RequestError(
                400,
                f"this value of {first} is not supported",
                code="unsupported_parameter",
                param=first,
                hint=_LEAVE_OUT,
            )
        if fault.kind == "extra_forbidden" and param == first:
            return _unknown(record, first, _LEAVE_OUT)

    match fault.kind:
        case "extra_forbidden":
            return _unknown(record, param or "", "leave it out")
        case "missing":
            return RequestError(
                400,
                f"{param} is missing",
                code="missing_parameter",
                param=param,
                hint="add it to the body",
            )
        case _:
            what = f"{param}:" if param else "the body"
            return RequestError(
                400,
                f"{what} {fault.words}",
                code="invalid_value",
                param=param,
                hint="" if param or fault.kind == "value_error" else _AN_OBJECT,
            )


def _unknown(record: type[Record], param: str, remedy: str) -> RequestError:
    """The error of a parameter that nobody knows; it may be a misspelling of one that is known."""
    if near := meant(param, record.__pydantic_fields__):
        remedy = f"did you mean {near!r}? Otherwise {remedy}"
    return RequestError(
        400,
        f"{param} is not supported",
        code="unsupported_parameter",
        param=param,
        hint=remedy,
    )


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
