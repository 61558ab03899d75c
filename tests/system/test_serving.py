"""Asking the running daemon over its socket, on the memory engine.

Where a wrong cache would change the text.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from conftest import Workspace

from rkcached.engines.base import Sampling
from rkcached.engines.memory import expected_text
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate
from tests.waiting import DEADLINE_S, wait_until

SAMPLING = Sampling(
    max_new_tokens=24,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    repeat_penalty=1.1,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)
"""What the manifest's defaults and the tests' max_tokens come to."""


def right_answer(
    space: Workspace, system: str | None, question: str = "hello", model: str = "m.model"
) -> str:
    """What a correct engine says, computed without any cache."""
    messages = [Message(role="user", content=question)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    prompt = ChatTemplate(BUILTIN["chatml"], name="chatml").render(messages)
    return expected_text((space.root / model).read_bytes(), prompt, SAMPLING)


def content(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_prompt_by_model_name(two_prompts: Workspace) -> None:
    """`model/prompt` is answered from that prompt's cache, and rightly."""
    answer = two_prompts.ask("m/a")
    assert right_answer(two_prompts, "You are prompt A.") == content(answer)
    report = answer["rkcached"]
    assert (report["cache"], report["state"]) == ("a", "hit")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == report["cached_tokens"]
    assert report["cached_tokens"] == two_prompts.prompt("a")["artifact"]["tokens"]
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 24


def test_prompt_by_cache_parameter(two_prompts: Workspace) -> None:
    """`"cache": "b"` chooses the prompt b; it must not contradict the model's name."""
    answer = two_prompts.ask("m", cache="b")
    assert right_answer(two_prompts, "You are prompt B.") == content(answer)
    assert answer["rkcached"]["cache"] == "b"
    assert two_prompts.ask("m/a", cache="b", status=400)["error"]["param"] == "cache"


def test_prompt_by_itself(two_prompts: Workspace) -> None:
    """A request whose system message is a prompt finds its cache, final newline or not.

    The request says nothing about it.
    """
    for text in ("You are prompt B.", "You are prompt B.\n"):
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "hello"}]
        answer = two_prompts.ask("m", messages=messages)
        assert (answer["rkcached"]["cache"], answer["rkcached"]["state"]) == ("b", "hit")
        assert right_answer(two_prompts, "You are prompt B.") == content(answer)


def test_longest_prefix_wins(workspace: Workspace) -> None:
    """Of two prompts that both begin the request, the longer one is used."""
    workspace.memory_model()
    template = workspace.write("raw.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")
    workspace.write("short.md", "Rules: be kind.")
    workspace.write("long.md", "Rules: be kind. And be brief.")
    workspace.declare("{short: short.md, long: long.md}", model=f"    chat_template: {template}\n")
    workspace.start()
    workspace.wait_settled()
    system = {"role": "system", "content": "Rules: be kind. And be brief."}
    answer = workspace.ask("m", messages=[system, {"role": "user", "content": " Hello?"}])
    assert answer["rkcached"]["cache"] == "long"


def test_no_prompt(two_prompts: Workspace) -> None:
    """Without a prompt and with another system message, the answer is cold and right."""
    messages = [
        {"role": "system", "content": "Somebody else."},
        {"role": "user", "content": "hello"},
    ]
    answer = two_prompts.ask("m", messages=messages)
    assert right_answer(two_prompts, "Somebody else.") == content(answer)
    assert (answer["rkcached"]["cache"], answer["rkcached"]["state"]) == (None, "cold")
    assert right_answer(two_prompts, None) == content(two_prompts.ask("m"))


def test_cache_false_is_really_cold(two_prompts: Workspace) -> None:
    """`"cache": false` prefills everything, even what is in memory."""
    two_prompts.ask("m/a")
    answer = two_prompts.ask("m/a", cache=False)
    assert answer["rkcached"]["state"] == "cold"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert right_answer(two_prompts, "You are prompt A.") == content(answer)


