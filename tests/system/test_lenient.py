"""Clients as they are: what they send without need, and how they send it."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from conftest import Workspace

from tests.ports import free_port
from tests.waiting import DEADLINE_S, wait_until

HELLO: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 8,
}


def head(path: str, body: bytes = b"", *, method: str = "POST", host: str = "Host: d\r\n") -> bytes:
    return f"{method} {path} HTTP/1.1\r\n{host}Content-Length: {len(body)}\r\n\r\n".encode()


def read_all(client: socket.socket) -> bytes:
    """All that comes until the daemon closes its side."""
    client.settimeout(DEADLINE_S)
    data = b""
    while piece := client.recv(1 << 16):
        data += piece
    return data


def connect(space: Workspace) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(space.socket))
    return client


def half_closed(space: Workspace, request: bytes) -> bytes:
    """The answer to a client that ends its side after its request, as `socat -` does."""
    with connect(space) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def assert_is_answered(client: socket.socket) -> None:
    """A short request on a connection that is kept."""
    client.settimeout(DEADLINE_S)
    client.sendall(head("/healthz", method="GET"))
    data = b""
    while not data.endswith(b'{"status":"ok"}'):
        piece = client.recv(1 << 16)
        assert piece, data
        data += piece


def slow_model(space: Workspace, **settings: Any) -> None:
    space.memory_model(decode_us_per_token=20_000, **settings)
    space.declare("{}")
    space.start()
    space.ask("m", max_tokens=1)  # it is loaded


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_ends_its_side_gets_its_answer(workspace: Workspace, *, stream: bool) -> None:
    """`socat -` and `nc -N` do so after their request; then the connection is closed.

    Regression: the request was stopped, and nothing came.
    """
    slow_model(workspace)
    body = json.dumps(HELLO | {"max_tokens": 40, "stream": stream}).encode()

    answer = half_closed(workspace, head("/v1/chat/completions", body) + body)

    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"finish_reason":"length"' in answer
    assert (b"data: [DONE]" in answer) == stream


def on_a_port(space: Workspace) -> tuple[str, int]:
    """A slow model behind a port of the loopback that needs no key."""
    space.memory_model(decode_us_per_token=20_000)
    space.declare("{}")
    address = ("127.0.0.1", free_port())
    space.start("--listen", f"{address[0]}:{address[1]}", "--open-loopback")
    space.ask("m", max_tokens=1)  # it is loaded
    return address


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_over_tcp_that_ends_its_side_gets_its_answer(
    workspace: Workspace, *, stream: bool
) -> None:
    """It may get an interim response first. Who asks by HTTP/1.0 knows none, and is not answered.

    Regression: the request was stopped, and nothing came.
    """
    address = on_a_port(workspace)
    body = json.dumps(HELLO | {"max_tokens": 40, "stream": stream}).encode()
    request = head("/v1/chat/completions", body, host="Host: localhost\r\n") + body

    def answer(request: bytes) -> bytes:
        with socket.create_connection(address) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            return read_all(client)

    got = answer(request).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert got.startswith(b"HTTP/1.1 200")
    assert b'"finish_reason":"length"' in got
    assert (b"data: [DONE]" in got) == stream
    assert answer(request.replace(b"HTTP/1.1", b"HTTP/1.0")) == b""

    if stream:
        with socket.create_connection(address) as client:
            client.sendall(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
            begin = client.recv(1 << 16)
            client.shutdown(socket.SHUT_WR)  # its pieces tell whether somebody is there
            assert (begin + read_all(client)).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_over_tcp_that_leaves_is_noticed(workspace: Workspace, *, stream: bool) -> None:
    """It looks like one that ended its side, until it is sent something."""
    address = on_a_port(workspace)
    body = json.dumps(HELLO | {"max_tokens": 3000, "stream": stream}).encode()
    request = head("/v1/chat/completions", body, host="Host: localhost\r\n") + body
    with socket.create_connection(address) as client:
        client.sendall(request)
        wait_until(lambda: workspace.status()["running"] == 1, "it is being answered")
        client.shutdown(socket.SHUT_WR)
        time.sleep(1.3)  # longer than the interval of the check: who stays is not ended
        assert workspace.status()["running"] == 1
        assert client.recv(1 << 16)  # what is left unread when it goes would tell at once
    wait_until(lambda: workspace.status()["running"] == 0, "its answer stopped")

    with socket.create_connection(address) as client:
        client.sendall(request)
        wait_until(lambda: workspace.status()["running"] == 1, "it is being answered")
    left = time.monotonic()
    wait_until(lambda: workspace.status()["running"] == 0, "its answer stopped")
    assert time.monotonic() - left < 10


def test_all_requests_of_a_client_that_ends_its_side_are_answered(two_prompts: Workspace) -> None:
    """It may send several at once; what it did not send to its end is not answered."""
    requests = head("/healthz", method="GET") * 3

    assert half_closed(two_prompts, requests).count(b'{"status":"ok"}') == 3
    assert half_closed(two_prompts, b"GET /healthz HTT") == b""
    assert half_closed(two_prompts, head("/v1/chat/completions", b"x" * 9)) == b""


def test_a_large_body_of_a_client_that_ends_its_side(two_prompts: Workspace) -> None:
    """It is taken in slices, and its end may be there before the last one."""
    body = json.dumps(HELLO | {"metadata": {"a": "x" * 900_000}}).encode()

    answer = half_closed(two_prompts, head("/v1/chat/completions", body) + body)

    assert answer.startswith(b"HTTP/1.1 200")


def test_a_client_that_ends_its_side_and_leaves_is_noticed(workspace: Workspace) -> None:
    """Its answer stops: nothing can be read any more, but the kernel knows that it is gone."""
    slow_model(workspace)
    body = json.dumps(HELLO | {"max_tokens": 3000}).encode()
    with connect(workspace) as client:
        client.sendall(head("/v1/chat/completions", body) + body)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: workspace.status()["running"] == 1, "it is being answered")
        time.sleep(1.2)  # longer than the interval of the check: who stays is not ended
        assert workspace.status()["running"] == 1

    wait_until(lambda: workspace.status()["running"] == 0, "its answer stopped")


def test_requests_without_a_host(two_prompts: Workspace) -> None:
    """Written by hand, with either line end; what is no HTTP gets OpenAI's envelope.

    Regression: both got a bare 400.
    """
    body = json.dumps(HELLO).encode()
    for request in (
        head("/healthz", method="GET", host=""),
        b"GET /healthz HTTP/1.1\n\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        head("/v1/chat/completions", body, host="X-Ghost: 1\r\n") + body,
        head("/healthz", method="GET", host=f"X-Long: {'x' * 9000}\r\nHost: d\r\n"),
    ):
        assert half_closed(two_prompts, request).startswith(b"HTTP/1.1 200"), request[:80]

    for wrong in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"):
        answer = half_closed(two_prompts, wrong)
        assert answer.startswith(b"HTTP/1.1 400")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")


def test_how_a_request_names_its_path_and_its_end(two_prompts: Workspace) -> None:
    """RFC 9112, 3.2.2 and 6.3.

    Regression: a target with a name was no path of ours (404); a request that said twice where it
    ends was taken, and so was what came after one of the ends; headers that are too long were
    called no HTTP.
    """
    here = head("http://localhost/v1/models?limit=1", method="GET", host="Host: evil.example\r\n")
    assert half_closed(two_prompts, here).startswith(b"HTTP/1.1 200")
    foreign = head("http://evil.example/v1/models", method="GET", host="Host: localhost\r\n")
    assert b'"code":"foreign_host"' in half_closed(two_prompts, foreign)
    assert half_closed(two_prompts, head("http://localhost", method="GET")).startswith(
        b"HTTP/1.1 200"
    )

    inner = head("/healthz", method="GET")
    twice = head("/v1/tokenize", inner, host="Host: d\r\nTransfer-Encoding: chunked\r\n")
    answer = half_closed(two_prompts, twice + b"0\r\n\r\n" + inner)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert b'"code":"ambiguous_length"' in answer

    long = head(f"/healthz?{'a' * (90 << 10)}", method="GET")
    answer = half_closed(two_prompts, long)
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"65,536 bytes" in answer


def test_a_connection_outlasts_a_pause(workspace: Workspace) -> None:
    """Clients keep connections, and use them again after some seconds.

    Regression: they were closed after 5 s, and 17 of 60 requests that came just then failed.
    """
    workspace.memory_model()
    workspace.declare("{}")
    workspace.start()
    with connect(workspace) as client:
        for pause_s in (0, 6):
            time.sleep(pause_s)  # the pause is what is tested
            assert_is_answered(client)


def test_a_connection_that_waits_makes_room(workspace: Workspace) -> None:
    """For a new one, where there are too many: who only keeps it does not need it."""
    workspace.hurry(api__connection__MAX_CONNECTIONS=8)
    workspace.memory_model()
    workspace.declare("{}")
    workspace.start()
    kept = [connect(workspace) for _ in range(6)]  # three quarters: all that one user may have
    for client in kept:
        assert_is_answered(client)

    for _ in range(2):
        assert workspace.request("GET", "/healthz").status_code == 200
    assert kept[0].recv(1) == b""
    assert_is_answered(kept[-1])
    for client in kept:
        client.close()


def test_paths_of_other_servers(two_prompts: Workspace) -> None:
    """With and without /v1, with a slash at the end; and the right one for those that differ."""
    for path in ("/v1/chat/completions/", "/chat/completions", "//v1/chat/completions"):
        answer = two_prompts.request("POST", path, json=HELLO)
        assert (answer.status_code, answer.json()["object"]) == (200, "chat.completion")
    for path in ("/v1/models/", "/models", "/models/"):
        assert two_prompts.request("GET", path).json()["object"] == "list"
    assert two_prompts.request("GET", "/models/m/a").json()["id"] == "m/a"
    for path in ("/health", "/v1/health", "/healthz/"):
        assert two_prompts.request("GET", path).json() == {"status": "ok"}
    assert two_prompts.request("POST", "/reload").json()["error"]["code"] == "admin_only"

    error = two_prompts.request("POST", "/completion", json=HELLO).json()["error"]
    assert "/v1/completions" in error["message"]


def test_a_byte_order_mark(two_prompts: Workspace) -> None:
    data = b"\xef\xbb\xbf" + json.dumps(HELLO).encode()

    assert two_prompts.request("POST", "/v1/chat/completions", content=data).status_code == 200


def test_models_that_can_be_asked(workspace: Workspace) -> None:
    """A prompt without a text is not among them, and whoever asks for it is told why."""
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md, gone: gone.md}")
    workspace.start()
    workspace.wait_settled()

    listed = workspace.request("GET", "/v1/models").json()["data"]
    refused = workspace.request("GET", "/v1/models/m/gone")

    assert [card["id"] for card in listed] == ["m", "m/a"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "prompt_blocked")
    assert workspace.request("GET", "/v1/models/m/never").status_code == 404


def test_what_does_what_it_says(two_prompts: Workspace) -> None:
    """`cache_prompt`, `max_tokens: -1` and `min_p`; what has no effect is listed."""
    report = two_prompts.ask("m/a", cache_prompt=False)["rkcached"]
    assert (report["state"], report["reason"]) == ("cold", "the request asks for no cache")
    assert two_prompts.ask("m/a", cache_prompt=True)["rkcached"]["state"] == "hit"

    whole = two_prompts.ask("m", max_tokens=-1)
    assert whole["usage"]["total_tokens"] == 4096
    assert whole["choices"][0]["finish_reason"] == "length"

    said = [
        two_prompts.ask("m", temperature=1.0, seed=1, **more)["choices"][0]["message"]["content"]
        for more in ({}, {"min_p": 0}, {"min_p": 0.5})
    ]
    assert said[0] == said[1] != said[2]

    assert two_prompts.ask("m")["rkcached"]["ignored"] == []
    assert two_prompts.ask("m", keep_alive="5m")["rkcached"]["ignored"] == ["keep_alive"]
    _, last = two_prompts.stream("m", keep_alive=-1)
    assert last["rkcached"]["ignored"] == ["keep_alive"]


@pytest.mark.parametrize("stream", [False, True])
def test_keep_alive_unloads_for_an_administrator(two_prompts: Workspace, *, stream: bool) -> None:
    """Others would take the model from each other."""
    body = HELLO | {"keep_alive": 0, "stream": stream}

    def loaded() -> bool:
        return two_prompts.status()["models"][0]["pid"] is not None

    asked = two_prompts.request("POST", "/v1/chat/completions", json=body)
    assert '"ignored":["keep_alive"]' in asked.text
    assert loaded()

    asked = two_prompts.request("POST", "/v1/chat/completions", json=body, admin=True)
    assert '"ignored":[]' in asked.text
    wait_until(lambda: not loaded(), "the model was unloaded")
    assert two_prompts.ask("m")["rkcached"]["model_load_ms"] > 0


def test_what_is_not_supported_is_ignored(workspace: Workspace) -> None:
    """If the manifest says so; the answer lists it, whole and streamed."""
    workspace.memory_model()
    workspace.declare("{}", top="serving: {unsupported: ignore}")
    workspace.start()
    more = {"logit_bias": {"5": 1}, "tfs_z": 0.5, "logprobs": True, "temperature": 0.5}

    report = workspace.ask("m", **more)["rkcached"]
    _, last = workspace.stream("m", **more)
    plain = workspace.request(
        "POST", "/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 2, "echo": True}
    )

    assert sorted(report["ignored"]) == ["logit_bias", "logprobs", "tfs_z"]
    assert last["rkcached"]["ignored"] == report["ignored"]
    assert plain.json()["rkcached"]["ignored"] == ["echo"]
    assert workspace.ask("m", messages=[], status=400)["error"]["param"] == "messages"


def test_a_system_message_beside_a_prompt(workspace: Workspace) -> None:
    """The manifest settles it, for all prompts or for one."""
    workspace.memory_model(script={"HOUSE": "Welcome", "PIRATE": "Ahoy"})
    workspace.write("a.md", "You are of the HOUSE.\n")
    own = "{files: a.md, system_conflict: append}"
    prompts = f"{{a: a.md, b: {own}, c: {{files: a.md, system_conflict: client}}}}"
    workspace.declare(prompts, top="serving: {system_conflict: prompt}")
    workspace.start()
    workspace.wait_settled()
    system = {"role": "system", "content": "You are a PIRATE."}

    def ask(model: str) -> tuple[str, dict[str, Any]]:
        answer = workspace.ask(model, messages=[system, *HELLO["messages"]])
        return answer["choices"][0]["message"]["content"], answer["rkcached"]

    said, report = ask("m/a")
    assert (said, report["state"], report["ignored"]) == ("Welcome", "hit", ["messages.0"])
    said, report = ask("m/b")
    assert (said, report["state"], report["ignored"]) == ("Ahoy", "partial", [])
    said, report = ask("m/c")
    assert (said, report["cache"], report["ignored"]) == ("Ahoy", None, ["model"])
