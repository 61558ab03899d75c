"""Several models and several clients on one daemon.

Who is loaded, who waits, who is told to come back.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import Workspace, need
from test_serving import content, right_answer

from tests.rkllm_standin.standin import build, write_model
from tests.waiting import wait_until

MODELS = ("x", "y", "z")


def three_models(space: Workspace, engine: str, **settings: Any) -> None:
    """Three models of the memory engine, each with its own answers."""
    for name in MODELS:
        space.memory_model(f"{name}.model", seed=name, **settings)
    lines = "".join(f"  {name}: {{path: {name}.model}}\n" for name in MODELS)
    space.write("manifest.yaml", f"version: 1\nengine: {{kind: memory{engine}}}\nmodels:\n{lines}")
    space.start()


def loaded(space: Workspace) -> list[str]:
    return [model["name"] for model in space.request("GET", "/v1/models/loaded").json()["data"]]


def test_the_longest_idle_model_makes_room(workspace: Workspace) -> None:
    """Two fit. The third takes the place of the one that was asked last the longest ago."""
    three_models(workspace, ", max_loaded: 2")
    for model, left in (("x", "x"), ("y", "xy"), ("x", "xy"), ("z", "xz"), ("y", "yz")):
        assert right_answer(workspace, None, model=f"{model}.model") == content(
            workspace.ask(model)
        )
        assert "".join(loaded(workspace)) == left
    assert "model unloaded model=y reason=room for z" in re.sub(
        " +", " ", workspace.log_text()
    ).replace("'", "")


def test_without_a_number_what_fits_in_memory_stays(workspace: Workspace) -> None:
    """Three tiny model files fit."""
    three_models(workspace, "")
    for model in MODELS:
        workspace.ask(model)
    assert loaded(workspace) == list(MODELS)


def test_an_npu_holds_one_model(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On RKLLM the default is one."""
    need("cc")
    library = build("E", tmp_path_factory.mktemp("standin"))
    for name in "xy":
        write_model(workspace.root / f"{name}.rkllm")
    workspace.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: rkllm, library: {library}}}\nmodels:\n"
        "  x: {path: x.rkllm}\n  y: {path: y.rkllm}\n",
    )
    workspace.start()
    for model in "xyx":
        workspace.ask(model)
        assert loaded(workspace) == [model]


def test_a_model_that_replies_is_never_unloaded(workspace: Workspace) -> None:
    """Two models may run at once but only one fits.

    The second request waits for the end of the first answer.
    """
    three_models(workspace, ", concurrent: true, max_loaded: 1", decode_us_per_token=20_000)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(workspace.ask, "x", max_tokens=60)
        wait_until(lambda: workspace.status()["models"][0]["worker"] == "busy", "x replies")
        quick = pool.submit(workspace.ask, "y", max_tokens=2)
        assert quick.result()["rkcached"]["load_ms"] == 0
        assert slow.done()
        assert slow.result()["choices"][0]["finish_reason"] == "length"
    assert workspace.status()["models"][0]["restarts"] == 0
    assert loaded(workspace) == ["y"]


def test_the_access_log_names_who_asked(two_prompts: Workspace) -> None:
    """One line an exchange: path, status, uid, pid and the request's id.

    It has not a word of what was said.
    """
    need("curl")
    body = json.dumps(
        {"model": "m/a", "messages": [{"role": "user", "content": "a secret question"}]}
    )
    command = [
        "curl",
        "-s",
        "--unix-socket",
        str(two_prompts.socket),
        "-H",
        "X-Request-Id: my-id-7",
        "-d",
        body,
    ]
    curl = subprocess.Popen([*command, "http://d/v1/chat/completions"], stdout=subprocess.PIPE)
    curl.communicate()

    def lines() -> list[str]:
        return [line for line in two_prompts.log_text().splitlines() if "my-id-7" in line]

    (line,) = wait_until(
        lines, "the exchange is in the log"
    )  # written once the client has its answer
    for field in (
        "path=/v1/chat/completions",
        "status=200",
        f"uid={os.getuid()}",
        f"pid={curl.pid}",
        "method=POST",
    ):
        assert field in line, line
    assert "secret" not in two_prompts.log_text()