def test_system_message_conflict(two_prompts: Workspace) -> None:
    """A prompt and a different system message are a conflict; the same one is not."""
    mine = [{"role": "system", "content": "Something else."}, {"role": "user", "content": "hello"}]
    error = two_prompts.ask("m/a", messages=mine, status=409)["error"]
    assert error["code"] == "system_message_conflict"
    same = [
        {"role": "developer", "content": "You are prompt A."},
        {"role": "user", "content": "hello"},
    ]
    assert two_prompts.ask("m/a", messages=same)["rkcached"]["state"] == "hit"


def test_unknown_model_and_prompt(two_prompts: Workspace) -> None:
    """OpenAI's 404 envelope, naming what there is."""
    error = two_prompts.ask("nope", status=404)["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "model_not_found",
        "model",
    )
    assert "known models: m" in error["message"]
    error = two_prompts.ask("m/nope", status=404)["error"]
    assert "known prompts: a, b" in error["message"]


def test_never_the_other_prompts_state(two_prompts: Workspace) -> None:
    """Two prompts asked in turn never answer with each other's state."""
    right = {name: right_answer(two_prompts, f"You are prompt {name.upper()}.") for name in "ab"}
    assert right["a"] != right["b"]
    for number in range(60):
        name = "ab"[number % 2]
        answer = two_prompts.ask(f"m/{name}")
        assert (right[name], "hit") == (content(answer), answer["rkcached"]["state"])


def test_each_model_its_own(workspace: Workspace) -> None:
    """Prompts of one name and one text in two models are two caches.

    One is never given to the other model.
    """
    workspace.memory_model("m.model")
    workspace.memory_model("n.model", seed="n")
    workspace.write("p.md", "Shared text.")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n"
        "  m: {path: m.model, prompts: {p: p.md}}\n  n: {path: n.model, prompts: {p: p.md}}\n",
    )
    workspace.start()
    workspace.wait_settled()
    for name in ("m", "n", "m", "n"):
        answer = workspace.ask(f"{name}/p")
        assert answer["rkcached"]["state"] == "hit"
        assert right_answer(workspace, "Shared text.", model=f"{name}.model") == content(answer)
    assert len(workspace.children()) == 2


