"""A context that has no room for all that is asked of it: llama.cpp with a tiny model."""

from __future__ import annotations

import os
from typing import Any

import pytest
from conftest import Workspace
from test_learning import open_to_all
from test_reuse import as_user

from tests import tiny_models

pytestmark = pytest.mark.model

LINE = "The keeper of the lighthouse writes each ship into the book and greets the crew. "
LENGTHS = {"short": 4, "middle": 5, "long": 10}
USERS = (12001, 12002)


@pytest.fixture
def narrow(workspace: Workspace) -> Workspace:
    """A daemon with three fresh prompts. Not all of them fit into the context together."""
    tiny_models.plain(workspace.root / "m.gguf")
    for name, lines in LENGTHS.items():
        workspace.write(f"{name}.md", f"You are the {name} one. {LINE * lines}")
    prompts = ", ".join(f"{name}: {name}.md" for name in LENGTHS)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n    path: m.gguf\n"
        "    params: {max_context_len: 1024, max_new_tokens: 16, temperature: 0}\n"
        f"    prompts: {{{prompts}}}\n",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


def test_prompts_that_do_not_fit_together_are_proven(narrow: Workspace) -> None:
    """Each at its first try, again and again, and after requests: in whatever cells they lie.

    There, numbers differ by rounding. The library is asked for nothing that it would have to refuse
    for lack of room.
    """
    for _ in range(3):
        narrow.cli("regenerate", "m")
        for name in LENGTHS:
            warm = narrow.ask(f"m/{name}", "Is it on?", logprobs=True)
            assert warm["rkcached"]["state"] == "hit"
            cold = narrow.ask(f"m/{name}", "Is it on?", logprobs=True, cache=False)
            first, expected = (
                answer["choices"][0]["logprobs"]["content"][0]["logprob"] for answer in (warm, cold)
            )
            assert first == pytest.approx(expected, abs=0.05)
    log = narrow.log_text()
    assert "build failed" not in log
    assert "worker says" not in log


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_conversations_that_do_not_fit_together_come_back(narrow: Workspace) -> None:
    """Each is saved before the other takes its room, and loaded for its next question."""
    open_to_all(narrow)
    talks: dict[int, list[dict[str, Any]]] = {
        user: [{"role": "user", "content": f"I am {user}. {LINE * 6}"}] for user in USERS
    }
    read = dict.fromkeys(USERS, 0)
    for turn in range(4):
        for user, messages in talks.items():
            with as_user(user):
                answer = narrow.ask("m", messages=messages, max_tokens=12)
            assert answer["rkcached"]["cached_tokens"] >= read[user], (turn, user)
            read[user] = answer["usage"]["prompt_tokens"]
            messages.append(answer["choices"][0]["message"])
            messages.append({"role": "user", "content": "And then, what else?"})
    assert sum(read.values()) > 1024
