"""The table of endpoints, and what is made of it: the routes, and the API's own description.

An endpoint names the records of its body and of its answers, so /openapi.json cannot promise
anything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rkcached import __version__
from rkcached.api.responses import ErrorAnswer
from rkcached.errors import RequestError

Handler = Callable[[Request], Awaitable[Response]]

EVENT_STREAM = "text/event-stream"
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
_TEXT = {"type": "string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    method: str
    path: str
    """As Starlette writes it: `/v1/cache/{model}`; `{name:path}` takes slashes."""
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    answers: Mapping[int, type[BaseModel] | None] = field(default_factory=dict)
    """By status; None for one that has no JSON."""
    media: tuple[str, ...] = ()
    """What else the first answer may be than JSON."""
    errors: tuple[int, ...] = ()
    """What every endpoint can answer is not named: 500."""
    changes: bool = False
    """It changes something, so it is refused on the socket for everyone."""


def routes(endpoints: Iterable[Endpoint], *, admin_socket: Path | None) -> list[Route]:
    """One route for each path; with `admin_socket`, changes are refused and referred to it."""

    async def refused(_: Request) -> Response:
        raise RequestError(
            403, f"changes are made on {admin_socket} only", code="admin_only", hint="ask there"
        )

    by_path: dict[str, dict[str, Handler]] = defaultdict(dict)
    for endpoint in endpoints:
        allowed = admin_socket is None or not endpoint.changes
        by_path[endpoint.path][endpoint.method] = endpoint.handler if allowed else refused
    return [_route(path, handlers) for path, handlers in by_path.items()]


def _route(path: str, handlers: dict[str, Handler]) -> Route:
    async def dispatch(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, dispatch, methods=list(handlers))


def describe(endpoints: Iterable[Endpoint], *, everyone: bool) -> dict[str, Any]:
    """The OpenAPI document. `everyone`: of the socket on which changes are refused."""
    endpoints = tuple(endpoints)
    bodies = {(e.body, "validation") for e in endpoints if e.body is not None}
    answers = {
        (record, "serialization")
        for e in endpoints
        for record in e.answers.values()
        if record is not None
    }
    wanted = sorted(
        bodies | answers | {(ErrorAnswer, "serialization")},
        key=lambda pair: (pair[0].__name__, pair[1]),
    )
    # mypy takes the pairs for tuple[..., str]: a literal is lost in sorted()
    names, schemas = models_json_schema(wanted, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for endpoint in endpoints:
        paths[endpoint.path.replace(":path}", "}")][endpoint.method.lower()] = _operation(
            endpoint, names, refused=everyone and endpoint.changes
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rkcached",
            "version": __version__,
            "description": "Language models with prompt caches that are kept fresh, on a Unix socket.",
        },
        "servers": [
            {
                "url": "http://localhost",
                "description": "the host's name does not matter on a Unix socket",
            }
        ],
        "paths": dict(paths),
        "components": {"schemas": schemas["$defs"]},
    }


def _operation(endpoint: Endpoint, names: Mapping[Any, Any], *, refused: bool) -> dict[str, Any]:
    parameters = [
        {
            "name": step[1:-1].removesuffix(":path"),
            "in": "path",
            "required": True,
            "schema": {"type": "string"},
        }
        for step in endpoint.path.split("/")
        if step.startswith("{")
    ]
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__.strip("_"),
        "responses": {
            str(status): _answer(
                status, names[record, "serialization"] if record else None, endpoint.media
            )
            for status, record in endpoint.answers.items()
        },
    }
    error = names[ErrorAnswer, "serialization"]
    failures = {
        *endpoint.errors,
        *((400, 413, 415) if endpoint.body else ()),
        *((403,) if refused else ()),
        500,
    }
    operation["responses"] |= {
        str(status): _answer(status, error, ()) for status in sorted(failures)
    }
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        schema = names[endpoint.body, "validation"]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _answer(
    status: int, schema: Mapping[str, Any] | None, media: tuple[str, ...]
) -> dict[str, Any]:
    content: dict[str, Any] = {
        kind: {"schema": _EVENT if kind == EVENT_STREAM else _TEXT} for kind in media
    }
    if schema is not None:
        content["application/json"] = {"schema": schema}
    request_id = {
        "schema": {"type": "string"},
        "description": "Names this exchange, also in the daemon's log.",
    }
    return {
        "description": HTTPStatus(status).phrase,
        "headers": {"X-Request-Id": request_id},
        "content": content,
    }
