"""Models of every kind of state through the daemon: tiny ones with random weights, on llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Workspace

from rkcached.worker.building import BOUNDARY_TOKENS
from tests import tiny_models
from tests.waiting import BEFORE_RESCAN_S, wait_until

pytestmark = pytest.mark.model

SYSTEM = "You are the keeper of a lighthouse, and then of the boat. " * 6
"""More tokens than the window has."""


@pytest.fixture(params=list(tiny_models.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def coast(workspace: Workspace, kind: str) -> Iterator[Workspace]:
    """A daemon with two fresh prompts."""
    tiny_models.KINDS[kind](workspace.root / "m.gguf")
    workspace.write("keeper.md", SYSTEM)
    workspace.write("pilot.md", SYSTEM.replace("keeper", "pilot"))
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n    path: m.gguf\n"
        "    params: {max_context_len: 1024, max_new_tokens: 16, temperature: 0}\n"
        "    prompts: {keeper: keeper.md, pilot: pilot.md}\n",
    )
    workspace.start()
    workspace.wait_state("keeper", "fresh")
    workspace.wait_state("pilot", "fresh")
    return workspace


def check_hit(space: Workspace, prompt: str, question: str) -> None:
    """The answer is the cold one, and the engine counted the prompt as reused."""
    cold = space.ask(f"m/{prompt}", question, cache=False)
    warm = space.ask(f"m/{prompt}", question)
    report = warm["rkcached"]
    assert (report["state"], report["reason"]) == ("hit", "")
    assert report["cached_tokens"] >= space.prompt(prompt)["artifact"]["tokens"] - BOUNDARY_TOKENS
    assert cold["rkcached"]["cached_tokens"] == 0
    assert warm["choices"][0]["message"] == cold["choices"][0]["message"]


def test_a_prompt_is_built_reused_and_kept(coast: Workspace) -> None:
    """By one question after the other, by turns with another prompt, after an edit, a restart.

    Also by a question whose beginning joins the prompt's last token.
    """
    assert coast.prompt("keeper")["artifact"]["verified"] == "exact"
    check_hit(coast, "keeper", "Is it on?")
    for question in ("Is it on?", "Who was there?", "\n\nAnd then?", "Is it on?"):
        answer = coast.ask("m/keeper", question)
        assert answer["rkcached"]["state"] == "hit", answer["rkcached"]
    for prompt in ("pilot", "keeper", "pilot"):
        assert coast.ask(f"m/{prompt}")["rkcached"]["state"] == "hit"

    coast.write("keeper.md", SYSTEM.replace("boat", "crane"))
    wait_until(lambda: len(coast.built()) == 3, "the edited prompt was built", BEFORE_RESCAN_S)
    coast.wait_settled()
    check_hit(coast, "keeper", "Is it on?")

    assert coast.stop() == 0
    coast.start()
    check_hit(coast, "keeper", "Who was there?")
    assert len(coast.built()) == 3


def test_a_conversation_goes_on_from_its_state(coast: Workspace) -> None:
    """The second turn reads neither the prompt nor the first turn again."""
    first = {"role": "user", "content": "Is it on?"}
    answer = coast.ask("m/keeper", "Is it on?", max_tokens=8)
    text = answer["choices"][0]["message"]["content"]
    said = {"role": "assistant", "content": text}
    turn = {"role": "user", "content": "Who was there?"}
    report = coast.ask("m/keeper", messages=[first, said, turn])["rkcached"]
    assert report["state"] == "hit"
    assert report["cached_tokens"] >= answer["usage"]["prompt_tokens"] - BOUNDARY_TOKENS


def test_what_cannot_be_taken_back_is_said(coast: Workspace, kind: str) -> None:
    """A request that shares half of a prompt is told why it cannot reuse that half."""
    half = SYSTEM[: len(SYSTEM) // 2] + "#### Something else."
    messages = [{"role": "system", "content": half}, {"role": "user", "content": "Is it on?"}]
    report = coast.ask("m", messages=messages)["rkcached"]
    assert report["reason"].startswith("differs from m/keeper after ")
    cannot = "this model's state cannot be taken back to there"
    assert (cannot in report["reason"]) == (kind != "plain")
    if kind != "plain":
        assert report["cached_tokens"] == 0


def test_explain_says_what_the_state_is(coast: Workspace, kind: str) -> None:
    """In words and as data."""
    words = {
        "plain": ("attention", "any beginning that a request shares is reused"),
        "sliding-window": ("sliding window", "some layers see the last 32 tokens only"),
        "recurrent": ("recurrent", "wholly or partly recurrent; it cannot be taken back"),
        "hybrid": ("recurrent", "wholly or partly recurrent; it cannot be taken back"),
    }
    name, sentence = words[kind]
    data: dict[str, Any] = json.loads(coast.cli("explain", "m", "--json").stdout)
    assert data["state"]["kind"] == name
    assert sentence in data["state"]["explanation"]
    shown = data["state"]["explanation"].replace("; ", "\n    ")
    assert f"  state: {shown}\n" in coast.cli("explain", "m").stdout
