"""The daemon on RKLLM, over the stand-in for librkllmrt.so.

The story, and every way a library can misbehave.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, damage

from tests.rkllm_standin.standin import build, write_model
from tests.waiting import BEFORE_RESCAN_S, DEADLINE_S, wait_until

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

Library = Callable[..., Path]

BOTH = "{a: prompts/a.md, b: prompts/b.md}"
HELLO = [{"role": "user", "content": "hello"}]
NO_SAVE = "W rkllm: this model does not support saving prompt cache"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """`library(group, ...)` is the path of the stand-in built so, compiled once."""
    folder = tmp_path_factory.mktemp("standin")
    return lambda group, **how: build(group, folder, **how)


@pytest.fixture
def d(workspace: Workspace, library: Library) -> Workspace:
    """A workspace with runtime 1.2.3, and the texts of two prompts."""
    return prepared(workspace, library("D"))


@pytest.fixture(params=["D", "E"])
def board(request: pytest.FixtureRequest, workspace: Workspace, library: Library) -> Workspace:
    """A running daemon with the fresh prompts `a` and `b`, on a runtime that measures."""
    return run(prepared(workspace, library(request.param)))


def prepared(space: Workspace, runtime: Path) -> Workspace:
    install(space, runtime.read_bytes())
    space.write("prompts/a.md", "You are prompt A.\n")
    space.write("prompts/b.md", "You are prompt B.\n")
    return space


def run(
    space: Workspace,
    prompts: str = BOTH,
    *,
    settled: bool = True,
    models: str = "m",
    engine: str = "",
    **keys: Any,
) -> Workspace:
    """Start the daemon on `models` with these keys and prompts.

    `engine` adds to the manifest's engine.
    """
    text = f"version: 1\nengine: {{kind: rkllm, library: librkllmrt.so{engine}}}\nmodels:\n"
    for name in models:
        put_model(space, name, **keys)
        params = "{max_context_len: 4096, max_new_tokens: 32, temperature: 0}"
        text += f"  {name}:\n    path: {name}.rkllm\n    params: {params}\n    prompts: {prompts}\n"
    space.write("manifest.yaml", text)
    space.start()
    if settled:
        space.wait_settled()
    return space


def install(space: Workspace, library: bytes) -> None:
    """Put a runtime library in place, as package managers do."""
    space.write("library.new", library).rename(space.root / "librkllmrt.so")


def put_model(space: Workspace, name: str = "m", **keys: Any) -> None:
    """A model file; its fault fires while the file `fault` exists."""
    keys |= {"fault_file": space.root / "fault"} if "fault" in keys else {}
    write_model(space.root / f"{name}.new", **keys).rename(space.root / f"{name}.rkllm")


def switch(space: Workspace, *, on: bool) -> None:
    space.write("fault", "") if on else (space.root / "fault").unlink()


def content(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def cold(space: Workspace, model: str = "m/a", **body: Any) -> str:
    """What the model says without any cache."""
    answer = space.ask(model, cache=False, **body)
    assert answer["rkcached"]["state"] == "cold"
    return content(answer)


def hit(space: Workspace, model: str = "m/a", **body: Any) -> str:
    """What the model says from the prompt's cache, which must be a measured hit."""
    answer = space.ask(model, **body)
    assert answer["rkcached"]["state"] == "hit"
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert (
        space.prompt(model[2:])["artifact"]["tokens"] <= cached < answer["usage"]["prompt_tokens"]
    )
    return content(answer)


def refused(
    space: Workspace, status: int, code: str, cause: str, model: str = "m", **body: Any
) -> None:
    """The request gets an error that names the cause, and the daemon lives on."""
    error = space.ask(model, status=status, **body)["error"]
    assert error["code"] == code
    assert cause in error["message"]
    assert space.status()["ready"]
    assert space.request("GET", "/healthz").json() == {"status": "ok"}


def model_status(space: Workspace) -> dict[str, Any]:
    model: dict[str, Any] = space.status()["models"][0]
    return model


def wait_built(space: Workspace, before: int, names: list[str]) -> None:
    """Wait for the builds since `before`; they must be exactly these."""
    wait_until(
        lambda: len(space.built()) >= before + len(names), f"{names} were built", BEFORE_RESCAN_S
    )
    space.wait_settled()
    assert sorted(space.built()[before:]) == names


# The story


