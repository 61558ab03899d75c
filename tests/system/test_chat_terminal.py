"""A conversation at a real terminal: lines, history, commands, and answers that are ended."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator

import pytest
from conftest import Workspace
from terminal import Terminal

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
KEEPER = "You are the keeper of a lighthouse. " * 10
COOK = "You are a ship's cook. " * 10
ANSWERS = {"hello": "Good day to you.", "again": "Once more.", "other": "Soup."}


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    workspace.memory_model(script=ANSWERS)
    workspace.write("keeper.md", KEEPER)
    workspace.write("cook.md", COOK)
    workspace.declare("{keeper: keeper.md, cook: cook.md}")
    workspace.start()
    workspace.wait_settled()
    return workspace


@pytest.fixture
def chat(space: Workspace) -> Iterator[Terminal]:
    """At its first line, with nothing named: a list, of which the prompt `keeper` is chosen."""
    terminal = opened(space)
    try:
        terminal.wait_shown("m/keeper", "model or number:")
        terminal.type("m/keeper\r")
        terminal.wait_shown("m/keeper. /help lists commands")
        yield terminal
    finally:
        terminal.close()


def opened(space: Workspace, *arguments: str) -> Terminal:
    home = str(space.root / "home")
    return Terminal(space, "chat", *arguments, shows_output=True, HOME=home, XDG_STATE_HOME="")


def asked(space: Workspace) -> list[dict[str, object]]:
    recent: list[dict[str, object]] = space.request("GET", "/v1/status").json()["recent"]
    return recent


def test_a_transcript(space: Workspace, chat: Terminal) -> None:
    """An answer with its figures, a second one, another prompt, and a file of all of it."""
    chat.type("hello\r")
    chat.wait_shown("Good day to you.", "[hit on keeper: first token after")
    chat.type("/prompt cook\r")
    chat.wait_shown("m/cook answers from now on")
    chat.type("/clear\r")
    chat.wait_shown("the conversation begins anew")
    chat.type("other\r")
    chat.wait_shown("Soup.", "[hit on cook")
    chat.type("/save talk.json\r")
    chat.wait_shown("wrote talk.json")
    chat.type("/save talk.json\r")
    chat.wait_shown("talk.json exists already, and is not overwritten")
    chat.type("/save talk.md\r")
    chat.wait_shown("wrote talk.md")
    chat.type(CTRL_D)
    assert chat.process.wait() == 0

    saved = json.loads((space.root / "talk.json").read_text())
    assert saved == {
        "model": "m/cook",
        "messages": [
            {"role": "user", "content": "other"},
            {"role": "assistant", "content": "Soup.", "model": "m/cook"},
        ],
    }
    assert stat.S_IMODE((space.root / "talk.json").stat().st_mode) == 0o600
    assert (
        space.root / "talk.md"
    ).read_text() == "# m/cook\n\n## user\n\nother\n\n## assistant\n\nSoup.\n"


def test_a_saved_conversation_names_who_answered(space: Workspace, chat: Terminal) -> None:
    """It named the model that was chosen last, though that one had answered nothing."""
    chat.type("hello\r")
    chat.wait_shown("Good day to you.", "[hit on keeper")
    chat.type("/prompt cook\r")
    chat.wait_shown("m/cook answers from now on")
    chat.type("/save one.json\r")
    chat.wait_shown("wrote one.json")
    chat.type("other\r")
    chat.wait_shown("Soup.", "[hit on cook")
    chat.type("/save both.md\r")
    chat.wait_shown("wrote both.md")
    chat.type(CTRL_D)
    assert chat.process.wait() == 0

    one = json.loads((space.root / "one.json").read_text())
    assert (one["model"], one["messages"][1]["model"]) == ("m/keeper", "m/keeper")
    assert space.request("POST", "/v1/chat/completions", json=one).status_code == 200
    both = (space.root / "both.md").read_text()
    assert both.startswith("# m/keeper, m/cook\n")
    assert "## assistant: m/keeper\n\nGood day" in both
    assert "## assistant: m/cook\n\nSoup." in both


def test_lines_have_a_history_that_others_cannot_read(space: Workspace, chat: Terminal) -> None:
    """Also in the next conversation."""
    chat.type("hello\r")
    chat.wait_shown("Good day to you.")
    chat.type("/quit\r")
    assert chat.process.wait() == 0
    history = space.root / "home/.local/state/rkcached/chat_history"
    assert "hello" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    again = opened(space, "m/keeper")
    try:
        again.wait_shown("\n>")
        again.type(f"{UP}{UP}")
        again.wait_shown("> hello")
        again.type("\r")
        again.wait_shown("Good day to you.")
    finally:
        again.close()


def test_commands_and_names_are_completed(chat: Terminal) -> None:
    chat.type("/mo\t")
    chat.wait_shown("> /model")
    chat.type(" m/c\t")
    chat.wait_shown("> /model m/cook")
    chat.type("\r")
    chat.wait_shown("m/cook answers from now on")


def test_mistakes_are_answered_with_a_next_step(chat: Terminal) -> None:
    for line, *words in (
        ("/nothing", "there is no command '/nothing'", "/help lists them"),
        ("/model zzz", "there is no 'zzz'", "m/keeper"),
        ("/save", "no file is named"),
        ("/save /nowhere/talk.md", "cannot be written"),
        ("/help", "/system", "/clear"),
    ):
        chat.type(f"{line}\r")
        chat.wait_shown(*words)
    chat.type("hello\r")
    chat.wait_shown("Good day to you.")


def test_ctrl_c_ends_the_answer_and_not_the_conversation(workspace: Workspace) -> None:
    """What came of it stays in the conversation; the engine is free at once."""
    workspace.memory_model(decode_us_per_token=20_000)
    workspace.declare("{}")
    workspace.start()
    chat = opened(workspace)
    try:
        chat.wait_shown("m. /help lists commands")  # the only one is not asked for
        chat.type("hello\r")
        chat.wait_shown("> hello\n")
        wait_running(workspace, 1)
        chat.type(CTRL_C)
        chat.wait_shown("[ended]")
        wait_running(workspace, 0)
        chat.type("abandoned")
        chat.type(CTRL_C)
        chat.type("/save talk.json\r")
        chat.wait_shown("wrote talk.json")
        chat.type(CTRL_D)
        assert chat.process.wait() == 0
    finally:
        chat.close()
    kept = json.loads((workspace.root / "talk.json").read_text())["messages"]
    assert [message["role"] for message in kept] in ([], ["user", "assistant"])
    assert "abandoned" not in str(kept)


def wait_running(space: Workspace, number: int) -> None:
    from tests.waiting import wait_until

    wait_until(lambda: space.status()["running"] == number, f"{number} answers run")


def test_one_answer_that_is_ended_ends_the_command(workspace: Workspace) -> None:
    workspace.memory_model(decode_us_per_token=20_000)
    workspace.declare("{}")
    workspace.start()
    chat = opened(workspace, "m", "hello")
    try:
        wait_running(workspace, 1)
        chat.type(CTRL_C)
        assert chat.process.wait() == 130
    finally:
        chat.close()
