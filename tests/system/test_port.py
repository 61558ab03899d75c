"""A TCP port of the daemon: who gets in, by which key, and what that key may do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from browser import Browser
from conftest import Workspace
from test_foreign_pages import elsewhere  # noqa: F401 - a fixture
from test_reuse import as_user

from rkcached.cli.main import main
from tests.ports import free_port
from tests.waiting import DEADLINE_S, wait_until

HELLO = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
DECODE_US = 10_000
TOKENS = 20


class Ported:
    """A daemon with a port on the loopback."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"

    def start(self, *options: str) -> None:
        self.space.start("--listen", self.address, *options)

    def key(self, name: str, *options: str) -> str:
        return self.space.cli("key", "add", name, *options).stdout.strip()

    def request(self, method: str, path: str, key: str = "", **content: Any) -> httpx.Response:
        headers = dict(content.pop("headers", {}))
        if key:
            headers["authorization"] = f"Bearer {key}"
        with httpx.Client(base_url=self.url, timeout=DEADLINE_S) as client:
            return client.request(method, path, headers=headers, **content)

    def code(self, method: str, path: str, key: str = "", **content: Any) -> tuple[int, str]:
        """Status and code of a refusal; the code is empty for an answer."""
        answer = self.request(method, path, key, **content)
        if answer.is_success:
            return answer.status_code, ""
        return answer.status_code, answer.json()["error"]["code"]

    def ask(self, key: str, question: str = "hello", **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        response = self.request(
            "POST", "/v1/chat/completions", key, json={**HELLO, "messages": messages, **body}
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture
def ported(workspace: Workspace) -> Ported:
    """Two models, the first one with a prompt; the daemon is not started."""
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A. " * 10)
    more = "  n:\n    path: m.model\n"
    workspace.declare("{a: a.md}", model="    chat_template: chatml\n" + more)
    return Ported(workspace)


def test_a_request_needs_a_key(ported: Ported) -> None:
    """By either header. Without one it gets 401, whatever it asks for."""
    anne = ported.key("anne")
    assert re.fullmatch(r"rkc_[\w-]{43}", anne)
    ported.start()
    for path in ("/v1/models", "/healthz", "/", "/metrics", "/v1/nothing"):
        assert ported.code("GET", path) == (401, "invalid_api_key")
    refused = ported.request("POST", "/v1/chat/completions", json=HELLO)
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "rkcached key add" in refused.json()["error"]["message"]
    assert refused.headers["x-request-id"]

    wrong = anne[:-1] + ("A" if anne[-1] != "A" else "B")
    for other in (wrong, anne[:-1], anne + "x", "none", "ü"):
        headers = {"authorization": f"Bearer {other}".encode(), "x-api-key": other.encode()}
        assert ported.code("GET", "/v1/models", headers=headers) == (401, "invalid_api_key")
    basic = {"authorization": f"Basic {anne}"}
    assert ported.code("GET", "/v1/models", headers=basic) == (401, "invalid_api_key")

    for headers in (
        {"authorization": f"Bearer {anne}"},
        {"authorization": f"bearer  {anne}"},
        {"x-api-key": anne},
        {"x-api-key": anne, "authorization": "Bearer none"},
    ):
        assert ported.code("GET", "/v1/models", headers=headers) == (200, "")
    assert ported.ask(anne)["choices"]


def test_a_unix_socket_needs_no_key(ported: Ported) -> None:
    """One that is sent there changes nothing, also a right one of an administrator."""
    admin = ported.key("boss", "--admin")
    ported.start()
    for headers in ({}, {"x-api-key": "none"}, {"x-api-key": admin}):
        space = ported.space
        assert space.request("GET", "/v1/models", headers=headers).status_code == 200
        assert space.request("POST", "/v1/reload", headers=headers).status_code == 403


def test_keys_count_from_the_next_request_on(ported: Ported) -> None:
    """Made and revoked while the daemon runs, also on a connection that stays open."""
    ported.start()
    anne = ported.key("anne")
    with httpx.Client(base_url=ported.url, headers={"x-api-key": anne}) as client:
        assert client.get("/v1/models").status_code == 200
        ported.space.cli("key", "revoke", "anne")
        assert client.get("/v1/models").status_code == 401


def test_an_admin_key_may_change_things(ported: Ported) -> None:
    boss, anne = ported.key("boss", "--admin"), ported.key("anne")
    ported.start()
    body = {"cache_name": "notes", "content": "Remember the sea."}
    assert ported.code("POST", "/v1/cache/m", anne, json=body) == (403, "admin_only")
    assert ported.code("POST", "/v1/reload", anne) == (403, "admin_only")
    assert ported.code("POST", "/v1/cache/m", boss, json=body) == (200, "")
    assert ported.code("POST", "/v1/reload", boss) == (200, "")
    form = {"content-type": "text/plain"}
    refused = ported.code("POST", "/v1/reload", boss, headers=form, content=b"x")
    assert refused == (415, "unsupported_media_type")


def test_a_key_for_some_models(ported: Ported) -> None:
    """It may use these and see these, and nothing that shows all."""
    only = ported.key("only", "--model", "n", "--model", "gone")
    ported.start()
    models = ported.request("GET", "/v1/models", only).json()["data"]
    assert [model["id"] for model in models] == ["n"]
    assert ported.ask(only, model="n")["choices"]
    assert ported.code("GET", "/v1/models/n", only) == (200, "")
    assert ported.code("GET", "/healthz", only) == (200, "")

    refused = (403, "model_not_allowed")
    for body in (HELLO, {**HELLO, "model": "m/a"}, {**HELLO, "model": "zzz"}):
        assert ported.code("POST", "/v1/chat/completions", only, json=body) == refused
    plain = {"model": "m", "prompt": "hello"}
    assert ported.code("POST", "/v1/completions", only, json=plain) == refused
    vector = {"model": "m", "input": "hello"}
    assert ported.code("POST", "/v1/embeddings", only, json=vector) == refused
    ranking = {"model": "m", "query": "hello", "documents": ["hello"]}
    assert ported.code("POST", "/v1/rerank", only, json=ranking) == refused
    for path in ("/v1/models/m", "/v1/models/m/a", "/v1/cache/m", "/v1/cache/m/a"):
        assert ported.code("GET", path, only) == refused
    for path in ("/v1/status", "/v1/events", "/metrics", "/"):
        assert ported.code("GET", path, only) == refused

    for path in ("/v1/models/gone", "/v1/cache/gone"):
        unknown = ported.request("GET", path, only)
        assert unknown.status_code == 404
        assert "known models" not in unknown.text


def test_ipv6(workspace: Workspace, ported: Ported) -> None:
    """Several ports at once; the log has the address."""
    six = f"[::1]:{free_port('::1')}"
    anne = ported.key("anne")
    ported.start("--listen", six)
    assert httpx.get(f"http://{six}/v1/models").status_code == 401
    assert httpx.get(f"http://{six}/v1/models", headers={"x-api-key": anne}).status_code == 200
    workspace.logged("peer=::1 key=anne")
    assert ported.code("GET", "/v1/models", anne) == (200, "")
    ready = next(line for line in workspace.log_text().splitlines() if " ready " in line)
    assert ported.address in ready
    assert six in ready


def test_a_port_survives_its_neighbour(ported: Ported) -> None:
    """A Unix socket that somebody deletes is made again, and the port stays open meanwhile."""
    anne = ported.key("anne")
    ported.space.hurry(api__listening__SOCKET_CHECK_S=0.2)
    ported.start()
    ported.space.socket.unlink()
    ported.space.logged("socket made again")
    assert ported.code("GET", "/v1/models", anne) == (200, "")
    assert ported.space.request("GET", "/v1/models").status_code == 200


def test_the_loopback_without_a_key(ported: Ported) -> None:
    """By an explicit word. Any key will do then, as clients insist on one; a right one counts."""
    boss = ported.key("boss", "--admin")
    ported.start("--open-loopback")
    assert ported.code("GET", "/v1/models") == (200, "")
    assert ported.code("GET", "/v1/models", "none") == (200, "")
    assert ported.code("POST", "/v1/reload") == (403, "admin_only")
    assert ported.code("POST", "/v1/reload", "none") == (403, "admin_only")
    assert ported.code("POST", "/v1/reload", boss) == (200, "")
    ported.space.logged("peer=127.0.0.1")


def own_address() -> str:
    """An address of this machine that is not the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def test_an_open_loopback_opens_nothing_else(ported: Ported) -> None:
    """A port on all addresses needs a key where it is not asked over the loopback."""
    outside = own_address()
    if not outside or outside.startswith("127."):
        pytest.skip("needs another address than the loopback's")
    ported.space.start("--listen", f"0.0.0.0:{ported.port}", "--open-loopback")
    assert ported.code("GET", "/v1/models") == (200, "")
    assert httpx.get(f"http://{outside}:{ported.port}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (b"{", 0o600),
        (b'{"version": 2, "keys": []}', 0o600),
        (b"\xff" * 99, 0o600),
        (None, 0o644),
        (
            '{"version":1,"keys":[{"name":"a","sha256":"é","owner":9,"created":""}]}'.encode(),
            0o600,
        ),
    ],
)
def test_a_strange_file_of_keys_lets_nobody_in(
    ported: Ported, content: bytes | None, mode: int
) -> None:
    """One that is damaged, or that others may read. The log says so once; a right one counts."""
    anne = ported.key("anne")
    ported.start()
    file = ported.space.root / "state" / "keys.json"
    good = file.read_bytes()
    file.write_bytes(good if content is None else content)
    file.chmod(mode)
    for _ in range(3):
        assert ported.code("GET", "/v1/models", anne) == (401, "invalid_api_key")
    assert ported.space.log_text().count("keys rejected") == 1
    file.write_bytes(good)
    file.chmod(0o600)
    assert ported.code("GET", "/v1/models", anne) == (200, "")


def test_a_link_or_a_pipe_in_place_of_the_keys(ported: Ported) -> None:
    anne = ported.key("anne")
    ported.start()
    file = ported.space.root / "state" / "keys.json"
    moved = file.rename(ported.space.root / "elsewhere.json")
    file.symlink_to(moved)
    assert ported.code("GET", "/v1/models", anne) == (401, "invalid_api_key")
    file.unlink()
    os.mkfifo(file, 0o600)
    assert ported.code("GET", "/v1/models", anne) == (401, "invalid_api_key")
    file.unlink()
    assert ported.code("GET", "/v1/models", anne) == (401, "invalid_api_key")


def test_the_log_and_the_metrics_have_names_and_no_keys(ported: Ported) -> None:
    anne = ported.key("anne")
    ported.start()
    ported.ask(anne)
    ported.code("GET", "/v1/models", anne[:-1])
    ported.code("GET", f"/v1/models?key={anne}", anne)
    ported.code("GET", "/healthz")
    metrics = ported.request("GET", "/metrics", anne).text
    assert 'rkcached_tcp_requests_total{key="anne",status="200"} 2.0' in metrics
    assert 'rkcached_tcp_requests_total{key="",status="401"} 2.0' in metrics
    log = ported.space.log_text()
    assert " info    request method=GET path=/healthz status=401" in log
    assert " peer=127.0.0.1 key=anne" in log
    assert "uid=" not in " ".join(line for line in log.splitlines() if "peer=" in line)
    kept = (ported.space.root / "state" / "keys.json").read_text()
    status = json.dumps(ported.space.status())
    for text in (log, metrics, kept, status):
        assert "rkc_" not in text.replace("rkc_[", "")
        assert anne[4:24] not in text


# One caller and another


@pytest.fixture
def two(ported: Ported) -> tuple[Ported, str, str]:
    """A daemon whose answers of 20 tokens take 0.2 s, and two keys."""
    ported.space.memory_model(decode_us_per_token=DECODE_US)
    keys = ported.key("greedy"), ported.key("other")
    ported.start()
    ported.ask(keys[0])
    return ported, *keys


def timed(ported: Ported, key: str) -> tuple[int, float]:
    connection = http.client.HTTPConnection("127.0.0.1", ported.port, timeout=DEADLINE_S)
    started = time.monotonic()
    body = json.dumps({**HELLO, "max_tokens": TOKENS})
    headers = {"Content-Type": "application/json", "x-api-key": key}
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, time.monotonic() - started


@pytest.mark.long
def test_a_flood_with_one_key_delays_another_by_one_answer_at_most(
    two: tuple[Ported, str, str],
) -> None:
    ported, greedy, other = two
    with ThreadPoolExecutor(30) as pool:
        alone_s = min(timed(ported, other)[1] for _ in range(3))
        answers = [pool.submit(timed, ported, greedy) for _ in range(30)]
        wait_until(lambda: ported.space.status()["running"] >= 25, "the flood waits")
        for _ in range(5):
            status, took_s = timed(ported, other)
            assert status == 200
            # Its own time, and the rest of the answer that is being written.
            assert took_s < alone_s + TOKENS * DECODE_US / 1e6 + 1.0
        assert sum(answer.done() for answer in answers) < 25
        assert {answer.result()[0] for answer in answers} == {200}


@pytest.mark.long
def test_a_queue_that_one_key_has_filled_takes_requests_with_another(
    two: tuple[Ported, str, str],
) -> None:
    """Nor is the user of the Unix socket kept out."""
    ported, greedy, other = two

    def is_full() -> bool:
        return any(answer.done() and answer.result()[0] == 503 for answer in answers)

    with ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(timed, ported, greedy) for _ in range(50)]
        wait_until(is_full, "the queue of one key is full")
        assert timed(ported, other)[0] == 200
        assert ported.space.ask("m", max_tokens=1)["choices"]
        statuses = [answer.result()[0] for answer in answers]
    assert statuses.count(503) >= 1
    assert set(statuses) == {200, 503}


def test_connections_with_one_key_leave_some_to_another(ported: Ported) -> None:
    """Of 40 connections TCP may have 30, and a key 15. Who has too many is told, and closed."""
    ported.space.hurry(api__connection__MAX_CONNECTIONS=40)
    greedy, other = ported.key("greedy"), ported.key("other")
    ported.start()
    with contextlib.ExitStack() as opened:

        def connect(key: str) -> tuple[http.client.HTTPResponse, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", ported.port, timeout=DEADLINE_S)
            opened.callback(connection.close)
            connection.request("GET", "/healthz", headers={"x-api-key": key})
            response = connection.getresponse()
            return response, response.read()

        answers = [connect(greedy) for _ in range(20)]
        assert [answer.status for answer, _ in answers] == [200] * 15 + [503] * 5
        refused, body = answers[-1]
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        assert refused.headers["connection"] == "close"
        assert connect(other)[0].status == 200

        for _ in range(40):  # silent ones; those that wait for a next request make room for 30
            opened.enter_context(socket.create_connection(("127.0.0.1", ported.port)))
        ported.space.logged("connections refused")
        assert ported.space.request("GET", "/v1/models").status_code == 200


SECRET = "The fish is hidden under the third stone behind the lighthouse. " * 4
PLAIN = "What do you know about the sea and about the ships that cross it? " * 4


@pytest.mark.parametrize("states", [1, 4])
def test_a_key_learns_nothing_of_what_another_asked(ported: Ported, states: int) -> None:
    """Bob guesses what Anne asked, rightly and wrongly, and is told the same."""
    ported.space.memory_model(states=states, prefill_us_per_token=20)
    anne, bob = ported.key("anne"), ported.key("bob")
    ported.start()
    ported.space.wait_settled()
    told = []
    for number, asked in enumerate((SECRET, SECRET[:100], PLAIN)):
        for turn in range(4):
            ported.ask(bob, f"Turn {turn}: good night. " * 20)
        ported.ask(anne, f"{number} {asked}")
        report = ported.ask(bob, f"{number} {SECRET}")["rkcached"]
        told.append((report["cached_tokens"], report["state"], report["reason"]))
    assert told[0] == told[1] == told[2]


def test_a_key_goes_on_from_what_it_asked(ported: Ported) -> None:
    """Its conversation is its own, on any connection; status and events tell it of its own."""
    ported.space.memory_model(states=4)
    anne, bob = ported.key("anne"), ported.key("bob")
    ported.start()
    ported.space.wait_settled()
    own = ported.ask(anne, SECRET)["rkcached"]
    assert ported.ask(bob, SECRET)["rkcached"]["cached_tokens"] <= own["cached_tokens"]
    assert ported.ask(anne, SECRET)["rkcached"]["cached_tokens"] > own["cached_tokens"] + 100
    recent = ported.request("GET", "/v1/status", bob).json()["recent"]
    assert len(recent) == 1


# Browsers


def test_a_name_that_was_made_to_lead_here(ported: Ported) -> None:
    """DNS rebinding: with a valid key, too. The names that containers use for their host are ours.

    No stranger can have one in .internal.
    """
    anne = ported.key("anne")
    ported.start()
    for host, code in {
        "evil.example.com": (403, "foreign_host"),
        f"evil.example.com:{ported.port}": (403, "foreign_host"),
        "localhost": (200, ""),
        "host.docker.internal:1": (200, ""),
        "host.containers.internal": (200, ""),
    }.items():
        assert ported.code("GET", "/v1/models", anne, headers={"host": host}) == code


PAGE = "https://chat.example.org"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def test_pages_of_other_origins(ported: Ported) -> None:
    """They are refused, unless `serving.cors` names them; then they get what they need, with a key.

    A change of the manifest counts at once.
    """
    space = ported.space
    anne = ported.key("anne")
    ported.start()
    theirs, other = {"origin": PAGE}, {"origin": "https://other.example.org"}
    for method, key in (("GET", anne), ("GET", ""), ("OPTIONS", "")):
        refused = ported.code(method, "/v1/models", key, headers=theirs | PREFLIGHT)
        assert refused == (403, "foreign_origin")

    space.write("manifest.yaml", f"{space.manifest.read_text()}\nserving: {{cors: [{PAGE}]}}\n")
    space.hang_up()
    leave = ported.request("OPTIONS", "/v1/chat/completions", headers=theirs | PREFLIGHT)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in leave.headers["access-control-allow-headers"]
    answer = ported.request("GET", "/v1/models", anne, headers=theirs)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "Origin" in answer.headers["vary"]
    without = ported.request("GET", "/v1/models", headers=theirs)
    assert without.status_code == 401
    assert without.headers["access-control-allow-origin"] == PAGE
    for method in ("GET", "OPTIONS"):
        refused = ported.code(method, "/v1/models", anne, headers=other | PREFLIGHT)
        assert refused == (403, "foreign_origin")
    assert space.request("POST", "/v1/reload", admin=True, headers=theirs).status_code == 403


@pytest.mark.parametrize("origin", ["'*'", "'null'", "chat.example.org", "https://a/b", "3"])
def test_what_no_origin_is(ported: Ported, origin: str) -> None:
    space = ported.space
    space.write("manifest.yaml", f"{space.manifest.read_text()}\nserving: {{cors: [{origin}]}}\n")
    done = space.cli("check", code=78)
    said = done.stdout + done.stderr
    assert "cors: " in said
    assert "https://chat.example.org" in said


def test_a_page_in_a_real_browser(
    ported: Ported,
    elsewhere: int,  # noqa: F811 - see above
    tmp_path: Path,
) -> None:
    """Of another site: it gets nothing with a valid key, until the manifest names its origin."""
    anne = ported.key("anne")
    ported.start()
    origin = f"http://localhost:{elsewhere}"
    body = json.dumps(json.dumps(HELLO))
    fetch = (
        f"fetch('{ported.url}/v1/chat/completions', {{method: 'POST', body: {body},"
        f" headers: {{authorization: 'Bearer {anne}', 'content-type': 'application/json'}}}})"
        ".then((answer) => answer.json()).then((answer) => answer.object, (error) => 'failed')"
    )
    with Browser(tmp_path / "profile") as browser:
        browser.open(origin)
        assert browser.run(fetch) == "failed"
        assert ported.space.log_text().count("path=/v1/chat/completions status=200") == 0

        manifest = ported.space.manifest.read_text()
        ported.space.write("manifest.yaml", f"{manifest}\nserving: {{cors: {origin}}}\n")
        ported.space.hang_up()
        assert browser.run(fetch) == "chat.completion"
        assert browser.run(fetch.replace(anne, "rkc_wrong")) is None  # it can read the refusal


# Clients and commands


@pytest.fixture
def client(ported: Ported) -> Iterator[openai.OpenAI]:
    key = ported.key("anne")
    ported.start()
    with openai.OpenAI(base_url=f"{ported.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_the_official_client(client: openai.OpenAI) -> None:
    """With nothing but base_url and api_key."""
    assert [model.id for model in client.models.list()] == ["m", "n", "m/a"]
    hello: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="m/a", messages=hello, max_tokens=8)
    stream = client.chat.completions.create(
        model="m/a", messages=hello, max_tokens=8, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text
    assert answer.choices[0].message.content
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="sk-none").models.list()
    assert refused.value.code == "invalid_api_key"


def test_key_commands(workspace: Workspace) -> None:
    assert workspace.cli("key", "list").stdout.startswith("no key")
    assert json.loads(workspace.cli("key", "list", "--json").stdout)["keys"] == []
    made = json.loads(workspace.cli("key", "add", "anne", "--model", "m", "--json").stdout)
    assert made["key"].startswith("rkc_")
    assert (made["name"], made["models"], made["admin"]) == ("anne", ["m"], False)
    workspace.cli("key", "add", "boss", "--admin")
    listed = json.loads(workspace.cli("key", "list", "--json").stdout)["keys"]
    assert [key["name"] for key in listed] == ["anne", "boss"]
    assert len({key["owner"] for key in listed}) == 2
    assert all(1 << 33 <= key["owner"] < 1 << 53 for key in listed)
    shown = workspace.cli("key", "list").stdout
    assert "anne  may use only m" in shown
    assert "boss  may use all models and make changes" in shown
    assert "rkc_" not in shown

    file = workspace.root / "state" / "keys.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "there is a key named" in workspace.cli("key", "add", "anne", code=64).stderr
    said = workspace.cli("key", "revoke", "bob", code=66).stderr
    assert "there is no key named 'bob'" in said
    assert "known: anne, boss" in said
    for name in ("", "a b", "-x", "ä", "x" * 65, "a\nb"):
        workspace.cli("key", "add", "--", name, code=64)
    workspace.cli("key", "add", "x", "--admin", "--model", "m", code=64)
    assert "revoked anne" in workspace.cli("key", "revoke", "anne").stdout
    assert json.loads(workspace.cli("key", "revoke", "boss", "--json").stdout)["name"] == "boss"
    file.write_text("{")
    assert "is damaged" in workspace.cli("key", "list", code=65).stderr
    assert "is damaged" in workspace.cli("key", "add", "x", code=65).stderr


def test_a_terminal_is_shown_what_to_paste(workspace: Workspace) -> None:
    """Elsewhere a new key stands alone, so that a script can take it."""
    assert re.fullmatch(r"rkc_[\w-]{43}\n", workspace.cli("key", "add", "script").stdout)
    ours, theirs = pty.openpty()
    process = workspace.popen("key", "add", "person", stdout=theirs)
    assert process.wait(DEADLINE_S) == 0
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    (text,) = re.findall(r"^  (rkc_[\w-]{43})\r$", shown, re.MULTILINE)
    assert f"export OPENAI_API_KEY={text}\r\n" in shown
    assert "export OPENAI_BASE_URL=http://" in shown


def test_two_commands_at_once_lose_no_key(workspace: Workspace) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: workspace.cli("key", "add", f"k{number}"), range(12)))
    assert len(json.loads(workspace.cli("key", "list", "--json").stdout)["keys"]) == 12


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_keys_are_not_for_every_user(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who may not read the state directory is told to use sudo; its owner needs none."""
    workspace.cli("key", "add", "anne")
    state = workspace.root / "state"
    for path in (state, state / "keys.json"):
        os.chown(path, 12001, 12001)
    workspace.cli("key", "add", "bob")
    assert (state / "keys.json").stat().st_uid == 12001
    for folder in (workspace.root, *workspace.root.parents):
        if folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o011)
    for name, value in workspace.environment.items():
        monkeypatch.setenv(name, value)

    assert ended(0, "key", "list") == 0  # imports what another user may not be able to read
    assert ended(12001, "key", "list") == 0
    assert ended(12001, "key", "add", "own") == 0
    for words in (("list",), ("add", "x"), ("revoke", "anne")):
        capsys.readouterr()
        assert ended(12002, "key", *words) == 77
        assert "use sudo" in capsys.readouterr().err
    for words in (("enable", "127.0.0.1:8080"), ("disable",)):
        capsys.readouterr()
        assert ended(12002, "port", *words) == 77
        assert "only root may" in capsys.readouterr().err


def ended(uid: int, *words: str) -> int:
    """The exit code of a command of this user, in this process."""
    from rkcached.cli import key, port  # noqa: F401 - see above

    with as_user(uid), pytest.raises(SystemExit) as left:
        main(words)
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("8080", 78, "not an address with a port"),
        ("127.0.0.1:0", 78, "from 1 to 65535"),
        ("127.0.0.1:65536", 78, "from 1 to 65535"),
        ("example.org:80", 78, "only localhost is accepted"),
        ("::1:8080", 78, "in brackets, and no others"),
        ("[127.0.0.1]:8080", 78, "in brackets, and no others"),
        ("192.0.2.77:8080", 73, "does not have that address"),
    ],
)
def test_an_address_that_is_none(ported: Ported, address: str, code: int, said: str) -> None:
    done = ported.space.cli("run", "--listen", address, code=code)
    assert said in done.stderr
    assert not ported.space.socket.exists()


def test_a_port_that_is_taken(ported: Ported) -> None:
    with socket.create_server(("127.0.0.1", ported.port)):
        done = ported.space.cli("run", "--listen", ported.address, code=73)
    assert f"cannot listen on {ported.address}: Address already in use" in done.stderr
    assert "ss -ltnp" in done.stderr
