"""How much of a request is reused, asked as people's programs ask, on a real model.

The declared prompt is longer than all that the programs add to it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from tests.waiting import BEFORE_RESCAN_S, wait_until

pytestmark = pytest.mark.model

RULES = "".join(
    f"Rule {number}: a guest who asks for dish {number} gets it with salt and a smile.\n"
    for number in range(1, 16)
)
HOUSE = f"You are a ship's cook who answers in one short sentence.\n{RULES}"
DATE = "Today is Friday, 2026-11-27, and it is 14:05."
HELLO = {"role": "user", "content": "What is for dinner?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Say how the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def ship(workspace: Workspace, small_model: Path) -> Workspace:
    """A daemon whose worker has just answered somebody else."""
    workspace.write("house.md", HOUSE)
    workspace.write("other.md", "You are a carpenter. " * 20)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n    chat_template: chatml\n"
        "    params: {max_context_len: 2048, max_new_tokens: 8, temperature: 0}\n"
        "    prompts: {house: house.md, other: other.md}\n",
    )
    workspace.start()
    workspace.wait_state("house", "fresh")
    workspace.wait_state("other", "fresh")
    return workspace


def ask(space: Workspace, system: str, *more: dict[str, Any], **body: Any) -> dict[str, Any]:
    """The report of an answer, after another program's request has taken the worker's state."""
    space.ask("m/other", max_tokens=2)
    messages = [{"role": "system", "content": system}, *more, HELLO]
    report: dict[str, Any] = space.ask("m", messages=messages, max_tokens=4, **body)["rkcached"]
    return report


def tokens_of(space: Workspace) -> int:
    tokens: int = space.prompt("house")["artifact"]["tokens"]
    return tokens


def test_what_programs_add_does_not_cost_the_whole_prompt(ship: Workspace) -> None:
    """All but the last few tokens of the prompt are reused; the answer says where they part."""
    whole = tokens_of(ship)
    assert ask(ship, HOUSE)["state"] == "hit"

    memory = {"role": "system", "content": "The user's name is Ann."}
    for report, place in (
        (ask(ship, f"{HOUSE}\n{DATE}"), "in the system message: a date or a time?"),
        (ask(ship, f"{HOUSE}\nThe user's name is Ann."), "in the system message"),
        (ask(ship, f"{HOUSE} "), ""),
        (ask(ship, HOUSE, memory), ""),
        (
            ask(ship, HOUSE, tools=[TOOL]),
            "after the system message: the request's tools; declare them with the prompt",
        ),
    ):
        assert report["cached_tokens"] >= whole - 8, report
        assert report["cache"] == "house"
        if report["state"] != "hit":
            assert report["state"] == "partial"
            assert report["reason"].startswith("differs from m/house after "), report
            assert place in report["reason"]


@pytest.mark.long
def test_a_line_before_the_rules_costs_what_stands_after_it(ship: Workspace) -> None:
    """Only the same beginning can be reused. The answer says how long it is, and what differs."""
    half = HOUSE.index("Rule 8")
    report = ask(ship, f"{HOUSE[:half]}{DATE}\n{HOUSE[half:]}")
    whole = tokens_of(ship)
    assert whole * 0.3 < report["cached_tokens"] < whole * 0.7
    assert report["state"] == "partial"
    assert report["reason"].endswith("in the system message: a date or a time?")


@pytest.mark.long
def test_a_request_that_shares_nothing_says_so(ship: Workspace) -> None:
    """The template's own beginning is the same in all requests, and is no hit."""
    report = ask(ship, "Somebody else wrote this.")
    assert (report["cache"], report["state"]) == (None, "cold")
    assert report["reason"] == "no prompt begins like this request"
    assert report["cached_tokens"] < 16

    asked = ship.ask("m/house", cache=False)["rkcached"]
    assert (asked["state"], asked["reason"]) == ("cold", "the request asks for no cache")


@pytest.mark.long
def test_a_named_prompt_may_be_continued(ship: Workspace) -> None:
    """A system message that begins with it is no conflict; its line ends may be Windows'."""
    whole = tokens_of(ship)
    for system in (f"{HOUSE}\n{DATE}", f"{HOUSE}\n{DATE}".replace("\n", "\r\n")):
        ship.ask("m/other", max_tokens=2)
        messages = [{"role": "system", "content": system}, HELLO]
        report = ship.ask("m/house", messages=messages, max_tokens=4)["rkcached"]
        assert report["state"] == "partial"
        assert report["cached_tokens"] >= whole - 8

    messages = [{"role": "system", "content": HOUSE[:-20]}, HELLO]
    error = ship.ask("m/house", messages=messages, status=409)["error"]
    assert "does not begin with the prompt m/house" in error["message"]


@pytest.mark.long
def test_a_request_during_the_rebuild_uses_what_did_not_change(ship: Workspace) -> None:
    """One line was appended: the cache of the text before has all but that line."""
    whole = tokens_of(ship)
    ship.ask("m/other", max_tokens=2)
    ship.write("house.md", f"{HOUSE}Rule 16: nobody leaves hungry.\n")
    wait_until(
        lambda: ship.prompt("house")["state"] != "fresh", "the edit was seen", BEFORE_RESCAN_S
    )
    report = ship.ask("m/house", max_tokens=4)["rkcached"]
    assert report["cached_tokens"] >= whole - 8, report
    assert report["state"] in ("building", "stale", "hit")
    ship.wait_state("house", "fresh")


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Connections are opened as this user."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_one_user_does_not_learn_from_reuse_what_another_asked(ship: Workspace) -> None:
    """The same question again: the first user's own state is reused for nobody else."""
    question = "Tell me about the secret recipe with eleven herbs and a spoon of honey."
    messages = [{"role": "system", "content": "My own rules. " * 20}, HELLO]
    secret = [*messages, {"role": "assistant", "content": "Fish."}]
    secret.append({"role": "user", "content": question})
    for place in (ship.socket, *ship.socket.parents):
        if place == Path(tempfile.gettempdir()):
            break
        place.chmod(place.stat().st_mode | 0o077)

    def reused(uid: int, model: str = "m", messages: list[dict[str, Any]] = secret) -> int:
        with as_user(uid):
            report = ship.ask(model, messages=messages, max_tokens=2)["rkcached"]
        tokens: int = report["cached_tokens"]
        return tokens

    assert reused(12001) < 16
    assert reused(12001) > 100
    assert reused(12002) < 16, "what a template writes at the beginning"
    assert reused(12002) > 100

    # What is declared is everybody's, and what was asked of it is not.
    whole = tokens_of(ship)
    asked = [{"role": "user", "content": question}]
    assert reused(12001, "m/house", asked) == whole
    assert reused(12001, "m/house", asked) > whole + 10
    assert reused(12002, "m/house", asked) == whole
