"""Web pages of others in a real browser, and what they get out of the daemon through its port."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Port
from conftest import Workspace

from tests.waiting import wait_until

QUESTION = json.dumps(
    {"model": "m/a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
)


class _EmptyPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>other</title><body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of another web server, whose pages are empty."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def answered(space: Workspace) -> int:
    return space.log_text().count("path=/v1/chat/completions status=200")


def refused(space: Workspace) -> int:
    return space.log_text().count(" status=403 ")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_of_another_site(
    two_prompts: Workspace, elsewhere: int, tmp_path: Path, host: str
) -> None:
    """It can send no question, not as a form either, and reads nothing. A link is harmless.

    For a browser another port is the same site, and another name is not.
    """
    with Port(two_prompts.socket) as port, Browser(tmp_path / "profile") as browser:
        browser.open(f"http://{host}:{elsewhere}/")
        ask = (
            f"fetch('{port.url}v1/chat/completions', {{method: 'POST', mode: MODE, body: BODY}})"
            ".then((answer) => answer.type, (error) => 'failed')"
        ).replace("BODY", json.dumps(QUESTION))
        assert browser.run(ask.replace("MODE", "'no-cors'")) == "opaque"
        assert browser.run(ask.replace("MODE", "'cors'")) == "failed"
        wait_until(lambda: refused(two_prompts) == 2, "both were refused")
        assert answered(two_prompts) == 0

        picture = (
            f"new Promise((done) => {{ const i = new Image(); i.src = '{port.url}v1/status';"
            " i.onload = i.onerror = (event) => done(event.type) })"
        )
        assert browser.run(picture) == "error"
        wait_until(lambda: refused(two_prompts) == 3, "the picture was refused")

        form = (
            f"document.body.innerHTML = `<form method=post enctype=text/plain "
            f"action='{port.url}v1/chat/completions'></form>`; document.forms[0].submit()"
        )
        browser.run(form)
        wait_until(lambda: refused(two_prompts) == 4, "the form was refused")
        assert answered(two_prompts) == 0

        browser.open(f"http://{host}:{elsewhere}/")
        browser.run(f"location.href = '{port.url}'")
        rows = "document.querySelectorAll('#prompts tr').length"
        wait_until(lambda: browser.run(rows) == 2, "our page is shown")


def test_a_page_whose_name_was_made_to_lead_here(two_prompts: Workspace, tmp_path: Path) -> None:
    """DNS rebinding: the browser takes the daemon for the page's own server."""
    rebound = "--host-resolver-rules=MAP evil.example.com 127.0.0.1"
    with Port(two_prompts.socket) as port, Browser(tmp_path / "profile", rebound) as browser:
        url = port.url.replace("127.0.0.1", "evil.example.com")
        browser.open(url)
        assert "foreign_host" in browser.text()
        asked = (
            "fetch('/v1/chat/completions', {method: 'POST', body: BODY}).then((a) => a.status)"
        ).replace("BODY", json.dumps(QUESTION))
        assert browser.run(asked) == 403
        assert answered(two_prompts) == 0

        manifest = two_prompts.manifest.read_text()
        two_prompts.write("manifest.yaml", f"{manifest}\nserving: {{hosts: Evil.Example.com}}\n")
        two_prompts.hang_up()
        assert browser.run(asked) == 200


def test_both_sockets(two_prompts: Workspace) -> None:
    """The names that programs make up for a socket stay good; what changes takes no form."""
    assert two_prompts.stop() == 0
    two_prompts.start("--admin-socket", str(two_prompts.root / "admin.sock"))
    for admin in (False, True):
        for host, status in (("rkcached", 200), ("127.0.0.1:1", 200), ("evil.example.com", 403)):
            answer = two_prompts.request("GET", "/healthz", admin=admin, headers={"host": host})
            assert answer.status_code == status, (admin, host)

    load = {"content": b'{"model": "m"}', "admin": True}
    for media in ("text/plain;charset=UTF-8", "application/x-www-form-urlencoded"):
        answer = two_prompts.request(
            "POST", "/v1/models/unload", headers={"content-type": media}, **load
        )
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"
    for headers in ({}, {"content-type": "application/json"}):
        answer = two_prompts.request("POST", "/v1/models/unload", headers=headers, **load)
        assert answer.status_code == 200, answer.text