def stream(space: Workspace, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, whose end must be [DONE]."""
    body = {
        "model": "m/a",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 24,
        "stream": True,
    } | body
    with (
        space.http() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_comes_piece_by_piece(workspace: Workspace) -> None:
    """As the model writes it; only what piles up while the client is written to goes together."""
    workspace.memory_model(decode_us_per_token=20_000)
    workspace.declare("{}")
    workspace.start()
    pieces, _ = workspace.stream("m", max_tokens=24)
    assert len(pieces) > 12


def test_stream(two_prompts: Workspace) -> None:
    """A streamed answer has the same text, a finish reason, the report, and usage if asked for."""
    chunks = stream(two_prompts, stream_options={"include_usage": True})
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert right_answer(two_prompts, "You are prompt A.") == text
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    last = chunks[-2]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["rkcached"]["state"] == "hit"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert "usage" not in stream(two_prompts)[-1]


def test_models(two_prompts: Workspace) -> None:
    """Each model, and each model/prompt, is a model to a client."""
    with two_prompts.http() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["m", "m/a", "m/b"]
        assert client.get("/nowhere").json()["error"]["code"] == "unknown_url"
        assert client.get("/v1/chat/completions").status_code == 405


def test_parameters_of_the_prompt(workspace: Workspace) -> None:
    """A prompt named in the request brings its own parameters; the request's win over them."""
    workspace.memory_model()
    workspace.write("p.md", "Text.")
    workspace.declare("{p: {files: p.md, params: {max_new_tokens: 5}}}")
    workspace.start()
    workspace.wait_settled()
    assert workspace.ask("m/p", max_tokens=None)["usage"]["completion_tokens"] == 5
    assert workspace.ask("m/p", max_tokens=9)["usage"]["completion_tokens"] == 9


def test_stale_is_answered_cold_and_current(workspace: Workspace) -> None:
    """While its cache is rebuilt, a prompt is answered without it, from the new text.

    The build makes room.
    """
    workspace.memory_model(prefill_us_per_token=3_000)
    text = "The old text of a prompt that takes a while to read. " * 20
    workspace.write("p.md", text)
    workspace.declare("{p: p.md}", params="{max_context_len: 8192}")
    workspace.start()
    workspace.wait_settled()
    new = text.replace("old", "new").strip()
    workspace.write("p.md", new)
    workspace.wait_state("p", "building")
    # Before its prefill begins, a build holds no gate, and a request just goes first.
    wait_until(
        lambda: workspace.prompt("p").get("progress", {}).get("total_tokens"),
        "the prefill has begun",
    )
    answer = workspace.ask("m/p")
    assert right_answer(workspace, new) == content(answer)
    assert answer["rkcached"]["state"] in (
        "building",
        "stale",
    )  # stale once the build has stepped aside
    same = len(text[: text.index("old")])
    assert answer["rkcached"]["cached_tokens"] < same + 100
    workspace.logged("build stepped aside")
    workspace.wait_settled()
    assert workspace.ask("m/p")["rkcached"]["state"] == "hit"


def test_client_gone_stops_generation(workspace: Workspace) -> None:
    """When the client goes away, the generation stops.

    The next request need not wait for it.
    """
    workspace.memory_model(decode_us_per_token=100_000)  # all of it would take 200 s
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}")
    workspace.start()
    workspace.wait_settled()
    for streaming in (True, False):
        body = {
            "model": "m/p",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 2000,
            "stream": streaming,
        }
        data = json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(workspace.socket))
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: d\r\n"
                f"Content-Length: {len(data)}\r\n\r\n"
            )
            client.sendall(head.encode() + data)
            wait_until(lambda: workspace.status()["running"] == 1, "the generation runs")
        wait_until(lambda: workspace.status()["running"] == 0, "the generation stopped")
        assert workspace.ask("m/p", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_worker_killed_while_idle(two_prompts: Workspace) -> None:
    """A worker that is killed comes back for the next request."""
    (child,) = two_prompts.children()
    child.send_signal(signal.SIGKILL)
    wait_until(lambda: two_prompts.status()["models"][0]["restarts"] == 1, "the death was noticed")
    assert "SIGKILL" in two_prompts.status()["models"][0]["last_failure"]
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_worker_dies_in_an_answer(workspace: Workspace) -> None:
    """A crash in the middle of an answer is a clear error: 502, or an error event.

    The next request works.
    """
    workspace.memory_model(faults=[{"op": "generate", "kind": "segfault", "at": 40}])
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}")
    workspace.start()
    workspace.wait_settled()
    error = workspace.ask("m/p", max_tokens=100, status=502)["error"]
    assert error["code"] == "worker_died"
    assert "SIGSEGV" in error["message"]
    body = {
        "model": "m/p",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 100,
        "stream": True,
    }
    with (
        workspace.http() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        events = [
            json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")
        ]
    assert events[0]["choices"][0]["delta"]["content"]
    assert events[-1]["error"]["code"] == "worker_died"
    assert workspace.ask("m/p", max_tokens=8)["rkcached"]["state"] == "hit"


def test_worker_dies_over_a_cache(workspace: Workspace) -> None:
    """A crash while a cache is loaded is answered without it, rightly.

    The cache itself is not blamed for one crash.
    """
    workspace.memory_model(
        faults=[{"op": "load", "kind": "segfault", "at": 2}]
    )  # the first is the build's own proof
    workspace.write("p.md", "You are prompt P.")
    workspace.declare("{p: p.md}")
    workspace.start()
    workspace.wait_settled()
    answer = workspace.ask("m/p")
    assert right_answer(workspace, "You are prompt P.") == content(answer)
    assert answer["rkcached"]["cached_tokens"] == 0
    answer = workspace.ask("m/p")  # by the restarted worker
    assert right_answer(workspace, "You are prompt P.") == content(answer)
    assert answer["rkcached"]["state"] == "hit"
    assert workspace.built() == ["p"]


def test_build_that_crashes_is_quarantined(workspace: Workspace) -> None:
    """After three crashes a prompt is left alone, served cold, with the reason.

    Another model file brings it back.
    """
    workspace.hurry(reconcile__failures__MAX_RETRY_S=0.5)
    workspace.memory_model(faults=[{"op": "save", "kind": "segfault", "at": 1}])
    workspace.write("p.md", "You are prompt P.")
    workspace.write("q.md", "You are prompt Q.")
    workspace.declare("{p: p.md}")
    workspace.start()
    shown = workspace.wait_state("p", "quarantined")
    assert "failed 3 times" in shown["reason"]
    assert "SIGSEGV" in shown["reason"]
    answer = workspace.ask("m/p")
    assert right_answer(workspace, "You are prompt P.") == content(answer)
    assert answer["rkcached"]["state"] == "quarantined"
    assert workspace.stop() == 0
    workspace.start()
    assert workspace.prompt("p")["state"] == "quarantined"  # a restart is no reason to crash again
    workspace.memory_model()
    workspace.wait_state("p", "fresh")
    assert workspace.ask("m/p")["rkcached"]["state"] == "hit"


def test_cache_that_crashes_the_worker_is_quarantined(workspace: Workspace) -> None:
    """After three crashes over one prompt cache it is left alone, also after a restart.

    Another text brings it back.
    """
    workspace.memory_model(faults=[{"op": "load", "kind": "segfault", "at": 1}])
    workspace.write("p.md", "You are prompt P.")
    workspace.write("q.md", "You are prompt Q.")
    workspace.declare(
        "{p: p.md, q: q.md}", top="cache: {verify: off}"
    )  # else the build's own proof would crash
    workspace.start()
    workspace.wait_settled()
    for _ in range(3):
        assert right_answer(workspace, "You are prompt P.") == content(workspace.ask("m/p"))
        workspace.ask("m/p", cache=False)  # the state in memory is not used again
    shown = workspace.wait_state("p", "quarantined")
    assert "loading it failed 3 times" in shown["reason"]
    assert "SIGSEGV" in shown["reason"]
    assert workspace.prompt("q")["state"] == "fresh"
    answer = workspace.ask("m/p")
    assert right_answer(workspace, "You are prompt P.") == content(answer)
    assert answer["rkcached"]["state"] == "quarantined"
    assert workspace.status()["models"][0]["restarts"] == 3
    assert workspace.stop() == 0
    workspace.start()
    assert workspace.prompt("p")["state"] == "quarantined"
    workspace.write("p.md", "You are another prompt P.")
    workspace.wait_state("p", "fresh")
    assert workspace.built() == ["p", "q", "p"]
    assert right_answer(workspace, "You are another prompt P.") == content(workspace.ask("m/p"))


def test_what_was_quarantined_is_tried_again_by_itself(workspace: Workspace) -> None:
    """And if it fails again, it is left alone for twice as long."""
    workspace.hurry(reconcile__failures__QUARANTINE_S=3.0)
    workspace.memory_model(faults=[{"op": "load", "kind": "segfault", "at": 1}])
    workspace.write("p.md", "You are prompt P.")
    workspace.declare("{p: p.md}", top="cache: {verify: off}")
    workspace.start()
    workspace.wait_settled()
    for _ in range(3):
        workspace.ask("m/p")
        workspace.ask("m/p", cache=False)  # the state in memory is not used again
    first = workspace.wait_state("p", "quarantined")
    assert 0 < first["retry_at"] - time.time() <= 3

    workspace.wait_state("p", "fresh")
    workspace.ask("m/p")
    second = workspace.wait_state("p", "quarantined")
    assert "loading it failed 4 times" in second["reason"]
    assert second["retry_at"] - time.time() > 3


def test_build_that_hangs_or_fails_does_not_stop_the_others(workspace: Workspace) -> None:
    """A model that cannot save makes its prompts uncacheable, lastingly.

    The other model's are built.
    """
    workspace.memory_model("m.model", can_save=False)
    workspace.memory_model("n.model")
    workspace.write("p.md", "Text.")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n"
        "  m: {path: m.model, prompts: {p: p.md}}\n  n: {path: n.model, prompts: {p: p.md}}\n",
    )
    workspace.start()
    workspace.wait_settled()
    assert workspace.prompt("p", "m")["state"] == "uncacheable"
    assert workspace.prompt("p", "n")["state"] == "fresh"
    assert workspace.ask("m/p")["rkcached"]["state"] == "uncacheable"
    workspace.hang_up()
    assert workspace.log_text().count("build started model=m") == 1