def test_built_and_hit(board: Workspace) -> None:
    """Each prompt is built and proved.

    An answer from its cache is a measured hit and says what a cold one says.
    """
    names = {path.name for path in (board.cache / "m").iterdir()}
    assert {
        f"{name}{suffix}" for name in "ab" for suffix in (".rkllm_cache", ".bin", ".json")
    } <= names
    assert board.prompt("a")["artifact"]["verified"] == "exact"
    right = {name: cold(board, f"m/{name}") for name in "ab"}
    assert right["a"] != right["b"]
    for name in "abba":
        assert right[name] == hit(board, f"m/{name}")
    messages = [{"role": "system", "content": "You are prompt B."}, *HELLO]
    assert hit(board, "m/b") == hit(board, "m/b", messages=messages)


def test_changes_of_the_prompts(board: Workspace) -> None:
    """An edit rebuilds that prompt alone.

    The next answer is from it; `touch` and a restart build nothing.
    """
    old = cold(board)
    board.write("prompts/a.md", "You are prompt A, edited.\n")
    wait_built(board, 2, ["a"])
    new = hit(board)
    assert new == cold(board)
    assert new != old
    subprocess.run(["touch", str(board.root / "prompts/a.md")], check=True)
    board.write(
        "prompts/b.md", "You are prompt B, edited.\n"
    )  # what `touch` caused would have been built by then
    wait_built(board, 3, ["b"])
    assert board.stop() == 0
    board.start()
    assert board.children() == []
    assert new == hit(board)
    assert board.status()["reconcile"]["builds"] == 0


def test_runtime_and_model_replaced(board: Workspace, library: Library) -> None:
    """Another build of the library, and another model file, rebuild everything.

    The next answer is theirs.
    """
    old = hit(board)
    if "runtime version: 1.2.3" in board.log_text():
        install(board, library("D", version="1.2.2").read_bytes())
        reason = "runtime.version: 1.2.3 -> 1.2.2"
    else:
        install(board, (board.root / "librkllmrt.so").read_bytes() + b"\0")
        reason = "runtime.digest: "
    wait_built(board, 2, ["a", "b"])
    started = [line for line in board.log_text().splitlines() if " build started " in line]
    assert [reason in line for line in started] == [False, False, True, True]
    assert old == hit(board)
    put_model(board, arch="llama")
    wait_built(board, 4, ["a", "b"])
    new = hit(board)
    assert new == cold(board)
    assert new != old


@pytest.mark.parametrize(("group", "engine"), [("B", ", abi: 1.1.0"), ("C", "")])
def test_runtime_that_measures_nothing(
    workspace: Workspace, library: Library, group: str, engine: str
) -> None:
    """Before 1.2.1 a cache is proved by time alone, and answers say that reuse is not measured.

    The text is right.
    """
    run(prepared(workspace, library(group)), engine=engine, prefill_tps=1000)
    assert [workspace.prompt(name)["state"] for name in "ab"] == ["fresh", "fresh"]
    assert workspace.prompt("a")["artifact"]["verified"] == "time"
    right = {name: cold(workspace, f"m/{name}") for name in "ab"}
    for name in "aab":
        answer = workspace.ask(f"m/{name}")
        assert right[name] == content(answer)
        report = answer["rkcached"]
        assert (report["cache"], report["state"], report["cached_tokens"]) == (name, "loaded", None)
        assert "not measured" in report["reason"]
        assert answer["usage"]["prompt_tokens_details"] is None
    assert "m/a" in workspace.cli("status").stdout


# Requests


def test_streams_whole_characters(d: Workspace) -> None:
    """Pieces are whole characters.

    However the library cuts its bytes and on whichever thread it calls back.
    """
    run(d, waiting="bytes", callback_thread="own", null_text="yes", decode_tps=50)
    pieces, last = d.stream("m/a", max_tokens=32)
    text = "".join(pieces)
    assert cold(d, max_tokens=32) == text
    assert len(pieces) > 10
    assert not text.isascii()
    assert "\N{REPLACEMENT CHARACTER}" not in text
    assert last["rkcached"]["state"] == "hit"


