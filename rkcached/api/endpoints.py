"""Declares endpoints beside their handlers, and makes of them the routes and /openapi.json.

A declaration names the records of the body and of the answers, and handlers use the same records,
so the description cannot promise anything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rkcached import __version__
from rkcached.api.bodies import ERROR_BODY, error_body
from rkcached.api.callers import check_model, may_change
from rkcached.api.responses import ErrorAnswer
from rkcached.errors import RequestError

Handler = Callable[[Request], Awaitable[Response]]
Method = TypeVar("Method", bound=Callable[..., Awaitable[Response]])

EVENT_STREAM = "text/event-stream"
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
_TEXT = {"type": "string"}

_FORM_MEDIA = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
"""A browser sends these to other sites without asking them first (Fetch standard)."""


_DECLARED = "rkcached_endpoint"


def _undeclared(_: Request) -> Awaitable[Response]:
    raise NotImplementedError  # a defect: an endpoint that was never put above a method


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """An interface whose clients know its errors by their form."""

    error_record: type[BaseModel]
    error_body: Callable[[RequestError], dict[str, Any]]


OPENAI = Surface(error_record=ErrorAnswer, error_body=error_body)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A declaration. As a decorator, it declares the method below as its handler."""

    method: str
    path: str
    """As Starlette writes it: `/v1/cache/{model}`; `{name:path}` takes slashes."""
    _: KW_ONLY
    summary: str
    answers: Mapping[int, type[BaseModel] | None]
    """By status; None for one that has no JSON."""
    body: type[BaseModel] | None = None
    media: tuple[str, ...] = ()
    """Media types of the first answer other than JSON."""
    errors: tuple[int, ...] = ()
    """Without 500, which every endpoint can answer."""
    admin: bool = False
    """It changes something, so the socket for everyone refuses it, but for admin keys."""
    of_all_models: bool = False
    """It shows all models, so it refuses keys that are only for some."""
    surface: Surface = OPENAI
    handler: Callable[..., Awaitable[Response]] = _undeclared

    def __call__(self, handler: Method) -> Method:
        setattr(handler, _DECLARED, replace(self, handler=handler))
        return handler


endpoint = Endpoint


def declared_endpoint(handler: Handler) -> Endpoint:
    """The declaration of this handler by `endpoint`."""
    declared: Endpoint = getattr(handler, _DECLARED)
    return declared


def endpoints_of(handlers: object) -> list[Endpoint]:
    """The endpoints that methods of this object declare, in the order of its class."""
    names = [name for name, method in vars(type(handlers)).items() if hasattr(method, _DECLARED)]
    methods = [getattr(handlers, name) for name in names]
    return [replace(declared_endpoint(method), handler=method) for method in methods]


def routes(endpoints: Iterable[Endpoint], *, admin_socket: Path | None) -> list[Route]:
    """One route for each path; with `admin_socket`, changes are refused and referred to it.

    Of several routes that match, the first one wins, so `{name:path}` comes last.
    """

    def for_admins(handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            if not may_change(request):
                raise RequestError(
                    403,
                    f"changes are made on {admin_socket} only",
                    code="admin_only",
                    hint="send the request there, or over TCP with an admin key",
                )
            return await handler(request)

        return checked

    by_path: dict[str, dict[str, Handler]] = defaultdict(dict)
    surfaces: dict[str, Surface] = {}
    for declared in endpoints:
        handler = declared.handler
        if declared.admin:
            handler = _json_only(handler)
            if admin_socket is not None:
                handler = for_admins(handler)
        by_path[declared.path][declared.method] = handler
        surfaces[declared.path] = declared.surface

    paths = sorted(by_path, key=lambda path: ":path}" in path)
    shows_all = {declared.path for declared in endpoints if declared.of_all_models}
    return [
        _route(path, by_path[path], surfaces[path], shows_all=path in shows_all) for path in paths
    ]


def _json_only(handler: Handler) -> Handler:
    """Refuse a body that a form of any web page can send, for what changes something."""

    async def checked(request: Request) -> Response:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media in _FORM_MEDIA:
            raise RequestError(
                415,
                f"this endpoint takes no body of the type {media}",
                code="unsupported_media_type",
                hint="send the header content-type: application/json",
            )
        return await handler(request)

    return checked


def _route(path: str, handlers: dict[str, Handler], surface: Surface, *, shows_all: bool) -> Route:
    """`shows_all`: it refuses keys that are only for some models."""

    async def dispatch(request: Request) -> Response:
        request.scope[ERROR_BODY] = surface.error_body
        if shows_all or "model" in request.path_params:
            check_model(request, request.path_params.get("model"))
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request)

    return Route(path, dispatch, methods=list(handlers))


def describe(endpoints: Iterable[Endpoint], *, everyone: bool) -> dict[str, Any]:
    """The OpenAPI document. `everyone`: of the socket on which changes are refused."""
    endpoints = tuple(endpoints)
    # mypy takes the pairs for tuple[..., str]: a literal is lost in sorted()
    names, schemas = models_json_schema(
        _records(endpoints),  # type: ignore[arg-type]  # see above
        ref_template="#/components/schemas/{model}",
    )

    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for declared in endpoints:
        path = declared.path.replace(":path}", "}")
        refused = everyone and declared.admin
        paths[path][declared.method.lower()] = _operation(declared, names, refused=refused)

    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rkcached",
            "version": __version__,
            "description": "Language models with prompt caches that are kept fresh, "
            "on a Unix socket.",
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


def _records(endpoints: Iterable[Endpoint]) -> list[tuple[type[BaseModel], str]]:
    """The records of all bodies and answers, each with its mode in Pydantic."""
    records: set[tuple[type[BaseModel], str]] = set()
    for declared in endpoints:
        records.add((declared.surface.error_record, "serialization"))
        if declared.body is not None:
            records.add((declared.body, "validation"))
        for record in declared.answers.values():
            if record is not None:
                records.add((record, "serialization"))
    return sorted(records, key=lambda pair: (pair[0].__name__, pair[1]))


def _operation(declared: Endpoint, names: Mapping[Any, Any], *, refused: bool) -> dict[str, Any]:
    """One operation of the document. `refused`: it answers with 403 on this socket."""
    responses = {}
    for status, record in declared.answers.items():
        schema = names[record, "serialization"] if record else None
        responses[str(status)] = _answer(status, schema, declared.media)

    failures = {500, *declared.errors}
    if declared.body is not None:
        failures |= {400, 413, 415}
    if refused:
        failures.add(403)
    error = names[declared.surface.error_record, "serialization"]
    responses |= {str(status): _answer(status, error, ()) for status in sorted(failures)}

    operation: dict[str, Any] = {
        "summary": declared.summary,
        "operationId": declared.handler.__name__.strip("_"),
        "responses": responses,
    }
    if parameters := _parameters(declared.path):
        operation["parameters"] = parameters
    if declared.body is not None:
        schema = names[declared.body, "validation"]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _parameters(path: str) -> list[dict[str, Any]]:
    """The parameters in a path, as Starlette writes it."""
    steps = [step for step in path.split("/") if step.startswith("{")]
    return [
        {
            "name": step[1:-1].removesuffix(":path"),
            "in": "path",
            "required": True,
            "schema": {"type": "string"},
        }
        for step in steps
    ]


def _answer(
    status: int, schema: Mapping[str, Any] | None, media: tuple[str, ...]
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for kind in media:
        content[kind] = {"schema": _EVENT if kind == EVENT_STREAM else _TEXT}
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