def test_artifact_damaged_under_the_daemon(two_prompts: Workspace) -> None:
    """A prompt cache that was damaged on disk is never used.

    The answer is right, and the cache is rebuilt.
    """
    path = two_prompts.cache / "m/a.memory_cache"
    right = right_answer(two_prompts, "You are prompt A.")
    two_prompts.ask("m/b")  # so that b, not a, is in memory
    path.write_bytes(path.read_bytes()[:100])
    answer = two_prompts.ask("m/a")
    assert right == content(answer)
    assert answer["rkcached"]["state"] != "hit"
    wait_until(lambda: two_prompts.built().count("a") == 2, "a was rebuilt")
    two_prompts.wait_settled()
    answer = two_prompts.ask("m/a")
    assert (right, "hit") == (content(answer), answer["rkcached"]["state"])


def test_store_deleted_under_the_daemon(two_prompts: Workspace) -> None:
    """A store that is deleted is answered without, made again with its lock, and filled."""
    for _ in range(100):  # the daemon may write a file while its folder is being deleted
        with contextlib.suppress(OSError):
            shutil.rmtree(two_prompts.cache)
            break
    answer = two_prompts.ask("m/b")
    answer = two_prompts.ask("m/a")
    assert right_answer(two_prompts, "You are prompt A.") == content(answer)
    two_prompts.hang_up()
    wait_until(lambda: sorted(two_prompts.built()) == ["a", "a", "b", "b"], "both were built again")
    two_prompts.wait_settled()
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    assert two_prompts.log_text().count("build failed") == 0
    second = two_prompts.cli("run", "--socket", str(two_prompts.root / "t.sock"), code=None)
    assert "belongs to another daemon" in second.stderr


