"""Which requests come from another site's page, or under another site's name."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from rkcached.api.own_site import _refusal

HOSTS = ("board.example.org",)
OURS = "localhost:8080"


def code(method: str = "POST", **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    error = _refusal(method, Headers(named), HOSTS)
    return error.code if error is not None else ""


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "rkcached",
        "d",
        "",
        "127.0.0.1:8080",
        "192.168.1.20",
        "[::1]:8080",
        "[fe80::1]",
        "app.localhost:1",
        "localhost.",
        "board.example.org",
        "Board.Example.org:443",
    ],
)
def test_names_that_nobody_else_can_make_lead_here(host: str) -> None:
    assert code(host=host) == ""
    assert code("GET", host=host) == ""


@pytest.mark.parametrize(
    "host",
    [
        "evil.example.com:8080",
        "localhost.evil.example.com",
        "127.0.0.1.evil.example.com",
        "board.example.org.evil.example.com",
        "evil.board.example.org",
        "1.2.3",
        "127.0.0.1.",
        "0x7f.1",
        "a.localhost.b.c",
        "[::1].evil.example.com",
    ],
)
def test_a_name_that_somebody_else_may_have_made_lead_here(host: str) -> None:
    """DNS rebinding: for the browser it is one site with the page that asks."""
    expected = "" if host in ("127.0.0.1.", "[::1].evil.example.com") else "foreign_host"
    assert code(host=host) == expected
    assert code("GET", host=host, sec_fetch_mode="navigate") == expected


def test_our_own_page_may_ask() -> None:
    assert code(host=OURS, origin=f"http://{OURS}", sec_fetch_site="same-origin") == ""
    assert code(host=OURS, origin="HTTP://LOCALHOST:8080") == ""
    assert code(host="board.example.org", origin="https://board.example.org") == ""
    assert code("GET", host=OURS, sec_fetch_site="none", sec_fetch_mode="navigate") == ""


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example.com",
        "null",
        "",
        "http://localhost",
        "http://localhost:8081",
        "http://127.0.0.1:8080",
        "ftp://localhost:8080",
        "http://localhost:8080.evil.example.com",
    ],
)
def test_another_page_may_not(origin: str) -> None:
    """Another port is another page, too."""
    assert code(host=OURS, origin=origin) == "foreign_origin"
    assert code("GET", host=OURS, origin=origin) == "foreign_origin"


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_another_site_may_only_lead_to_our_page(site: str) -> None:
    """By a link. It may not send a form, nor take our answers for pictures or scripts."""
    link = {"host": OURS, "sec_fetch_site": site}
    assert code("GET", **link, sec_fetch_mode="navigate") == ""
    assert code("POST", **link, sec_fetch_mode="navigate") == "foreign_origin"
    assert code("GET", **link, sec_fetch_mode="no-cors") == "foreign_origin"
    assert code("GET", **link) == "foreign_origin"