@pytest.mark.parametrize("grace_s", [0, 30])
def test_stopping_lets_replies_end_in_their_grace(workspace: Workspace, grace_s: int) -> None:
    """With time enough a running reply ends; without it is told.

    New requests are refused meanwhile.
    """
    workspace.memory_model(decode_us_per_token=50_000)
    workspace.declare("{}", top=f"serving: {{shutdown_grace_s: {grace_s}}}")
    workspace.start()
    assert workspace.process is not None
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 40,
        "stream": True,
    }
    with (
        ThreadPoolExecutor(1) as pool,
        workspace.http() as early,
        workspace.http() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        early.get("/healthz")  # this connection is open when the daemon stops
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        next(lines)
        ended = pool.submit(workspace.stop)
        if grace_s:
            workspace.logged("new requests are refused")
            refused = early.post(
                "/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 1}
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        last = json.loads([*lines][-1].removeprefix("data: "))
        assert ended.result() == 0
    if grace_s:
        assert last["choices"][0]["finish_reason"] == "length"
    else:
        assert last["error"]["code"] == "shutting_down"


def test_a_slow_reader_stops_nobody(workspace: Workspace) -> None:
    """Somebody who does not read a long stream keeps neither the model nor the daemon.

    What he reads later is whole.
    """
    workspace.memory_model(context_tokens=100_000)
    workspace.declare("{}", params="{max_context_len: 100000}")
    workspace.start()
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 60_000,
        "stream": True,
    }
    with (
        workspace.http() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as slow,
    ):
        for _ in range(5):
            assert workspace.ask("m")["choices"]
        assert workspace.status()["running"] <= 1
        *_, last, end = (line for line in slow.iter_lines() if line)
    assert end == "data: [DONE]"
    assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("waits", [False, True], ids=["in prefill", "in the queue"])
def test_a_client_that_goes_away_frees_its_place(workspace: Workspace, *, waits: bool) -> None:
    """Its prefill is stopped at once, or it is no longer waited for.

    The next request has its turn.
    """
    workspace.memory_model(prefill_us_per_token=500_000)
    workspace.declare("{}")
    workspace.start()

    def hang(path: str, text: str) -> socket.socket:
        body = json.dumps({"model": "m", "prompt": text, "max_tokens": 1})
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(workspace.socket))
        client.sendall(
            f"POST {path} HTTP/1.1\r\nHost: d\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        return client

    first = hang("/v1/completions", "y" * 1000)  # 500 s
    wait_until(lambda: workspace.status()["models"][0]["worker"] == "busy", "it is read")
    if waits:
        second = hang("/v1/completions", "z" * 1000)
        wait_until(lambda: workspace.status()["models"][0]["waiting"] == 1, "the other one waits")
        second.close()
        wait_until(lambda: workspace.status()["models"][0]["waiting"] == 0, "it waits no more")
    first.close()
    with workspace.http() as client:  # one token: a chat's template would be read for 25 s
        body = {"model": "m", "prompt": "q", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).json()["choices"]
    assert workspace.status()["models"][0]["restarts"] == 0


def test_a_prefix_in_memory_is_not_read_again(workspace: Workspace) -> None:
    """The second request to one prompt takes nothing from the disk.

    The other prompt's next one does.
    """
    workspace.memory_model()
    for name in "ab":
        workspace.write(f"{name}.md", f"You are prompt {name}. " * 100)
    workspace.declare("{a: a.md, b: b.md}")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/b")
    size = (workspace.cache / "m/a.memory_cache").stat().st_size

    def read_by_worker(prompt: str) -> int:
        (worker,) = workspace.children()
        before = worker.io_counters().read_chars
        assert workspace.ask(f"m/{prompt}")["rkcached"]["state"] == "hit"
        return int(worker.io_counters().read_chars) - before

    assert read_by_worker("a") >= size
    assert read_by_worker("a") < size / 2
    assert read_by_worker("b") >= size / 2


def test_two_prompts_in_turn(two_prompts: Workspace) -> None:
    """Two hundred questions, now to the one, now to the other.

    Never an answer from the other one's state.
    """
    right = {name: right_answer(two_prompts, f"You are prompt {name.upper()}.") for name in "ab"}
    for number in range(200):
        name = "ab"[number % 2]
        answer = two_prompts.ask(f"m/{name}")
        assert content(answer) == right[name]
        assert answer["rkcached"]["state"] == "hit"


@pytest.mark.long
def test_two_prompts_in_turn_on_rkllm(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same on the stand-in for RKLLM's library, whose answers show the state behind them."""
    need("cc")
    library = build("E", tmp_path_factory.mktemp("standin"))
    write_model(workspace.root / "m.rkllm")
    workspace.write("a.md", "You are prompt A.\n")
    workspace.write("b.md", "You are prompt B.\n")
    workspace.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: rkllm, library: {library}}}\nmodels:\n  m:\n"
        "    path: m.rkllm\n"
        "    params: {temperature: 0}\n    prompts: {a: a.md, b: b.md}\n",
    )
    workspace.start()
    workspace.wait_settled()
    right = {name: content(workspace.ask(f"m/{name}", cache=False)) for name in "ab"}
    assert right["a"] != right["b"]
    for number in range(200):
        name = "ab"[number % 2]
        answer = workspace.ask(f"m/{name}")
        assert content(answer) == right[name]
        assert answer["rkcached"]["state"] == "hit"


