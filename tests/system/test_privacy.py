"""Nothing that a user is told depends on what another one asked."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest
from conftest import Workspace
from test_learning import open_to_all
from test_reuse import as_user
from test_shares import connections

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")

ANNE, BOB = 12001, 12002
SECRET = "The fish is hidden under the third stone behind the lighthouse. " * 4
PLAIN = "What do you know about the sea and about the ships that cross it? " * 4


@pytest.fixture(params=[1, 4], ids=["one state", "four states"])
def daemon(workspace: Workspace, request: pytest.FixtureRequest) -> Workspace:
    """A daemon with two declared prompts, whose prefill takes a measurable time."""
    workspace.memory_model(states=request.param, prefill_us_per_token=20)
    for name in ("a", "b"):
        workspace.write(f"{name}.md", f"You are prompt {name}. " * 10)
    workspace.declare("{a: a.md, b: b.md}", model="    chat_template: chatml\n")
    workspace.start()
    workspace.wait_settled()
    open_to_all(workspace)
    return workspace


def ask(space: Workspace, uid: int, question: str, model: str = "m/a") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    with as_user(uid):
        report: dict[str, Any] = space.ask(model, messages=messages, max_tokens=4)["rkcached"]
    return report


def told(report: dict[str, Any]) -> dict[str, Any]:
    """All that the report tells, where a time is told only as zero or not."""
    times = {name: value > 0 for name, value in report.items() if name.endswith("_ms")}
    rest = {name: value for name, value in report.items() if isinstance(value, str | int | None)}
    return rest | {name: times[name] for name in ("load_ms", "model_load_ms")}


@pytest.mark.parametrize("model", ["m/a", "m"])
def test_an_answer_tells_nothing_of_what_another_asked(daemon: Workspace, model: str) -> None:
    """Bob guesses what Anne asked: rightly, at its beginning, and wrongly.

    He guesses each but once, and other questions come in between, so that each time his request
    finds the same.
    """
    ask(daemon, BOB, "Hello!", model)
    reports = []
    for number, (anne, bob) in enumerate(
        ((SECRET, SECRET), (SECRET[:100], SECRET), (PLAIN, SECRET))
    ):
        for turn in range(4):
            ask(daemon, BOB, f"{turn} Good night. " * 20, "m/b")
        ask(daemon, ANNE, f"{number} {anne}", model)
        reports.append(told(ask(daemon, BOB, f"{number} {bob}", model)))
    assert reports[0] == reports[1] == reports[2]
    whole = daemon.prompt("a")["artifact"]["tokens"]
    assert reports[0]["cached_tokens"] <= whole


def test_events_and_status_tell_a_user_of_his_own_answers_only(daemon: Workspace) -> None:
    with connections(daemon, BOB, 1) as (listener,):
        listener.request("GET", "/v1/events")
        stream = listener.getresponse()
        received: list[bytes] = []

        def read() -> None:
            try:
                while line := stream.readline():
                    received.append(line)
            except (OSError, ValueError):
                pass

        reader = threading.Thread(target=read)
        reader.start()
        ask(daemon, ANNE, SECRET)
        own = ask(daemon, BOB, PLAIN)
        with as_user(BOB), daemon.http() as client:
            status = client.get("/v1/status").json()
        listener.sock.shutdown(2)
        reader.join()

    answers = [
        json.loads(line.removeprefix(b"data: "))
        for line in received
        if line.startswith(b"data: ") and b'"ttft_ms"' in line
    ]
    assert len(answers) <= 1
    assert [answer["ttft_ms"] for answer in status["recent"]] == [own["ttft_ms"]]
    assert SECRET[:20] not in json.dumps(status)


def test_states_are_shared_where_the_manifest_says_so(workspace: Workspace) -> None:
    """One person with several users: then the next one goes on from what the last one asked."""
    workspace.memory_model(states=4)
    workspace.write("a.md", "You are prompt a. " * 10)
    workspace.declare(
        "{a: a.md}", top="serving: {share_state: true}", model="    chat_template: chatml\n"
    )
    workspace.start()
    workspace.wait_settled()
    open_to_all(workspace)
    whole = workspace.prompt("a")["artifact"]["tokens"]
    ask(workspace, ANNE, SECRET)
    assert ask(workspace, BOB, SECRET)["cached_tokens"] > whole + 100