def test_ends_of_answers(d: Workspace) -> None:
    """Stop strings and max_tokens end an answer where they say, streamed or not.

    So does the model's own limit.
    """
    run(d)
    full = cold(d, max_tokens=32)
    stop = full[9:12]
    for body, expected, reason in (
        ({"stop": [stop]}, full[: full.index(stop)], "stop"),
        ({"max_tokens": 5}, cold(d, max_tokens=5), "length"),
        (
            {"max_tokens": 100},
            full,
            "length",
        ),  # more than the 32 that the runtime was told when it loaded the model
    ):
        answer = d.ask("m/a", **{"max_tokens": 32, **body})
        assert (expected, reason) == (content(answer), answer["choices"][0]["finish_reason"])
        assert expected == "".join(d.stream("m/a", **{"max_tokens": 32, **body})[0])
    assert d.ask("m/a", max_tokens=5)["usage"]["completion_tokens"] == 5


def send(space: Workspace, *, streaming: bool, until: Callable[[], bool]) -> None:
    """Send a request and go away when `until` says so."""
    data = json.dumps(
        {"model": "m", "messages": HELLO, "max_tokens": 300, "stream": streaming}
    ).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(space.socket))
        client.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: d\r\nContent-Length: {len(data)}\r\n"
            "\r\n".encode()
        )
        client.sendall(data)
        wait_until(until, "the request got that far")


@pytest.mark.parametrize("streaming", [True, False])
def test_client_gone_stops_generation(d: Workspace, streaming: bool) -> None:
    """When the client goes away, the generation is aborted.

    The next request is served by the same worker.
    """
    run(d, "{}", decode_tps=1)  # all of it would take 300 s
    d.ask("m", max_tokens=1)
    (worker,) = d.children()
    send(d, streaming=streaming, until=lambda: d.status()["running"] == 1)
    wait_until(lambda: d.status()["running"] == 0, "the generation stopped")
    assert d.ask("m", max_tokens=1)["usage"]["completion_tokens"] == 1
    assert d.children() == [worker]


def test_sampling_of_a_request(board: Workspace) -> None:
    """Before 1.3.0 a request cannot change the temperature: it is told both values.

    Since then it can.
    """
    if "runtime version: 1.3.0" in board.log_text():
        assert board.ask("m/a", temperature=0.5)["rkcached"]["state"] == "hit"
    else:
        cause = "temperature when the model is loaded: it is 0, this run asks for 0.5"
        refused(board, 400, "unsupported_parameter", cause, "m/a", temperature=0.5)
    assert hit(board) == hit(board, temperature=0)


def test_sampling_that_is_ignored(board: Workspace) -> None:
    """A program that always sends a temperature and a seed is answered, and told what it lacks."""
    expected = hit(board)
    manifest = board.manifest.read_text()
    board.write("manifest.yaml", f"{manifest}serving: {{unsupported: ignore}}\n")
    board.hang_up()

    sampling = {"temperature": 0.5, "top_p": 0.5, "seed": 3, "min_p": 0.1, "logprobs": True}
    report = board.ask("m/a", **sampling)["rkcached"]
    is_new = "runtime version: 1.3.0" in board.log_text()
    fixed = [] if is_new else ["temperature", "top_p"]
    assert report["ignored"] == [*fixed, "min_p", "seed", "logprobs"]
    assert report["state"] == "hit"

    report = board.ask("m/a", temperature=0, min_p=0)["rkcached"]
    assert report["ignored"] == []
    if not is_new:
        assert hit(board, temperature=0.5) == expected


@pytest.mark.parametrize("group", ["D", "E"])
def test_state_that_cannot_be_taken_back(
    workspace: Workspace, library: Library, group: str
) -> None:
    """The first request that it costs a hit shows it; then the cache is loaded for each request.

    Every answer is right, a conversation goes on, and another prompt changes nothing.
    """
    board = prepared(workspace, library(group))
    for name in "ab":
        board.write(f"prompts/{name}.md", f"You are prompt {name}. " * 12)
    run(board, rewinds="no")
    expected = {name: cold(board, f"m/{name}") for name in "ab"}

    def state(name: str, question: str = "hello") -> tuple[str, str]:
        answer = board.ask(f"m/{name}", question)
        if question == "hello":
            assert content(answer) == expected[name]
        return answer["rkcached"]["state"], answer["rkcached"]["reason"]

    assert state("a", "Who are you?") == ("hit", "")
    told = "this model's state cannot be taken back to the prompt's end"
    assert state("a") == ("miss", told)
    board.logged("state cannot be taken back model=m")
    for name in "aabab":
        assert state(name) == ("hit", "")

    said = {"role": "assistant", "content": expected["b"]}
    turn = {"role": "user", "content": "And then?"}
    report = board.ask("m/b", messages=[*HELLO, said, turn])["rkcached"]
    assert report["cached_tokens"] > board.prompt("b")["artifact"]["tokens"] + len(expected["b"])


