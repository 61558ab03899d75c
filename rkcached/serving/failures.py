"""Maps every error that can end a request to a RequestError: status, code, param and hint."""

from __future__ import annotations

from collections.abc import Sequence

from rkcached import errors
from rkcached.errors import RequestError, counted

IGNORE_IT = "serving.unsupported: ignore in the manifest"
"""The next step for a program that cannot leave a parameter out."""

# Status, code, param, and the seconds until a retry makes sense.
_STATUS: dict[type[errors.RkcachedError], tuple[int, str, str | None, int]] = {
    errors.InputInvalid: (400, "invalid_value", "input", 0),
    errors.SchemaMismatch: (422, "answer_does_not_fit", None, 0),
    errors.ModelLoadError: (503, "model_unavailable", None, 5),
    errors.RuntimeLibraryError: (503, "model_unavailable", None, 5),
    errors.WorkerUnavailable: (503, "worker_unavailable", None, 5),
    errors.ModelReplaced: (503, "model_unavailable", None, 1),
    errors.WorkerTimeout: (504, "worker_timeout", None, 0),
    errors.WorkerDied: (502, "worker_died", None, 0),
}


def as_request_error(
    error: errors.RkcachedError,
    *,
    text_param: str = "messages",
    schema_param: str = "response_format",
) -> RequestError:
    """The error as the client gets it; the names are those of the request's parameters."""
    match error:
        case RequestError():
            return error
        case errors.GrammarStuck():
            return RequestError(
                400, error.message, code="invalid_schema", param=schema_param, hint=error.hint
            )
        case errors.ContextExceeded():
            return RequestError(
                400,
                f"the request has {error.tokens} tokens, the context holds {error.limit}",
                code="context_length_exceeded",
                param=text_param,
                hint=error.remedy(text_param),
            )
        case errors.SamplingFixed():
            return RequestError(
                400,
                error.message,
                code="unsupported_parameter",
                param=error.param or None,
                hint=f"{error.hint}, or set {IGNORE_IT}",
            )
        case errors.SchemaInvalid():
            return RequestError(
                400, error.message, code="invalid_schema", param=schema_param, hint=error.hint
            )
        case _:
            unknown = (500, "engine_error", None, 0)
            status, code, param, retry_after_s = _STATUS.get(type(error), unknown)
            return RequestError(
                status,
                error.message,
                code=code,
                param=param,
                hint=error.hint,
                retry_after_s=retry_after_s,
            )


QUEUES = 4
"""So many full queues of users may wait together."""


def refuse_beyond_the_queue(model: str, owners: Sequence[int], owner: int, limit: int) -> None:
    """Errors: RequestError, if too many wait for the model already.

    `owners`: the users whose requests wait; `owner`: who sent this one; `limit`: serving.queue.
    """
    own = owners.count(owner)
    if own < limit and len(owners) < QUEUES * limit:
        return

    waiting = f"{counted(own, 'request')} of this user wait"
    hint = "try again in a moment; serving.queue in the manifest is the limit"
    if own < limit:
        waiting = f"{len(owners)} requests of all users wait"
        hint = f"try again in a moment; {QUEUES} times serving.queue in the manifest is the limit"
    raise RequestError(
        503,
        f"{waiting} for the model {model!r} already",
        code="queue_full",
        hint=hint,
        retry_after_s=1,
    )


def timed_out(limit_s: float, *, hint: str) -> RequestError:
    return RequestError(
        504,
        f"the request was not answered within {limit_s:g} s",
        code="request_timeout",
        hint=hint,
    )


def stopping() -> RequestError:
    return RequestError(
        503, "the daemon is stopping", code="shutting_down", hint="try again", retry_after_s=2
    )
