"""What the daemon tells about itself while it works: metrics, the event stream, and its limits."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Workspace
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import BEFORE_RESCAN_S, DEADLINE_S, wait_until


def samples(space: Workspace) -> dict[tuple[str, ...], float]:
    """Every sample by its name and label values, as Prometheus' own parser reads them."""
    text = space.request("GET", "/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_metrics_count_what_happened(two_prompts: Workspace) -> None:
    """Requests and prompts by state, times, tokens, builds by reason, bytes, the manifest."""
    two_prompts.ask("m/a")
    two_prompts.ask("m/a", cache=False)
    two_prompts.write("prompts/a.md", "another text")
    wait_until(lambda: len(two_prompts.built()) == 3, "the edited prompt was built")
    two_prompts.cli("regenerate", "m/b")
    now = samples(two_prompts)
    assert (
        now["rkcached_requests_total", "m", "hit"],
        now["rkcached_requests_total", "m", "cold"],
    ) == (1, 1)
    assert now["rkcached_ttft_seconds_count", "m", "hit"] == 1
    assert 0 < now["rkcached_ttft_seconds_sum", "m", "hit"] < 5
    assert now["rkcached_queue_seconds_count", "m", "cold"] == 1
    assert now["rkcached_prompt_tokens_total", "m", "cached"] == 64
    assert now["rkcached_prompt_tokens_total", "m", "prefilled"] > 64
    builds = {key[2:]: value for key, value in now.items() if key[0] == "rkcached_builds_total"}
    assert builds == {("missing", "built"): 2, ("stale", "built"): 1, ("requested", "built"): 1}
    assert now["rkcached_artifacts", "m", "fresh"] == 2
    cache = two_prompts.status()["cache"]
    assert now["rkcached_cache_bytes",] == cache["used_bytes"]
    assert now["rkcached_retired_bytes",] == cache["retired_bytes"] > 0
    assert now["rkcached_manifest_good",] == 1
    two_prompts.write("manifest.yaml", "version: 2\n")
    wait_until(
        lambda: samples(two_prompts)["rkcached_manifest_good",] == 0,
        "the broken manifest is counted",
        BEFORE_RESCAN_S,
    )


class Listener:
    """Reads the event stream in a thread."""

    def __init__(self, space: Workspace) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.listening = threading.Event()
        self._space = space
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.listening.wait(DEADLINE_S)

    def _read(self) -> None:
        kind = ""
        with self._space.http() as client, client.stream("GET", "/v1/events") as response:
            for line in response.iter_lines():
                if line == ": listening":
                    self.listening.set()
                elif line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.heard.append((kind, json.loads(line.removeprefix("data: "))))

    def states(self, kind: str, prompt: str | None = None) -> list[str]:
        return [
            e["state"]
            for k, e in self.heard
            if k == kind and (prompt is None or e["prompt"] == prompt)
        ]

    def ended(self) -> bool:
        self._thread.join(DEADLINE_S)
        return not self._thread.is_alive()


@pytest.fixture
def listener(two_prompts: Workspace) -> Iterator[Listener]:
    heard = Listener(two_prompts)
    yield heard
    if two_prompts.process is not None:
        two_prompts.stop()
    assert heard.ended()


def test_events_tell_every_change(two_prompts: Workspace, listener: Listener) -> None:
    """A prompt's way from stale to fresh, its build, the worker's states, an answer.

    The last event is the end of the daemon.
    """
    two_prompts.write("prompts/a.md", "another text")
    wait_until(
        lambda: listener.states("artifact", "a")[-1:] == ["fresh"], "it is fresh", BEFORE_RESCAN_S
    )
    assert listener.states("artifact", "a") == ["stale", "building", "fresh"]
    assert [event["result"] for kind, event in listener.heard if kind == "build"] == ["built"]
    two_prompts.cli("regenerate", "m/b")
    wait_until(
        lambda: listener.states("artifact", "b") == ["building", "fresh"],
        "a fresh one is told again, too",
    )
    two_prompts.ask("m/a")
    wait_until(lambda: listener.states("answer") == ["hit"], "the answer is told")
    assert listener.states("worker")[-2:] == ["busy", "ready"]
    assert two_prompts.stop() == 0
    assert listener.ended()


@pytest.mark.long
def test_a_full_queue_refuses(workspace: Workspace) -> None:
    """One request more than may wait gets 503 with Retry-After while they wait.

    The others are answered.
    """
    workspace.memory_model(decode_us_per_token=100_000)
    workspace.declare("{}", top="serving: {queue: 2}")
    workspace.start()
    workspace.ask("m", max_tokens=1)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(workspace.ask, "m", max_tokens=50)]
        wait_until(lambda: workspace.status()["models"][0]["worker"] == "busy", "one is answered")
        running += [pool.submit(workspace.ask, "m", max_tokens=2) for _ in range(2)]
        wait_until(lambda: workspace.status()["running"] == 3, "two wait")
        with workspace.http() as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert refused.headers["retry-after"] == "1"
        workspace.logged(
            "warning request failed path=/v1/chat/completions status=503 code=queue_full"
        )
        assert workspace.status()["running"] == 3
        assert [future.result()["usage"]["completion_tokens"] for future in running] == [50, 2, 2]


def test_a_burst_fills_the_queue_exactly(workspace: Workspace) -> None:
    """Of four at once, one runs, two wait, and one too many is refused."""
    workspace.memory_model(decode_us_per_token=20_000)
    workspace.declare("{}", top="serving: {queue: 2}")
    workspace.start()
    workspace.ask("m", max_tokens=1)

    def one(_: int) -> int:
        return workspace.request(
            "POST", "/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 20}
        ).status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(one, range(4))) == [200, 200, 200, 503]


def test_a_client_that_leaves_while_it_sends(two_prompts: Workspace) -> None:
    """One line in the log, no error."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(two_prompts.socket))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: d\r\nContent-Length: 50\r\n\r\n")
        wait_until(two_prompts.status, "the request is being read")
    two_prompts.logged("path=/v1/completions status=499")
    assert " error " not in two_prompts.log_text()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_request_that_takes_too_long(workspace: Workspace, streaming: bool) -> None:
    """504, or an error event in a stream that has begun.

    The generation stops and the next request is served.
    """
    workspace.memory_model(decode_us_per_token=100_000)
    workspace.declare(
        "{}", top="serving: {request_timeout_s: 5}"
    )  # a worker starts within that, on a busy machine
    workspace.start()
    workspace.ask("m", max_tokens=1)
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100,
        "stream": streaming,
    }
    answer = workspace.request("POST", "/v1/chat/completions", json=body)
    if streaming:
        assert '"code": "request_timeout"' in answer.text.replace('"code":"', '"code": "')
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    sent = 200 if streaming else 504
    cause = f"warning request failed path=/v1/chat/completions status={sent} code=request_timeout"
    workspace.logged(cause)
    wait_until(lambda: workspace.status()["running"] == 0, "the generation stopped")
    assert workspace.ask("m", max_tokens=1)["usage"]["completion_tokens"] == 1