def test_model_that_cannot_save(board: Workspace) -> None:
    """One attempt makes all prompts of such a model uncacheable, for good, in the runtime's words.

    Another heals.
    """
    put_model(board, saves="no")
    for name in "ab":
        assert NO_SAVE in board.wait_state(name, "uncacheable")["reason"]
        answer = board.ask(f"m/{name}")
        assert cold(board, f"m/{name}") == content(answer)
        assert answer["rkcached"]["state"] == "uncacheable"
        assert NO_SAVE in answer["rkcached"]["reason"]
    assert NO_SAVE in board.cli("explain", "m/b").stdout
    assert board.log_text().count(" build started ") == 2 + 1
    board.write("prompts/b.md", "You are prompt B, edited.\n")
    board.hang_up()
    assert board.prompt("b")["state"] == "uncacheable"
    assert board.stop() == 0
    board.start()
    assert [board.prompt(name)["state"] for name in "ab"] == ["uncacheable", "uncacheable"]
    assert board.log_text().count(" build started ") == 2 + 1
    put_model(board, arch="llama")
    wait_built(board, 2, ["a", "b"])
    assert hit(board, "m/b") == cold(board, "m/b")


def test_rkllm_does_not_rank(d: Workspace) -> None:
    """Check names the line, and a request gets the reason with a way that works."""
    put_model(d)
    d.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: rkllm, library: librkllmrt.so}\nmodels:\n  m:\n"
        "    path: m.rkllm\n    rerank: true\n",
    )
    reason = "the engine rkllm gives no relevance scores"
    assert f":6: {reason}" in d.cli("check", code=None).stderr
    d.start()
    ranked = d.request("POST", "/v1/rerank", json={"model": "m", "query": "a", "documents": ["b"]})
    error = ranked.json()["error"]
    assert (ranked.status_code, error["code"]) == (503, "model_unavailable")
    assert reason in error["message"]
    assert "engine.kind: llamacpp" in error["message"]
    d.stop()


def test_a_cpu_that_is_not_there(d: Workspace) -> None:
    """Check and doctor warn of it, and the build that fails for it names it."""
    put_model(d, pins="yes")
    d.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: rkllm, library: librkllmrt.so}\nmodels:\n  m:\n"
        "    path: m.rkllm\n    chat_template: chatml\n    npu: {enabled_cpus: [0, 31]}\n"
        "    prompts: {a: prompts/a.md}\n",
    )
    absent = "CPU 31 does not exist here, this machine has CPUs 0"
    assert f":7: warning: npu.enabled_cpus of m: {absent}" in d.cli("check").stderr
    assert absent in d.cli("doctor", code=None).stdout.replace("\n", " ")
    d.write("manifest.yaml", d.manifest.read_text().replace("[0, 31]", "[31]"))
    d.start()
    blocked = d.wait_state("a", "blocked")
    assert "cannot load the model" in blocked["reason"]
    assert f"correct npu.enabled_cpus of the model: {absent}" in blocked["hint"]
    d.stop()


def test_lines_of_the_library(d: Workspace) -> None:
    """The library's lines are logged with the model's name, at the level they begin with."""
    run(d, saves="no", fault="token3:error")
    switch(d, on=True)
    d.ask("m", status=500)
    said = re.findall(
        r"^\S+ (\w+) +worker says model=m line='(\w) \w+: (.{9})", d.log_text(), re.MULTILINE
    )
    assert {
        ("info", "I", "rkllm-run"),
        ("warning", "W", "this mode"),
        ("error", "E", "token3 fa"),
    } <= set(said)
    levels = {(level, letter) for level, letter, _ in said}
    assert levels == {("debug", "D"), ("info", "I"), ("warning", "W"), ("error", "E")}


