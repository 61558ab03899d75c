"""Hostile input to a running daemon.

Whatever comes, it lives, serves the others, and keeps its secrets.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, damage

from rkcached.messages.environment import compile_here

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SLOW = "{% for i in range(ROUNDS) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
ON_DEMAND = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
    "{% if 'bomb' in m.content %}" + ENDLESS + "{% endif %}{% endfor %}"
)


def answered_while(space: Workspace, work: Callable[[], Any]) -> int:
    """How often /healthz was answered while `work` went on."""
    done = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    answered = 0
    with space.http() as client:
        while not done.is_set():
            assert client.get("/healthz").status_code == 200
            answered += not done.is_set()
            done.wait(0.01)
    thread.join()
    return answered


@pytest.mark.long
def test_slow_template_delays_its_own_model_only(workspace: Workspace) -> None:
    """Each render is within its limit. Trying it is limited as a whole, and only for tools.

    However many requests wait for it, another model's request waits for one of them.
    """
    workspace.memory_model()
    rest = "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    begun = time.monotonic()
    compile_here(SLOW.replace("ROUNDS", "1000"), "t")({}, [])
    rounds = int(1000 * 0.5 / (time.monotonic() - begun))  # half a second: a quarter of the limit
    workspace.write("slow.jinja", SLOW.replace("ROUNDS", str(rounds)) + rest)
    workspace.write("own.jinja", rest)
    workspace.declare(
        "{}",
        model="    chat_template: own.jinja\n  slow: {path: m.model, chat_template: slow.jinja}\n",
    )
    workspace.start()
    workspace.ask("m")

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    refusals: list[dict[str, Any]] = []
    waiting = [
        threading.Thread(
            target=lambda: refusals.append(workspace.ask("slow", status=503, tools=tools))
        )
        for _ in range(4)
    ]
    for thread in waiting:
        thread.start()

    time.sleep(0.2)  # nothing tells that the first is being rendered; later is right, too
    begun = time.monotonic()
    workspace.ask("m")
    assert time.monotonic() - begun < 8
    assert any(thread.is_alive() for thread in waiting)
    for thread in waiting:
        thread.join()
    assert len(refusals) == 4
    assert refusals[0]["error"]["code"] == "template_exhausted"


def test_endless_template_blocks_its_own_model_only(workspace: Workspace) -> None:
    """A .jinja file that never ends: its prompt is blocked and says why.

    All else is as if it were not there.
    """
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.write("bad.jinja", ENDLESS)
    workspace.declare(
        "{a: a.md}", model="  bad: {path: m.model, chat_template: bad.jinja, prompts: {b: a.md}}"
    )
    workspace.start()
    workspace.wait_state("a", "fresh")
    blocked = workspace.wait_settled()

    (bad,) = [prompt for prompt in blocked["prompts"] if prompt["model"] == "bad"]
    assert bad["state"] == "blocked"
    assert "did not end within 2 s" in bad["reason"]
    refused = workspace.ask("bad", status=503)
    assert "did not end within 2 s" in refused["error"]["message"]
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"

    workspace.write(
        "bad.jinja", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    workspace.hang_up()
    workspace.wait_settled()
    assert workspace.ask("bad/b")["rkcached"]["state"] == "hit"


def test_endless_render_does_not_stop_the_loop(workspace: Workspace) -> None:
    """A request that makes a template loop is refused.

    While it is rendered, others are answered as ever.
    """
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.write("t.jinja", ON_DEMAND)
    workspace.declare(
        "{a: a.md}", model="  t: {path: m.model, chat_template: t.jinja, prompts: {b: a.md}}"
    )
    workspace.start()
    workspace.wait_settled()
    assert workspace.ask("t/b")["rkcached"]["state"] == "hit"

    answered = answered_while(workspace, lambda: workspace.ask("t/b", "a bomb", status=503))

    assert (
        answered >= 3
    )  # of some hundred; two come before and after a loop that is held for the whole time
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"


SECRET = "Zq9-secret-marker"
NAMES = [
    "..",
    "../../etc/passwd",
    "a/../../b",
    "A",
    "a" * 10_000,
    "\u202e",
    "a\0b",
    ".hidden",
    "a\nb",
    "%2e%2e%2f",
    " ",
    "",
]
TEXTS = [
    "x" * 10_000,
    "\u202e\u200b\ufeff",
    "{{ 7 * 7 }}{% raw %}",
    "\U0001f680" * 300,
    "\r\n\r\n",
    "<|im_end|>",
    "-- '; \\",
]


def test_names_and_texts_of_any_kind(two_prompts: Workspace) -> None:
    """Names that are none and texts of any kind, through every way in.

    Refused or answered, never an internal error.
    """
    space = two_prompts

    def files() -> list[Path]:
        """All but sockets and saved conversations, which come and go."""
        paths = [path.relative_to(space.root) for path in space.root.rglob("*")]
        return sorted(
            path
            for path in paths
            if "admin" not in path.name and ".conversations" not in path.parts
        )

    before = files()
    with space.http(admin=True) as client:
        for name in NAMES:
            stored = client.post("/v1/cache/m", json={"cache_name": name, "content": "text"})
            asked = client.post(
                "/v1/chat/completions",
                json={"model": f"m/{name}", "messages": [{"role": "user", "content": "x"}]},
            )
            chosen = client.post(
                "/v1/chat/completions",
                json={"model": "m", "cache": name, "messages": [{"role": "user", "content": "x"}]},
            )
            assert stored.status_code in (400, 404), (name, stored.text)
            assert asked.status_code in (200, 400, 404), (name, asked.text)
            assert chosen.status_code in (200, 400, 404), (name, chosen.text)
        for text in TEXTS:
            answer = client.post(
                "/v1/chat/completions",
                json={
                    "model": "m/a",
                    "max_tokens": 4,
                    "messages": [{"role": "user", "content": text}],
                },
            )
            assert answer.status_code in (200, 400), (text[:20], answer.text)
        for raw in (b'"\\ud800"', b'"a\\u0000b"', b'"\xff\xfe"'):
            body = b'{"model": "m", "messages": [{"role": "user", "content": ' + raw + b"}]}"
            assert client.post("/v1/chat/completions", content=body).status_code == 400
            body = b'{"cache_name": "x", "content": ' + raw + b"}"
            assert client.post("/v1/cache/m", content=body).status_code == 400
    assert before == files()
    assert "request crashed" not in space.log_text()
    assert space.ask("m/a")["rkcached"]["state"] == "hit"


def test_files_are_private_under_any_umask(workspace: Workspace) -> None:
    """Whatever umask the daemon was started with.

    No file for others, directories 0750, files 0640, sockets as said.
    """
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md}")
    given = set(workspace.root.rglob("*")) | {workspace.log}
    before = os.umask(0)
    try:
        workspace.start()
    finally:
        os.umask(before)
    workspace.wait_settled()
    with workspace.http(admin=True) as client:
        stored = {"cache_name": "s", "content": "stored"}
        assert client.post("/v1/cache/m", json=stored).status_code == 200
    workspace.write("cache/m/a.memory_cache", b"damaged")
    workspace.hang_up()
    workspace.wait_settled()
    modes = {
        path: stat.S_IMODE(path.lstat().st_mode)
        for path in workspace.root.rglob("*")
        if path not in given
    }
    assert modes.pop(workspace.socket) == 0o660
    assert modes.pop(workspace.root / "admin.sock") == 0o600
    modes.pop(workspace.cache / "m/a.memory_cache", None)  # ours
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o027} == {}


def test_no_prompt_text_in_log_or_errors(workspace: Workspace) -> None:
    """At the levels that are meant for people.

    Not of prompts, questions, answers, stored texts or refused bodies.
    """
    workspace.memory_model(script={"say it": SECRET})
    workspace.write("a.md", f"You are {SECRET}.\n")
    workspace.write("bad.md", f"{SECRET}\0\n")
    workspace.write("t.jinja", "{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    workspace.declare(
        "{a: a.md, bad: bad.md}",
        model="  t: {path: m.model, chat_template: t.jinja, prompts: {b: a.md}}",
    )
    workspace.start("--log-level", "info")
    workspace.wait_settled()
    errors = [
        workspace.ask("m/a", SECRET, status=400, temperature=SECRET),
        workspace.ask("m/a", SECRET, status=400, nonsense=SECRET),
        workspace.ask("m/a", SECRET * 1000, status=400),
        workspace.ask("t", SECRET, status=400),
        workspace.ask("m/a", SECRET, status=409, messages=[{"role": "system", "content": SECRET}]),
        workspace.ask("m/a", SECRET, status=400, messages=[{"role": "nobody", "content": SECRET}]),
    ]
    assert SECRET in workspace.ask("m/a", f"say it {SECRET}")["choices"][0]["message"]["content"]
    with workspace.http(admin=True) as client:
        assert (
            client.post("/v1/cache/m", json={"cache_name": "s", "content": SECRET}).status_code
            == 200
        )
        errors.append(
            client.post("/v1/cache/m", json={"cache_name": "..", "content": SECRET}).json()
        )
        errors.append(client.post("/v1/cache/m", content=f'{{"content": "{SECRET}'.encode()).json())
        errors.append(client.get("/v1/status").json())
    workspace.write("cache/m/a.memory_cache", SECRET)
    workspace.hang_up()
    workspace.wait_settled()
    said = json.dumps(errors)
    assert SECRET not in said, said
    assert SECRET not in workspace.log_text()
    assert "level=debug" not in workspace.log_text()


def test_damaged_artifacts_are_never_loaded(two_prompts: Workspace) -> None:
    """Random bytes put in the place of a prompt cache, of the same size and not.

    It is rebuilt, and never used.
    """
    damage(two_prompts, two_prompts.cache / "m/a.memory_cache")