def test_store_that_cannot_be_written(two_prompts: Workspace) -> None:
    """A file in place of the store is shown, requests are answered, nothing storms.

    It heals when the file goes.
    """
    shutil.rmtree(two_prompts.cache)
    two_prompts.cache.write_text("in the way")
    two_prompts.hang_up()
    assert "cannot be read" in two_prompts.status()["cache"]["trouble"]
    assert "the store cannot be read" in two_prompts.cli("status").stdout
    assert right_answer(two_prompts, "You are prompt A.") == content(two_prompts.ask("m/a"))
    two_prompts.hang_up()
    two_prompts.hang_up()
    assert two_prompts.log_text().count("build failed") <= 4
    two_prompts.cache.unlink()
    wait_until(lambda: sorted(two_prompts.built()) == ["a", "a", "b", "b"], "both were built again")
    two_prompts.wait_settled()
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_failures_are_remembered_without_a_disk(workspace: Workspace) -> None:
    """Where a verdict cannot be written.

    As on a full disk, the pause between attempts grows all the same.
    """
    workspace.memory_model(
        faults=[{"op": "save", "kind": "error", "at": number} for number in (1, 2)]
    )
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}")
    workspace.write("cache/.verdicts", "in the way")
    workspace.start()
    workspace.wait_state("p", "fresh")
    workspace.logged("attempts=2")
    assert workspace.log_text().count("build failed") == 2


def test_swapped_artifacts(two_prompts: Workspace) -> None:
    """Two prompt caches of one size that are swapped on disk are noticed by content and rebuilt."""
    a, b = (two_prompts.cache / f"m/{name}.memory_cache" for name in "ab")
    assert a.stat().st_size == b.stat().st_size
    a.rename(a.with_suffix(".x"))
    b.rename(a)
    a.with_suffix(".x").rename(b)
    for name in ("a", "b", "a"):
        assert right_answer(two_prompts, f"You are prompt {name.upper()}.") == content(
            two_prompts.ask(f"m/{name}")
        )
    two_prompts.hang_up()
    two_prompts.wait_settled()
    assert sorted(two_prompts.built()) == ["a", "a", "b", "b"]
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_idle_unload(workspace: Workspace) -> None:
    """A model is loaded when first needed and unloaded when idle; a fresh start loads nothing."""
    workspace.memory_model()
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", model="    idle_unload_s: 1\n")
    workspace.start()
    workspace.wait_settled()
    wait_until(lambda: not workspace.children(), "the model was unloaded")
    assert workspace.ask("m/p")["rkcached"]["state"] == "hit"
    assert len(workspace.children()) == 1
    assert workspace.stop() == 0
    workspace.start()
    assert workspace.children() == []
    assert workspace.status()["reconcile"]["builds"] == 0


