"""What repeats is noticed, suggested and stored, and shown to nobody whom it does not concern."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace
from test_reuse import as_user

from tests.waiting import wait_until

RULES = "".join(f"Rule {number}: be kind to guest {number}.\n" for number in range(1, 41))
SECRET = f"You are the cook of a house whose name is Marigold.\n{RULES}"
TOOL = {
    "type": "function",
    "function": {"name": "ring", "description": "Ring. " * 99, "parameters": {"type": "object"}},
}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    """A daemon on the memory engine, with one declared prompt that shares nothing with SECRET."""
    workspace.memory_model()
    workspace.write("other.md", "A carpenter speaks. " * 20)
    workspace.declare("{other: other.md}", model="    chat_template: chatml\n")
    workspace.start()
    workspace.wait_state("other", "fresh")
    return workspace


def open_to_all(space: Workspace) -> None:
    for place in (space.socket, *space.socket.parents):
        if place == Path(tempfile.gettempdir()):
            break
        place.chmod(place.stat().st_mode | 0o077)


def ask(space: Workspace, system: str, question: str, **body: Any) -> dict[str, Any]:
    """An answer's report, after another request has taken the state in the engine."""
    space.ask("m/other", max_tokens=2)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    report: dict[str, Any] = space.ask("m", messages=messages, max_tokens=2, **body)["rkcached"]
    return report


def repeat(space: Workspace, times: int = 3, system: str = SECRET, **body: Any) -> None:
    for number in range(times):
        ask(space, system, f"{number} o'clock?", **body)


def suggestions(space: Workspace, *, admin: bool = False) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = space.request("GET", "/v1/suggestions", admin=admin).json()[
        "data"
    ]
    return answer


def write(space: Workspace, name: str, status: int = 202, **wanted: Any) -> dict[str, Any]:
    found = wanted or {"id": suggestions(space)[0]["id"]}
    response = space.request("POST", "/v1/suggestions", json={"name": name, **found})
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_what_repeats_is_suggested(space: Workspace) -> None:
    """By the third request: tokens, requests, uid and time, in status and in the command."""
    repeat(space, 2)
    assert suggestions(space) == []
    assert "no suggestion yet: it takes three requests" in space.cli("suggest").stdout

    repeat(space, 1)
    (found,) = suggestions(space)
    assert (found["model"], found["uid"], found["requests"]) == ("m", os.geteuid(), 3)
    assert abs(found["size_bytes"] - len(SECRET)) < 60
    assert found["tokens"] > 100
    assert found["prefill_ms"] > 0
    assert space.status()["suggestions"] == [found]

    line = f"{found['tokens']:,} tokens began 3 requests of uid {os.geteuid()} and "
    assert line in space.cli("suggest").stdout
    assert f"rkcached suggest {found['id']} --write NAME" in space.cli("suggest").stdout
    assert f"model m: {line}" in space.cli("status").stdout
    assert json.loads(space.cli("suggest", "--json").stdout) == [found]
    assert "Marigold" not in space.log_text()


def test_the_next_request_is_stored(space: Workspace) -> None:
    """As a prompt like any other; the suggestion goes when its cache serves."""
    repeat(space)
    (found,) = suggestions(space)
    said = space.cli("suggest", "--write", "house").stdout
    assert "the next request that begins so is stored as m/house" in said
    assert suggestions(space)[0]["outcome"] == "waiting"
    assert space.prompt("house") == {}

    ask(space, SECRET, "who are you?")
    space.wait_state("house", "fresh")
    assert (space.root / "state/prompts/m/house.md").read_text() == SECRET.rstrip()
    shown = space.cli("suggest", found["id"]).stdout
    assert "house: stored" in shown

    assert ask(space, SECRET, "and now?")["state"] == "hit"
    assert suggestions(space) == []
    assert "Marigold" not in space.log_text()


def test_a_part_of_the_system_message_is_stored_to_a_line_end(space: Workspace) -> None:
    """What changes from request to request is left out."""
    for day in ("Monday, the 1st", "Tuesday, the 2nd", "Friday, the 3rd"):
        ask(space, f"{SECRET}Today is {day}.\nBe brief.", "hello")
    write(space, "house")
    assert ask(space, f"{SECRET}Today is Sunday, the 4th.\nBe brief.", "hello")["state"] == "cold"
    space.wait_state("house", "fresh")
    stored = (space.root / "state/prompts/m/house.md").read_text()
    assert SECRET.startswith(stored + "\n")
    assert len(stored) > len(SECRET) - 300
    report = ask(space, f"{SECRET}Today is Monday, the 5th.\nBe brief.", "hello")
    assert (report["cache"], report["state"]) == ("house", "partial")


def test_what_cannot_be_stored_says_why(space: Workspace) -> None:
    """Tools are declared in the manifest, and a text without a system message not at all."""
    repeat(space, tools=[TOOL])
    assert "tools: FILE" in suggestions(space)[0]["next_step"]
    write(space, "house")
    repeat(space, 1, tools=[TOOL])
    wait_until(
        lambda: "with the tools of the requests" in suggestions(space)[0]["outcome"],
        "it says why nothing was stored",
    )
    assert not (space.root / "state/prompts/m/house.md").exists()

    for number in range(3):
        space.ask("m/other", max_tokens=2)
        body = {"model": "m", "prompt": f"{SECRET} {number}", "max_tokens": 2}
        assert space.request("POST", "/v1/completions", json=body).status_code == 200
    steps = [found["next_step"] for found in suggestions(space)]
    assert "send it as the system message: only that can become a prompt" in steps


def test_names_and_ids_that_cannot_be(space: Workspace) -> None:
    """Nothing is overwritten; each refusal says what to do."""
    repeat(space)
    (found,) = suggestions(space)
    assert write(space, "other", 409)["error"]["code"] == "prompt_exists"
    assert write(space, "../x", 400)["error"]["code"] == "invalid_name"
    assert write(space, "x", 404, id="ab")["error"]["code"] == "suggestion_not_found"
    space.write("state/prompts/m/taken.md", "")
    assert "nothing is overwritten" in write(space, "taken", 409)["error"]["message"]
    assert "there is no suggestion 'ab'" in space.cli("suggest", "ab", code=66).stderr

    repeat(space, system=f"Another one.\n{RULES}")
    refusal = space.cli("suggest", "--write", "x", code=64).stderr
    assert "there are 2 suggestions" in refusal
    assert found["id"] in refusal


@needs_root
def test_nobody_sees_what_others_repeat(space: Workspace) -> None:
    """Not even how much or how often; who may open the socket for changes sees all."""
    open_to_all(space)
    with as_user(12001):
        repeat(space)
        (found,) = suggestions(space)
        assert found["uid"] == 12001

    with as_user(12002):
        assert suggestions(space) == []
        assert space.status()["suggestions"] == []
        assert write(space, "x", 404, id=found["id"])["error"]["code"] == "suggestion_not_found"
        repeat(space, 2)
        assert suggestions(space) == []

    assert suggestions(space) == []
    assert suggestions(space, admin=True) == [found]
    assert "of uid 12001" in space.cli("suggest").stdout

    space.cli("suggest", "--write", "house")
    with as_user(12002):
        ask(space, SECRET, "of another user")
    outcomes = {s["uid"]: s["outcome"] for s in suggestions(space, admin=True)}
    assert outcomes == {12001: "waiting", 12002: ""}
    with as_user(12001):
        ask(space, SECRET, "hello")
    space.wait_state("house", "fresh")
