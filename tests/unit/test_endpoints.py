"""Endpoints are declared beside their handlers; routes and the description are made of that."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

from rkcached.api.endpoints import describe, endpoint, endpoints_of, routes
from rkcached.errors import RequestError


class Answer(BaseModel):
    pass


class Handlers:
    def __init__(self, name: str) -> None:
        self.name = name

    @endpoint("GET", "/things/{name:path}", summary="Any.", answers={200: Answer})
    async def _any(self, request: Request) -> Response:
        return PlainTextResponse(f"{self.name} any {request.path_params['name']}")

    @endpoint("GET", "/things/all", summary="All.", answers={200: Answer})
    async def _all(self, _: Request) -> Response:
        return PlainTextResponse(f"{self.name} all")

    @endpoint("POST", "/things/all", summary="Change.", answers={200: Answer}, admin=True)
    async def _change(self, _: Request) -> Response:
        return PlainTextResponse(f"{self.name} changed")

    def helper(self) -> None:
        """Declares nothing."""


def test_declarations_come_in_order_with_bound_handlers() -> None:
    """Each object serves its own."""
    declared = endpoints_of(Handlers("x"))
    assert [(one.method, one.path, one.admin) for one in declared] == [
        ("GET", "/things/{name:path}", False),
        ("GET", "/things/all", False),
        ("POST", "/things/all", True),
    ]
    client = TestClient(Starlette(routes=routes(declared, admin_socket=None)))
    assert client.get("/things/all").text == "x all"
    assert client.post("/things/all").text == "x changed"


def test_a_path_that_takes_slashes_comes_last() -> None:
    """It would match the others, too."""
    client = TestClient(Starlette(routes=routes(endpoints_of(Handlers("y")), admin_socket=None)))
    assert client.get("/things/all").text == "y all"
    assert client.get("/things/a/b").text == "y any a/b"


def test_the_socket_for_everyone_refuses_changes() -> None:
    """It names the socket for changes; the description says 403 of that endpoint alone."""
    declared = endpoints_of(Handlers("z"))
    admin_socket = Path("/run/admin.sock")
    client = TestClient(Starlette(routes=routes(declared, admin_socket=admin_socket)))
    assert client.get("/things/all").text == "z all"
    with pytest.raises(RequestError, match=r"changes are made on /run/admin\.sock only"):
        client.post("/things/all")

    operations = describe(declared, everyone=True)["paths"]["/things/all"]
    assert "403" in operations["post"]["responses"]
    assert "403" not in operations["get"]["responses"]
    assert operations["post"]["operationId"] == "change"