def test_lines_that_the_library_does_not_flush(
    d: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C keeps what is printed into a pipe until 4 kB are full.

    The reason of a failure must not wait for that.
    """
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    install(d, build("D", d.root, defines={"NO_FLUSH": "1"}).read_bytes())
    run(d, saves="no", fault="token3:error")
    assert NO_SAVE in d.wait_state("a", "uncacheable")["reason"]
    switch(d, on=True)
    refused(d, 500, "engine_error", "E rkllm: token3 failed")


# Faults


@pytest.mark.parametrize(
    ("planned", "status", "code", "cause"),
    [
        ("init:segv", 502, "worker_died", "SIGSEGV"),
        ("init:abort", 502, "worker_died", "SIGABRT"),
        (
            "init:ill",
            502,
            "worker_died",
            "SIGILL: the library uses an instruction that this CPU does not have",
        ),
        ("init:oom", 503, "model_unavailable", "E RKNN: failed to allocate memory"),
        ("init:platform", 503, "model_unavailable", "target platform RK3576 does not match RK3588"),
    ],
)
def test_model_not_loaded(d: Workspace, planned: str, status: int, code: str, cause: str) -> None:
    """A library that fails to load the model is an error that names the cause.

    Loading is retried automatically.
    """
    switch(d, on=True)
    run(d, "{}", fault=planned)
    refused(d, status, code, cause)
    assert cause in model_status(d)["last_failure"]
    switch(d, on=False)
    d.ask("m")


def test_build_without_a_model(d: Workspace) -> None:
    """While the model cannot be loaded its prompts wait and say why.

    They are built soon after it can be.
    """
    switch(d, on=True)
    run(d, settled=False, fault="init:oom")
    for name in "ab":
        assert "failed to allocate memory" in d.wait_state(name, "blocked")["reason"]
    assert "failed to allocate memory" in d.cli("status").stdout
    switch(d, on=False)
    wait_built(d, 0, ["a", "b"])
    assert hit(d) == cold(d)


def test_crash_of_loading_is_no_prompts_fault(d: Workspace) -> None:
    """However often the library dies while it loads the model, no prompt is given up for it."""
    switch(d, on=True)
    count = d.root / "count"  # which the stand-in can open only where it is not confined
    run(
        d,
        "{a: prompts/a.md}",
        engine=", confine: false",
        settled=False,
        fault="init:segv",
        fault_count_file=count,
    )
    wait_until(
        lambda: (d.root / "count").exists() and (d.root / "count").stat().st_size >= 3,
        "three crashes",
    )
    wait_until(
        lambda: d.prompt("a")["state"] not in ("building", "missing"), "the third was noticed"
    )
    assert d.prompt("a")["state"] == "blocked"
    assert "SIGSEGV" in d.prompt("a")["reason"]
    switch(d, on=False)
    d.cli("regenerate", "m/a")
    assert hit(d) == cold(d)


def test_model_of_a_newer_toolkit(d: Workspace) -> None:
    """A model that the runtime refuses blocks its prompts with the runtime's reason.

    Until another file comes.
    """
    run(d, settled=False, toolkit="9.9.9")
    reason = "rkllm-toolkit 9.9.9, newer than this runtime 1.2.3"
    for name in "ab":
        assert reason in d.wait_state(name, "blocked")["reason"]
    refused(d, 503, "model_unavailable", reason, "m/a")
    put_model(d)
    wait_built(d, 0, ["a", "b"])
    assert hit(d) == cold(d)


@pytest.mark.parametrize(
    ("planned", "status", "code", "cause"),
    [
        ("token3:segv", 502, "worker_died", "SIGSEGV"),
        ("token3:abort", 502, "worker_died", "SIGABRT"),
        ("token3:error", 500, "engine_error", "E rkllm: token3 failed"),
    ],
)
def test_failure_in_an_answer(
    d: Workspace, planned: str, status: int, code: str, cause: str
) -> None:
    """A crash or an error in the middle is an HTTP error, or an error event.

    The next answer is a hit.
    """
    d.hurry(serving__deadly__DEATHS=100)
    run(d, fault=planned)
    right = hit(d)
    switch(d, on=True)
    refused(d, status, code, cause, "m/a")
    pieces, last = d.stream("m/a")
    assert pieces
    assert right.startswith("".join(pieces))
    assert last["error"]["code"] == code
    assert cause in last["error"]["message"]
    if code == "worker_died":
        assert cause in model_status(d)["last_failure"]
    switch(d, on=False)
    assert right == hit(d)
    assert d.built() == ["a", "b"]


def test_request_longer_than_the_context(d: Workspace) -> None:
    """Without a tokenizer only the runtime can count.

    What it says of a refused run is in the error.
    """
    run(d, "{}")
    refused(
        d,
        500,
        "engine_error",
        "prompt is too long: 50",
        messages=[{"role": "user", "content": "x" * 5000}],
    )
    d.ask("m")


@pytest.mark.parametrize(("crash", "name"), [("segv", "SIGSEGV"), ("abort", "SIGABRT")])
def test_crash_over_a_cache(d: Workspace, crash: str, name: str) -> None:
    """A crash while a cache is loaded is answered without it.

    After three the cache is quarantined, with the reason.
    """
    run(d, fault=f"load:{crash}")
    right = cold(d)
    switch(d, on=True)
    for _ in range(3):
        answer = d.ask("m/a")
        assert (right, "miss") == (content(answer), answer["rkcached"]["state"])
        assert name in answer["rkcached"]["reason"]
        cold(d)  # the state in memory is not used again
    shown = d.wait_state("a", "quarantined")
    assert "loading it failed 3 times" in shown["reason"]
    assert name in shown["reason"]
    assert d.prompt("b")["state"] == "fresh"
    switch(d, on=False)
    assert d.ask("m/a")["rkcached"]["state"] == "quarantined"
    assert hit(d, "m/b") == cold(d, "m/b")


def test_crash_in_an_answer_is_not_the_caches_fault(d: Workspace) -> None:
    """A cache that was loaded is not blamed for what comes after.

    It stays fresh however often the library crashes.
    """
    d.hurry(serving__deadly__DEATHS=100)
    run(d, fault="run:segv")
    switch(d, on=True)
    for _ in range(4):
        assert d.ask("m/a", status=502)["error"]["code"] == "worker_died"
    assert d.prompt("a")["state"] == "fresh"
    assert "artifact not loadable" not in d.log_text()
    switch(d, on=False)
    assert hit(d) == cold(d)


def test_crash_in_a_build(d: Workspace) -> None:
    """A prompt whose build crashed three times is left alone and answered cold, with the reason."""
    switch(d, on=True)
    run(d, "{a: prompts/a.md}", settled=False, fault="save:segv")
    shown = d.wait_state("a", "quarantined")
    assert "failed 3 times" in shown["reason"]
    assert "SIGSEGV" in shown["reason"]
    answer = d.ask("m/a")
    assert (cold(d), "quarantined") == (content(answer), answer["rkcached"]["state"])
    assert model_status(d)["restarts"] == 3
    assert d.log_text().count(" build started ") == 3
    put_model(d)
    wait_built(d, 0, ["a"])
    assert hit(d) == cold(d)


@pytest.mark.parametrize(("crash", "name"), [("segv", "SIGSEGV"), ("abort", "SIGABRT")])
def test_crash_while_unloading(d: Workspace, crash: str, name: str) -> None:
    """A model that crashes when it is unloaded is logged and loaded again when needed.

    The daemon stops in order.
    """
    switch(d, on=True)
    run(d, BOTH + "\n    idle_unload_s: 1", fault=f"destroy:{crash}")
    wait_until(lambda: not d.children(), "the model was unloaded")
    wait_until(
        lambda: f"{name} while it was stopped" in model_status(d)["last_failure"],
        "its crash is shown",
    )
    assert hit(d) == cold(d)
    assert d.stop() == 0


def test_client_of_a_hung_library_goes(d: Workspace) -> None:
    """A library that never returns is killed when its client goes.

    The next request is served.
    """
    run(d, fault="run:hang")
    switch(d, on=True)
    send(d, streaming=True, until=lambda: model_status(d)["worker"] == "busy")
    wait_until(lambda: d.status()["running"] == 0, "the hung worker was killed")
    switch(d, on=False)
    assert hit(d) == cold(d)


def test_a_hung_library_is_killed_in_time(d: Workspace) -> None:
    """After engine.timeout_s its request is told, and the next one is served.

    Status says who waits how long.
    """
    run(
        d, engine=", timeout_s: 12", fault="run:hang"
    )  # a worker starts within that, on a busy machine
    right = cold(d)
    switch(d, on=True)
    with ThreadPoolExecutor() as pool:
        hung = pool.submit(d.ask, "m/a", status=504)
        wait_until(lambda: model_status(d)["worker"] == "busy", "it hangs")
        waiting = pool.submit(d.ask, "m/b")
        wait_until(lambda: model_status(d)["waiting"] == 1, "another waits")
        wait_until(lambda: model_status(d)["state_s"] >= 2.5, "it takes long")
        shown = d.cli("status").stdout
        switch(d, on=False)
        assert hung.result(DEADLINE_S)["error"]["code"] == "worker_timeout"
        assert content(waiting.result(DEADLINE_S))
    assert re.search(r"model m: busy for \d+ s, 1 waiting", shown)
    assert right == content(d.ask("m/a"))


def test_stop_while_the_library_hangs(d: Workspace) -> None:
    """SIGTERM while the library hangs ends the daemon all the same, and its client is told."""
    run(d, fault="run:hang")
    switch(d, on=True)
    with ThreadPoolExecutor() as pool:
        client = pool.submit(d.ask, "m/a", status=503)
        wait_until(lambda: model_status(d)["worker"] == "busy", "it hangs")
        assert d.stop() == 0
        assert client.result(DEADLINE_S)["error"]["code"] == "shutting_down"


def of_another_machine(runtime: bytes) -> bytes:
    """An ELF file whose e_machine is 8 (MIPS)."""
    return runtime[:18] + b"\x08\x00" + runtime[20:]


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda _: b"not a library\n", "is a text file, not a shared library"),
        (lambda _: b"", "is empty"),
        (of_another_machine, "is a library for ELF machine 8, this machine is"),
        (None, "there is no runtime library at"),
    ],
    ids=["text", "empty", "machine", "missing"],
)
def test_library_unusable(d: Workspace, spoil: Callable[[bytes], bytes] | None, cause: str) -> None:
    """What is no runtime for this machine is told everywhere and loaded nowhere.

    Until the right file comes.
    """
    path = d.root / "librkllmrt.so"
    good = path.read_bytes()
    path.unlink() if spoil is None else install(d, spoil(good))
    run(d)
    assert cause in d.prompt("a")["reason"]
    refused(d, 503, "model_unavailable", cause, "m/a")
    assert cause in model_status(d)["trouble"]
    assert d.children() == []
    install(d, good)
    wait_built(d, 0, ["a", "b"])
    assert hit(d) == cold(d)


# Two models


@pytest.mark.long
@pytest.mark.parametrize("concurrent", [False, True])
def test_two_models(d: Workspace, concurrent: bool) -> None:
    """Two models never use the NPU at the same time; with `engine: {concurrent: true}` they do."""
    run(d, "{}", models="mn", engine=f", concurrent: {concurrent}".lower(), decode_tps=8)

    def waited_ms(name: str) -> float:
        queue_ms: float = d.ask(name, max_tokens=32)["rkcached"]["queue_ms"]
        return queue_ms

    for name in "mn":
        d.ask(name, max_tokens=1)  # loads it
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(waited_ms, name) for name in "mn"]
        if concurrent:
            both = ["busy", "busy"]
            wait_until(
                lambda: [one["worker"] for one in d.status()["models"]] == both, "both are at work"
            )
        waited = max(one.result() for one in asked)
    if not concurrent:
        assert time.monotonic() - started > 2 * 32 / 8
        assert waited > 700 * 32 / 8


def test_damaged_artifacts_are_never_loaded(board: Workspace) -> None:
    """Bytes that nobody built never reach the runtime's loader, which may do anything."""
    damage(board, board.cache / "m/a.rkllm_cache")


@pytest.mark.parametrize(
    ("group", "tokens", "warned"), [("D", 512, True), ("D", 256, False), ("E", 512, False)]
)
def test_check_warns_of_long_answers_in_builds(
    workspace: Workspace, library: Library, group: str, tokens: int, warned: bool
) -> None:
    """Before 1.3.0 each build generates a whole answer.

    Said with the cost and the remedy, and no problem.
    """
    prepared(workspace, library(group))
    put_model(workspace)
    workspace.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: rkllm, library: {workspace.root / 'librkllmrt.so'}}}\n"
        "models:\n"
        f"  m:\n    path: m.rkllm\n    params:\n      max_new_tokens: {tokens}\n",
    )
    done = workspace.cli("check")
    assert "ok, 1 model" in done.stdout
    assert ("manifest.yaml:7: warning: max_new_tokens of m is 512" in done.stderr) is warned
    assert ("1.3.0" in done.stderr) is warned


