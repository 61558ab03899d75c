"""Conversations that come back after something else took their place in the worker's memory."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, tmpfs
from test_reuse import as_user

from tests.waiting import wait_until

HOUSE = "You are a ship's cook who answers in one short sentence, and you never forget the salt."
TALK = "Tell me of {} and of the harbour, please, and of all the ships that you saw there. "


class Conversation:
    """A client that keeps what was said, as all do."""

    def __init__(self, space: Workspace, about: str, model: str = "m/house") -> None:
        self.space = space
        self.about = about
        self.model = model
        self.messages: list[dict[str, str]] = []

    def turn(self) -> dict[str, Any]:
        """Ask once more; returns the whole answer."""
        question = TALK.format(f"{self.about} {len(self.messages)}") * 2
        self.messages.append({"role": "user", "content": question})
        answer = self.space.ask(self.model, messages=self.messages, max_tokens=16)
        self.messages.append(answer["choices"][0]["message"])
        return answer

    def new_tokens(self) -> int:
        """Ask once more; returns how many tokens of that were prefilled."""
        usage = self.turn()["usage"]
        cached: int = usage["prompt_tokens_details"]["cached_tokens"]
        tokens: int = usage["prompt_tokens"]
        return tokens - cached


@pytest.fixture
def talk(workspace: Workspace) -> Workspace:
    workspace.memory_model()
    workspace.write("house.md", HOUSE)
    workspace.declare("{house: house.md}", params="{max_context_len: 16384}")
    workspace.start()
    workspace.wait_state("house", "fresh")
    return workspace


def saved(space: Workspace) -> int:
    count: int = space.status()["cache"]["conversations"]
    return count


def limit(one: Conversation) -> int:
    """More than a question and what a template writes around it has; less than a turn has."""
    return len(TALK.format(one.about)) * 2 + 80


def test_two_conversations_in_turn_read_only_what_is_new(talk: Workspace) -> None:
    """From the third question on: nobody knows whether a first one is followed by another."""
    ann, bob = Conversation(talk, "Ann"), Conversation(talk, "Bob")
    for _ in range(2):
        ann.turn()
        bob.turn()
    for _ in range(3):
        assert ann.new_tokens() <= limit(ann)
        assert bob.new_tokens() <= limit(bob)
    assert saved(talk) == 2


def test_one_conversation_alone_writes_nothing(talk: Workspace) -> None:
    """Its state is in memory. Single questions are not worth a file, either."""
    ann = Conversation(talk, "Ann")
    ann.turn()
    for _ in range(3):
        assert ann.new_tokens() <= limit(ann)
    assert saved(talk) == 0
    for number in range(3):
        talk.ask("m/house", f"What is number {number}? " * 5)
    assert saved(talk) == 1, "of Ann's, which was replaced"


def test_a_build_takes_nothing_from_a_conversation(talk: Workspace) -> None:
    ann = Conversation(talk, "Ann")
    ann.turn()
    ann.turn()
    talk.write("house2.md", "You are a carpenter, and you like wood. " * 10)
    talk.declare("{house: house.md, other: house2.md}", params="{max_context_len: 16384}")
    talk.wait_state("other", "fresh")
    assert ann.new_tokens() <= limit(ann)


def test_a_restart_takes_nothing_from_a_conversation(talk: Workspace) -> None:
    """What was in memory is saved when the daemon is stopped."""
    ann = Conversation(talk, "Ann")
    ann.turn()
    ann.turn()
    assert talk.stop() == 0
    (record,) = talk.cache.glob(".conversations/m/*.json")
    for path in (record, record.with_suffix(".state")):
        assert path.stat().st_mode & 0o077 == 0
    assert record.parent.stat().st_mode & 0o077 == 0
    talk.start()
    talk.wait_settled()
    assert saved(talk) == 1
    assert ann.new_tokens() <= limit(ann)


@pytest.mark.parametrize("what", ["record", "state", "both"])
def test_a_damaged_file_costs_a_prefill_and_no_answer(talk: Workspace, what: str) -> None:
    """It is told by its digest, and goes."""
    ann = Conversation(talk, "Ann")
    ann.turn()
    ann.turn()
    assert talk.stop() == 0
    (record,) = talk.cache.glob(".conversations/m/*.json")
    state = record.with_suffix(".state")
    if what != "state":
        record.write_bytes(record.read_bytes()[:-9])
    if what != "record":
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    stranger = talk.write("cache/.conversations/m/notes.txt", "mine")
    talk.start()
    talk.wait_settled()
    assert saved(talk) == 0
    assert not state.exists()
    assert stranger.read_text() == "mine"
    right = talk.ask("m/house", messages=[*ann.messages, ASKS], cache=False, max_tokens=16)
    answer = talk.ask("m/house", messages=[*ann.messages, ASKS], max_tokens=16)
    assert answer["choices"] == right["choices"]


ASKS = {"role": "user", "content": "And then?"}


def test_a_file_that_is_swapped_while_the_daemon_runs_is_not_loaded(talk: Workspace) -> None:
    """The answer is right, and the conversation is forgotten."""
    ann, bob = Conversation(talk, "Ann"), Conversation(talk, "Bob")
    for _ in range(2):
        ann.turn()
        bob.turn()
    wait_until(lambda: saved(talk) >= 1, "Ann's conversation was saved")
    (record,) = talk.cache.glob(".conversations/m/*.json")
    assert json.loads(record.read_text())["text"].count("Ann") > 1
    state = record.with_suffix(".state")
    state.write_bytes(state.read_bytes())
    messages = [*ann.messages, ASKS]
    answer = talk.ask("m/house", messages=messages, max_tokens=16)
    right = talk.ask("m/house", messages=messages, cache=False, max_tokens=16)
    assert answer["choices"] == right["choices"]
    assert "the file was replaced" in answer["rkcached"]["reason"]
    talk.logged("saved conversation not loaded")


def test_the_manifest_may_have_none_saved(workspace: Workspace) -> None:
    workspace.memory_model()
    workspace.write("house.md", HOUSE)
    workspace.declare(
        "{house: house.md}",
        params="{max_context_len: 16384}",
        top="cache: {conversations: {keep_s: 0}}",
    )
    workspace.start()
    workspace.wait_state("house", "fresh")
    ann, bob = Conversation(workspace, "Ann"), Conversation(workspace, "Bob")
    for _ in range(3):
        ann.turn()
        bob.turn()
    assert saved(workspace) == 0
    assert list(workspace.cache.rglob("*.state")) == []


def test_the_oldest_make_room(workspace: Workspace) -> None:
    """Four of some 400 kB do not fit into one MiB."""
    workspace.memory_model(context_tokens=131_072)
    workspace.write("house.md", HOUSE)
    workspace.declare(
        "{house: house.md}",
        params="{max_context_len: 131072}",
        top="cache: {conversations: {max_bytes: 1MiB}}",
    )
    workspace.start()
    workspace.wait_state("house", "fresh")
    many = [Conversation(workspace, name * 5_000) for name in ("Ann", "Bob", "Cid", "Dan")]
    for _ in range(2):
        for one in many:
            one.turn()
    workspace.ask("m/house", "Who? " * 30)
    wait_until(lambda: 1 <= saved(workspace) < 4, "some made room")
    assert workspace.status()["cache"]["conversation_bytes"] <= 1 << 20
    assert len(list(workspace.cache.glob(".conversations/m/*.state"))) == saved(workspace)
    assert many[-1].new_tokens() <= limit(many[-1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of 6 MB")
def test_a_disk_that_fills_up_is_left_to_prompt_caches(workspace: Workspace) -> None:
    """Some of four conversations of 400 kB are kept, and a twentieth of the disk stays free."""
    with tmpfs(workspace.cache, "size=6m"):
        workspace.memory_model(context_tokens=131_072)
        workspace.write("house.md", HOUSE)
        workspace.declare("{house: house.md}", params="{max_context_len: 131072}")
        workspace.start()
        workspace.wait_state("house", "fresh")
        free = os.statvfs(workspace.cache)
        workspace.write("cache/of-another", bytes(free.f_bavail * free.f_frsize - (1 << 20)))
        many = [Conversation(workspace, name * 5_000) for name in ("Ann", "Bob", "Cid", "Dan")]
        for _ in range(3):
            for one in many:
                one.turn()
        wait_until(lambda: 1 <= saved(workspace) < 4, "some are kept")

        def has_room() -> bool:
            disk = os.statvfs(workspace.cache)
            return disk.f_bavail >= disk.f_blocks // 20

        wait_until(has_room, "a twentieth of the disk is free")
        assert workspace.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_saved_conversation_is_its_users_alone(talk: Workspace) -> None:
    """Another user who sends the same messages gets nothing of it."""
    for place in (talk.socket, *talk.socket.parents):
        if place == Path(tempfile.gettempdir()):
            break
        place.chmod(place.stat().st_mode | 0o077)
    ann = Conversation(talk, "Ann")
    with as_user(12001):
        ann.turn()
        ann.turn()
    talk.ask("m/house", "Something else? " * 10)
    wait_until(lambda: list(talk.cache.glob(".conversations/m/*.json")), "it was saved")
    tokens = talk.prompt("house")["artifact"]["tokens"]
    messages = [*ann.messages, ASKS]
    with as_user(12002):
        other = talk.ask("m/house", messages=messages, max_tokens=4)["rkcached"]
    assert other["cached_tokens"] == tokens
    with as_user(12002):
        assert saved(talk) == 0
        assert len(talk.status()["recent"]) == 1, "his own answer, and none of hers"
    with as_user(12001):
        assert saved(talk) == 1
        own = talk.ask("m/house", messages=messages, max_tokens=4)["rkcached"]
    assert own["cached_tokens"] > tokens + 300


@pytest.mark.long
@pytest.mark.model
def test_two_conversations_on_a_real_model(workspace: Workspace, small_model: Path) -> None:
    """Two are in memory at a time; a restart brings both back from their files."""
    workspace.write("house.md", HOUSE)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n    chat_template: chatml\n"
        "    params: {max_context_len: 2048, max_new_tokens: 16, temperature: 0}\n"
        "    prompts: {house: house.md}\n",
    )
    workspace.start()
    workspace.wait_state("house", "fresh")
    ann, bob = Conversation(workspace, "Ann"), Conversation(workspace, "Bob")
    for _ in range(2):
        ann.turn()
        bob.turn()
    most = 2 * 30 + 20
    assert ann.new_tokens() <= most
    assert bob.new_tokens() <= most
    assert saved(workspace) == 0
    assert workspace.stop() == 0
    workspace.start()
    workspace.wait_settled()
    assert saved(workspace) == 2
    assert bob.new_tokens() <= most
    assert ann.new_tokens() <= most
