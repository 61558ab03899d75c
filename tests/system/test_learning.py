"""What repeats is noticed, suggested and stored, and shown to nobody whom it does not concern."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
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

FORGET = "cache: {conversations: {keep_s: 0}}"
"""What repeats has to be prefilled again: no saved conversation has it."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    """A daemon on the memory engine, with one declared prompt that shares nothing with SECRET."""
    # Reading costs more than loading, also where other tests take the processor.
    workspace.memory_model(prefill_us_per_token=20)
    workspace.write("other.md", "A carpenter speaks. " * 20)
    workspace.declare("{other: other.md}", top=FORGET, model="    chat_template: chatml\n")
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
    response = space.request("POST", "/v1/suggestions", json={"name": name, **found}, admin=True)
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
    assert json.loads(space.cli("suggest", "--json").stdout)["suggestions"] == [found]
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


def test_what_a_saved_conversation_has_is_not_suggested(space: Workspace) -> None:
    """It need not be prefilled again."""
    space.declare("{other: other.md}", model="    chat_template: chatml\n")
    space.hang_up()
    repeat(space, 1, system=SECRET * 2)
    space.ask("m/other", max_tokens=2)
    wait_until(lambda: space.status()["cache"]["conversations"], "the conversation is saved")
    repeat(space, 4, system=SECRET * 2)
    assert suggestions(space) == []


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
    assert "characters a-z" in write(space, "../x", 400)["error"]["message"]
    for name in ("learned-x", "generate-binary"):
        assert "choose another name" in write(space, name, 400)["error"]["message"]
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
        refused = space.request("POST", "/v1/suggestions", json={"name": "x", "id": found["id"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")
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


# Learning without being asked


LEARN = "cache: {learn: {after: 3}, conversations: {keep_s: 0}}"


@pytest.fixture
def learner(workspace: Workspace) -> Workspace:
    """A daemon that learns, on the memory engine."""
    workspace.memory_model()
    workspace.write("other.md", "A carpenter speaks. " * 20)
    workspace.declare("{other: other.md}", top=LEARN, model="    chat_template: chatml\n")
    workspace.start()
    workspace.wait_state("other", "fresh")
    open_to_all(workspace)
    return workspace


def learned(space: Workspace, *, admin: bool = True) -> list[dict[str, Any]]:
    """Those that are fresh."""
    prompts = space.request("GET", "/v1/status", admin=admin).json()["prompts"]
    return [p for p in prompts if p["learned"] and p["state"] == "fresh"]


def wait_learned(space: Workspace, count: int = 1) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = wait_until(
        lambda: prompts if len(prompts := learned(space)) == count else None,
        lambda: f"{count} are learned: {space.status()['prompts']}",
    )
    return found


def test_what_repeats_is_learned(learner: Workspace) -> None:
    """The fourth request is a hit, also after a restart; deleting it is left to the admin."""
    repeat(learner)
    (prompt,) = wait_learned(learner)
    name = prompt["prompt"]
    assert re.fullmatch(r"learned-[0-9a-f]{12}", name)
    assert prompt["description"] == f"learned from requests of uid {os.geteuid()}"
    report = ask(learner, SECRET, "and now?")
    assert (report["cache"], report["state"]) == (name, "hit")
    assert "Marigold" not in learner.log_text()
    assert learner.cli("status", "--exit-code").stdout

    learner.stop()
    learner.start()
    wait_learned(learner)
    assert ask(learner, SECRET, "again?")["state"] == "hit"
    assert learner.request("DELETE", f"/v1/cache/m/{name}").status_code == 403
    assert learner.request("DELETE", f"/v1/cache/m/{name}", admin=True).status_code == 200
    assert learned(learner) == []
    assert list((learner.root / "state/learned").glob("**/*.md")) == []
    assert ask(learner, SECRET, "gone?")["state"] == "cold"


def test_without_the_key_nothing_is_learned(space: Workspace) -> None:
    """Nor is used what was learned before."""
    repeat(space, 5)
    assert not (space.root / "state/learned").exists()


@needs_root
def test_what_is_learned_serves_its_user_only(learner: Workspace) -> None:
    """Others neither use it, nor see it anywhere, nor can they name it."""
    with as_user(12001):
        repeat(learner)
    (prompt,) = wait_learned(learner)
    name = prompt["prompt"]
    with as_user(12001):
        assert [p["prompt"] for p in learned(learner, admin=False)] == [name]
        assert ask(learner, SECRET, "mine?")["state"] == "hit"
        assert learner.ask(f"m/{name}")["rkcached"]["state"] == "hit"

    with as_user(12002):
        report = ask(learner, SECRET, "mine?")
        assert (report["cache"], report["state"]) == (None, "cold")
        assert report["cached_tokens"] < 40
        error = learner.ask(f"m/{name}", status=404)["error"]
        unknown = learner.ask("m/learned-000000000000", status=404)["error"]
        assert error["code"] == unknown["code"] == "prompt_not_found"
        assert error["message"].replace(name, "") == unknown["message"].replace(
            "learned-000000000000", ""
        )
        for path in ("/v1/status", "/v1/cache/m", "/v1/models", "/metrics", "/"):
            shown = learner.request("GET", path).text
            assert "learned-" not in shown, path
            assert "Marigold" not in shown
        assert learner.request("GET", f"/v1/cache/m/{name}").status_code == 404
        assert learner.request("GET", f"/v1/models/m/{name}").status_code == 404
        assert learner.status()["summary"] == "1 fresh, 0 blocked"
        assert 'state="fresh"} 1.0' in learner.request("GET", "/metrics").text

    # As soon as he repeats it himself, he has one of his own.
    with as_user(12002):
        repeat(learner)
    names = {p["prompt"] for p in wait_learned(learner, 2)}
    assert name in names
    with as_user(12002):
        (mine,) = learned(learner, admin=False)
        assert mine["prompt"] != name
        assert ask(learner, SECRET, "mine?")["cache"] == mine["prompt"]


@needs_root
def test_events_are_for_whom_they_concern(learner: Workspace) -> None:
    """Another user's stream has no event of it, and its own user's has all."""
    with contextlib.ExitStack() as closing:
        lines = {}
        for uid in (12001, 12002):
            client = closing.enter_context(learner.http())
            with as_user(uid):
                stream = closing.enter_context(client.stream("GET", "/v1/events"))
                lines[uid] = stream.iter_lines()
                next(lines[uid])

        with as_user(12001):
            repeat(learner)
        wait_learned(learner)
        with as_user(12001):
            ask(learner, SECRET, "hit?")
            learner.ask("m/other", question="the last one", max_tokens=3)
        began = time.time()
        with as_user(12002):
            learner.ask("m/other", question="the only one", max_tokens=3)
        # Three pairs, one more, and the last one.
        assert "learned-" in heard(lines[12001], answers=9)
        text = heard(lines[12002], answers=1)
        assert "learned-" not in text
        only = json.loads(text.splitlines()[-1].removeprefix("data: "))
        assert only["time"] >= round(began, 3) - 0.001, "the first answer in it is his own"


def heard(lines: Iterator[str], *, answers: int) -> str:
    """The events until so many answers."""
    text = ""
    for line in lines:
        text += line + "\n"
        answers -= line == "event: answer"
        if answers == 0:
            figures = next(lines)
            assert '"owner"' not in figures
            return text + figures
    raise AssertionError(text)


@needs_root
def test_shared_prompts_serve_everybody(workspace: Workspace) -> None:
    workspace.memory_model()
    workspace.write("other.md", "A carpenter speaks. " * 20)
    top = "cache: {learn: {share: true}, conversations: {keep_s: 0}}"
    workspace.declare("{other: other.md}", top=top, model="    chat_template: chatml\n")
    workspace.start()
    workspace.wait_state("other", "fresh")
    open_to_all(workspace)
    with as_user(12001):
        repeat(workspace)
    (prompt,) = wait_learned(workspace)
    assert prompt["description"] == "learned from requests"
    with as_user(12002):
        assert ask(workspace, SECRET, "ours?")["cache"] == prompt["prompt"]


def test_what_is_not_used_makes_room(workspace: Workspace) -> None:
    """The least recently used goes first; one that is too large alone is not learned again."""
    workspace.memory_model(context_tokens=500_000)
    workspace.write("other.md", "A carpenter speaks. " * 20)
    workspace.declare(
        "{other: other.md}",
        params="{max_context_len: 500000}",
        top="cache: {learn: {max_bytes: 1MiB}, conversations: {keep_s: 0}}",
        model="    chat_template: chatml\n",
    )
    workspace.start()
    workspace.wait_state("other", "fresh")
    texts = [f"Cook {number}.\n{RULES * 33}" for number in range(3)]
    for text in texts[:2]:
        repeat(workspace, system=text)
    first, second = wait_learned(workspace, 2)
    sizes = [prompt["artifact"]["size_bytes"] for prompt in (first, second)]
    assert sum(sizes) < 1 << 20 < sum(sizes) * 1.5
    used = ask(workspace, texts[0], "still there?")["cache"]
    unused = next(p["prompt"] for p in (first, second) if p["prompt"] != used)

    repeat(workspace, system=texts[2])
    workspace.logged(f"learned prompt dropped model=m prompt={unused} reason='makes room'")
    wait_until(lambda: unused not in {p["prompt"] for p in learned(workspace)}, "it has gone")
    assert used in {p["prompt"] for p in wait_learned(workspace, 2)}
    assert len(list((workspace.root / "state/learned").glob("**/*.md"))) == 2
    wait_until(lambda: workspace.status()["cache"]["retired"] == 0, "it is not put aside either")

    large = f"Cook 4.\n{RULES * 120}"
    repeat(workspace, system=large)
    wait_until(
        lambda: workspace.log_text().count("learned prompt dropped") == 2, "the large one goes"
    )
    workspace.logged("reason='larger than cache.learn.max_bytes'")
    wait_learned(workspace, 2)
    built = workspace.status()["reconcile"]["builds"]
    repeat(workspace, 5, system=large)
    workspace.hang_up()
    assert workspace.status()["reconcile"]["builds"] == built
    assert {p["prompt"] for p in wait_learned(workspace, 2)} > {used}


def test_declared_prompts_are_built_first(learner: Workspace) -> None:
    """However often the learned one is asked for."""
    repeat(learner)
    (prompt,) = wait_learned(learner)
    for number in range(3):
        ask(learner, SECRET, f"{number}?")
    learner.write("last.md", "This one is new. " * 20)
    learner.declare(
        "{other: other.md, last: last.md}",
        params="{max_context_len: 2048}",
        top=LEARN,
        model="    chat_template: chatml\n",
    )
    before = len(learner.built())
    learner.hang_up()
    learner.wait_settled()
    wait_until(lambda: len(learner.built()) == before + 3, "all are built anew")
    assert learner.built()[-1] == prompt["prompt"]


@pytest.mark.long
@pytest.mark.model
@needs_root
def test_a_real_model_learns(workspace: Workspace, small_model: Path) -> None:
    """Three requests prefill the text, the fourth has it; another user's prefills all.

    The context has no room for two of these texts at a time.
    """
    workspace.write("other.md", "You are a carpenter. " * 20)
    workspace.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: llamacpp, threads: 1}}\n{LEARN}\nmodels:\n  m:\n"
        f"    path: {small_model}\n    chat_template: chatml\n"
        "    params: {max_context_len: 640, max_new_tokens: 8, temperature: 0}\n"
        "    prompts: {other: other.md}\n",
    )
    workspace.start()
    workspace.wait_state("other", "fresh")
    open_to_all(workspace)
    with as_user(12001):
        for number in range(3):
            workspace.ask("m", f"{number}: tell me of the sea. " * 40, max_tokens=2)
            assert ask(workspace, SECRET, f"{number}?")["cached_tokens"] < 16
    (prompt,) = wait_learned(workspace)

    with as_user(12002):  # the build has left the text in the engine
        messages = [{"role": "system", "content": SECRET}, {"role": "user", "content": "mine?"}]
        report = workspace.ask("m", messages=messages, max_tokens=2)["rkcached"]
        assert (report["state"], report["cached_tokens"]) == ("cold", 0)

    with as_user(12001):
        report = ask(workspace, SECRET, "4?")
    assert (report["cache"], report["state"]) == (prompt["prompt"], "hit")
    assert report["cached_tokens"] >= prompt["artifact"]["tokens"] - 5
    with as_user(12002):
        assert ask(workspace, SECRET, "4?")["cached_tokens"] < 16