TOOL = {"type": "function", "function": {"name": "f"}}
OWN = """\
{% if tools %}{{ tools | tojson }}{% endif %}
{% for message in messages %}
<{{ message.role }}>{{ message.content }}
{% for call in message.tool_calls or [] %}
OPENING{{ call.function | tojson }}CLOSING
{% endfor %}
{% endfor %}
<assistant>
"""


@pytest.mark.parametrize(
    ("opening", "closing", "is_printed"),
    [
        ("<tool_call>", "</tool_call>", True),
        ("<|START_ACTION|>", "<|END_ACTION|>", False),
    ],
)
def test_calls_in_control_tokens_are_refused(
    d: Workspace, opening: str, closing: str, is_printed: bool
) -> None:
    """RKLLM does not print them, so such a call would come back as text."""
    d.write("own.jinja", OWN.replace("OPENING", opening).replace("CLOSING", closing))
    put_model(d)
    d.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: rkllm, library: librkllmrt.so}\n"
        "models:\n  m:\n    path: m.rkllm\n    chat_template: own.jinja\n    prompts: {}\n",
    )
    d.start()
    if is_printed:
        assert content(d.ask("m", tools=[TOOL]))
    else:
        refused(d, 400, "unsupported_parameter", "with control tokens", tools=[TOOL])