class Crowd:
    """Clients that ask for streams, and hang up at a whim, until it is time to go."""

    def __init__(self, space: Workspace, seconds: float) -> None:
        self.seen: dict[str, int] = {}
        """How often each thing happened to one of them."""
        self._space = space
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        """Ask one question after the other."""
        while time.monotonic() < self._until or self.seen.get("hit", 0) <= 10:
            try:
                self._ask(sum(self.seen.values()) + number)
            except httpx.ReadTimeout:  # it is late, and this one still waits for its turn
                self._count("hung up")

    def _count(self, what: str) -> None:
        with self._lock:
            self.seen[what] = self.seen.get(what, 0) + 1

    def _ask(self, turn: int) -> None:
        body = {
            "model": "m/cook",
            "messages": [{"role": "user", "content": f"Question {turn}"}],
            "max_tokens": 4,
            "stream": True,
        }
        url, patience_s = "/v1/chat/completions", max(3.0, self._until - time.monotonic())
        with (
            self._space.http() as http,
            http.stream("POST", url, json=body, timeout=patience_s) as response,
        ):
            if response.status_code != 200:
                assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
                self._count("refused")
                time.sleep(0.1)  # a client's pause after a refusal; it waits for nothing
                return
            for line in response.iter_lines():
                if turn % 3 == 0:
                    self._count("hung up")
                    return
                assert '"error"' not in line, line
                if '"rkcached"' in line:
                    self._count(json.loads(line[6:])["rkcached"]["state"])


@pytest.mark.long
@pytest.mark.model
def test_sixty_four_clients_that_come_and_go(workspace: Workspace, small_model: Path) -> None:
    """On the real model, each hanging up at a whim.

    No error but 503, nothing leaks, the caches still hit.
    """
    workspace.write("cook.md", "You are a ship's cook. You answer in one short sentence. " * 4)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n"
        "    params: {max_context_len: 512, max_new_tokens: 8, temperature: 0}\n"
        "    prompts: {cook: cook.md}\n",
    )
    workspace.start()
    workspace.wait_state("cook", "fresh")
    workspace.ask("m/cook")
    daemon = psutil.Process(workspace.process.pid if workspace.process else 0)
    before = (daemon.num_fds(), len(daemon.children()), daemon.memory_info().rss)
    crowd = Crowd(workspace, float(os.environ.get("RKCACHED_LOAD_S", "5")))

    with ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(crowd.client, number) for number in range(64)]:
            done.result()
    assert set(crowd.seen) <= {"hit", "refused", "hung up"}, crowd.seen
    assert crowd.seen["hit"] > 10, crowd.seen
    wait_until(lambda: workspace.status()["running"] == 0, "all is quiet")
    wait_until(lambda: daemon.num_fds() <= before[0] + 2, "no descriptor is left")
    assert len(daemon.children()) == before[1]
    assert daemon.memory_info().rss - before[2] < 20 << 20
    assert workspace.ask("m/cook")["rkcached"]["state"] == "hit"
    assert workspace.status()["models"][0]["restarts"] == 0
