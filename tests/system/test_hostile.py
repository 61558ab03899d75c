"""Hostile input to a running daemon: whatever comes, it lives, serves the others, and keeps its secrets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from conftest import Workspace

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ON_DEMAND = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n"
    "{% if 'bomb' in m.content %}" + ENDLESS + "{% endif %}{% endfor %}"
)


def slowest_while(space: Workspace, work: Callable[[], Any]) -> float:
    """The longest that /healthz took, in seconds, while `work` went on."""
    done = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    slowest = 0.0
    with space.http() as client:
        while not done.is_set():
            started = time.monotonic()
            assert client.get("/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            done.wait(0.01)
    thread.join()
    return slowest


def test_endless_template_blocks_its_own_model_only(workspace: Workspace) -> None:
    """A .jinja file that never ends: its prompt is blocked and says why; all else is as if it were not there."""
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.write("bad.jinja", ENDLESS)
    workspace.declare("{a: a.md}", model="  bad: {path: m.model, chat_template: bad.jinja, prompts: {b: a.md}}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    blocked = workspace.wait_settled()

    (bad,) = [prompt for prompt in blocked["prompts"] if prompt["model"] == "bad"]
    assert bad["state"] == "blocked"
    assert "did not end within 2 s" in bad["reason"]
    refused = workspace.ask("bad", status=503)
    assert "did not end within 2 s" in refused["error"]["message"]
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"

    workspace.write("bad.jinja", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    workspace.hang_up()
    workspace.wait_settled()
    assert workspace.ask("bad/b")["rkcached"]["state"] == "hit"


def test_endless_render_does_not_stop_the_loop(workspace: Workspace) -> None:
    """A request that makes a template loop is refused; while it is rendered, others are answered as ever."""
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.write("t.jinja", ON_DEMAND)
    workspace.declare("{a: a.md}", model="  t: {path: m.model, chat_template: t.jinja, prompts: {b: a.md}}")
    workspace.start()
    workspace.wait_settled()
    assert workspace.ask("t/b")["rkcached"]["state"] == "hit"

    slowest_s = slowest_while(workspace, lambda: workspace.ask("t/b", "a bomb", status=503))

    assert slowest_s < 1.0
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