def test_a_conversation_is_saved_when_it_rests(d: Workspace) -> None:
    """A save is a run here: no request waits for it, and the manifest has to ask for it."""
    d.hurry(serving__resting__REST_S=0.2)
    run(d)
    d.write(
        "manifest.yaml",
        f"{d.manifest.read_text()}cache: {{conversations: {{max_bytes: 64MiB}}}}\n",
    )
    d.wait_settled()
    talk = HELLO * 1
    for _ in range(2):
        answer = d.ask("m/a", messages=talk)
        question = {"role": "user", "content": "Tell me more of all that, please. " * 4}
        talk = [*talk, answer["choices"][0]["message"], question]
    d.ask("m/a", messages=talk)
    wait_until(lambda: d.status()["cache"]["conversations"] == 1, "the conversation was saved")

    d.ask("m/b", "Something else?")
    again = [*talk[:-1], {"role": "user", "content": "And then?"}]
    right = d.ask("m/a", messages=again, cache=False)
    d.ask("m/b", "Something else?")
    answer = d.ask("m/a", messages=again)
    assert content(answer) == content(right)
    tokens = d.prompt("a")["artifact"]["tokens"]
    assert answer["rkcached"]["cached_tokens"] > tokens + 20


def test_a_conversation_is_not_saved_unless_the_manifest_says_so(d: Workspace) -> None:
    d.hurry(serving__resting__REST_S=0.1)
    run(d)
    talk = [*HELLO, {"role": "assistant", "content": "Hi."}, *HELLO]
    for _ in range(2):
        d.ask("m/a", messages=talk)
        d.ask("m/b")
    # The end of the daemon is the last time at which one would be saved.
    assert d.stop() == 0
    assert list(d.cache.rglob("*.state")) == []