def test_restart_rebuilds_nothing(two_prompts: Workspace) -> None:
    """After a restart everything is fresh at once."""
    assert two_prompts.stop() == 0
    two_prompts.start()
    assert {p["state"] for p in two_prompts.status()["prompts"]} == {"fresh"}
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    assert two_prompts.built() == ["a", "b"]


def test_many_clients(two_prompts: Workspace) -> None:
    """Sixteen clients at once each get their own prompt's answer."""
    right = {name: right_answer(two_prompts, f"You are prompt {name.upper()}.") for name in "ab"}

    def one(number: int) -> bool:
        name = "ab"[number % 2]
        return content(two_prompts.ask(f"m/{name}")) == right[name]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(96)))


@pytest.mark.parametrize("phase", ["build", "reply"])
def test_sigterm(workspace: Workspace, phase: str) -> None:
    """SIGTERM during a build or a reply ends the daemon before them.

    No temporary file and no child is left.
    """
    workspace.memory_model(prefill_us_per_token=2_000_000, decode_us_per_token=1_000_000)
    workspace.write("p.md", "A prompt that takes several seconds to read." * 3)
    workspace.declare("{p: p.md}" if phase == "build" else "{}")
    workspace.start()
    client: subprocess.Popen[bytes] | None = None
    if phase == "build":
        workspace.wait_state("p", "building")
        wait_until(
            lambda: workspace.prompt("p")["progress"]["done_tokens"] > 0, "the build makes progress"
        )
    else:
        body = json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 500}
        )
        url = "http://d/v1/chat/completions"
        command = ["curl", "-sS", "--unix-socket", str(workspace.socket), url, "-d", body]
        client = subprocess.Popen(command, stdout=subprocess.PIPE)
        wait_until(lambda: workspace.status()["running"] == 1, "the reply runs")
    children = workspace.children()
    assert children
    assert workspace.stop() == 0
    if client is not None:
        told, _ = client.communicate(timeout=DEADLINE_S)
        assert json.loads(told)["error"]["code"] == "shutting_down"
    assert psutil.wait_procs(children, timeout=DEADLINE_S)[1] == []
    assert list(workspace.cache.rglob("*stage*")) == []
    assert not workspace.socket.exists()


def test_kill_nine_leaves_no_child(two_prompts: Workspace) -> None:
    """A daemon that is killed takes its workers along.

    The next one starts on its socket and store.
    """
    children = two_prompts.children()
    two_prompts.stop(signal.SIGKILL)
    assert psutil.wait_procs(children, timeout=DEADLINE_S)[1] == []
    assert two_prompts.socket.exists()
    two_prompts.start()
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    assert two_prompts.built() == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{nope", "invalid_json"),
        (b"[]", "invalid_value"),
        (b'{"model": "m"}', "missing_parameter"),
        (b'{"model": "m", "messages": []}', "invalid_value"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "best_of": 2}',
            "unsupported_parameter",
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 9}',
            "invalid_value",
        ),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b'{"model": "m", "messages": [{"role": "alien", "content": "x"}]}', "invalid_value"),
        (b"\xff\xfe", "invalid_json"),
    ],
)
def test_bad_bodies(two_prompts: Workspace, body: bytes, code: str) -> None:
    """What is no request gets a 400 in OpenAI's envelope, and the daemon goes on."""
    response = two_prompts.request("POST", "/v1/chat/completions", content=body)
    assert (400, code) == (response.status_code, response.json()["error"]["code"])
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_body_too_large(two_prompts: Workspace) -> None:
    """More than 8 MiB is refused, whether announced or not."""
    data = b" " * (8 * 1024 * 1024 + 1)
    with two_prompts.http() as client:
        assert client.post("/v1/chat/completions", content=data).status_code == 413
        chunked = client.post("/v1/chat/completions", content=iter([data[:100], data[100:]]))
        assert chunked.status_code == 413
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_request_longer_than_the_context(two_prompts: Workspace) -> None:
    """A request beyond the context is a 400 with both numbers."""
    error = two_prompts.ask("m/a", "x" * 5000, status=400)["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