@pytest.mark.parametrize(("group", "engine"), [("B", ", abi: 1.1.0"), ("D", ""), ("E", "")])
def test_a_preloaded_prompt_is_in_the_runtime_before_a_request(
    workspace: Workspace, library: Library, group: str, engine: str
) -> None:
    """Where the runtime keeps no state, its cache file is read instead, and each answer loads it.

    After another prompt the runtime goes back to it.
    """
    space = prepared(workspace, library(group))
    space.hurry(serving__preload__QUIET_S=0.2)
    run(space, BOTH + "\n    preload: a", engine=engine, prefill_tps=1000)
    space.logged("prompt cache read" if group == "B" else "prompt preloaded")
    assert space.stop() == 0
    space.start()
    if group == "B":
        wait_until(lambda: space.log_text().count("prompt cache read") == 2, "it was read again")
        report = space.ask("m/a")["rkcached"]
        assert report["model_load_ms"] == 0
        assert report["load_ms"] > 0
        return

    wait_until(lambda: space.log_text().count("prompt preloaded") >= 2, "it was loaded again")
    report = space.ask("m/a")["rkcached"]
    assert (report["model_load_ms"], report["load_ms"], report["state"]) == (0, 0, "hit")
    before = space.log_text().count("prompt preloaded")
    assert hit(space, "m/b")
    wait_until(lambda: space.log_text().count("prompt preloaded") > before, "it went back")
    report = space.ask("m/a")["rkcached"]
    assert (report["load_ms"], report["state"]) == (0, "hit")
