"""A published model with sliding windows, through the daemon: Gemma 3 270M.

Its windows have 512 tokens. One prompt is shorter and one longer; twelve more show that the proof
of a build holds, although a state from memory and one from a file continue at other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from rkcached.worker.engine_state import PROBE_TOKENS
from rkcached.worker.traces import ROUNDING
from tests.architectures.gemma import gemma
from tests.waiting import wait_until

WINDOW_TOKENS = 512
BUILDS_S = 900
COUNTED: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": PROBE_TOKENS}
APART = 2 * ROUNDING
"""Log-probabilities with and without a prompt cache differ by less: 0.14 was seen."""
SENTENCE = "You are the keeper of the lighthouse, and you know the sea, the weather and the boats. "
QUESTIONS = ("Is the light on?", "\n\nWho was here yesterday?", "How high are the waves?")
OTHERS = tuple(f"keeper{number}" for number in range(12))


@pytest.fixture(scope="module")
def model() -> Path:
    return gemma()


@pytest.fixture
def coast(workspace: Workspace, model: Path) -> Iterator[Workspace]:
    """A daemon with a short prompt and a long one."""
    workspace.write("short.md", SENTENCE * 10)
    workspace.write("long.md", SENTENCE * 40)
    declare(workspace, model, ("short", "long"))
    workspace.start()
    workspace.wait_state("short", "fresh", BUILDS_S)
    workspace.wait_state("long", "fresh", BUILDS_S)
    return workspace


def declare(workspace: Workspace, model: Path, prompts: tuple[str, ...]) -> None:
    names = ", ".join(f"{name}: {name}.md" for name in prompts)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 2}\nmodels:\n  m:\n"
        f"    path: {model}\n    chat_template: gemma3\n"
        "    params: {max_context_len: 2048, max_new_tokens: 24, temperature: 0}\n"
        f"    prompts: {{{names}}}\n",
    )


def agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers are the same, but for rounding.

    That is, up to a place where two tokens were almost equally likely: batches of other sizes are
    rounded otherwise, with and without a prompt cache, in every model.
    """
    places = [answer["choices"][0]["logprobs"]["content"] for answer in (one, other)]
    for ours, others in zip(*places, strict=False):
        if ours["token"] != others["token"]:
            return near(ours, others) and near(others, ours)
        if abs(ours["logprob"] - others["logprob"]) > APART:
            return False
    return len(places[0]) == len(places[1])


def near(place: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the other token was about as likely at this place as at its own."""
    likely = {entry["token"]: entry["logprob"] for entry in place["top_logprobs"]}
    return abs(likely.get(other["token"], -99.0) - other["logprob"]) <= APART


@pytest.mark.parametrize("name", ["short", "long"])
def test_a_prompt_of_gemma_is_reused(coast: Workspace, name: str) -> None:
    """By one question after the other and after a restart, with the answers that it gives cold."""
    artifact = coast.prompt(name)["artifact"]
    assert (artifact["tokens"] < WINDOW_TOKENS) == (name == "short")
    assert artifact["verified"] == "exact"

    def check(question: str) -> None:
        cold = coast.ask(f"m/{name}", question, cache=False, **COUNTED)
        warm = coast.ask(f"m/{name}", question, **COUNTED)
        report = warm["rkcached"]
        assert (report["state"], report["reason"]) == ("hit", "")
        assert report["cached_tokens"] >= artifact["tokens"] - 1
        assert cold["rkcached"]["cached_tokens"] == 0
        assert agree(warm, cold), (warm, cold)
        print(f"{name}: {report['cached_tokens']} of {artifact['tokens']} tokens, {question!r}")

    for question in QUESTIONS:
        check(question)
    assert coast.stop() == 0
    coast.start()
    check(QUESTIONS[0])
    assert coast.built() == ["short", "long"]


def test_the_proof_holds_for_prompts_of_any_length(coast: Workspace, model: Path) -> None:
    """Twelve lengths between 40 and 700 tokens: each is proven exactly, at the first try."""
    for number, name in enumerate(OTHERS):
        coast.write(f"{name}.md", SENTENCE * (2 + 3 * number))
    declare(coast, model, ("short", "long", *OTHERS))
    wait_until(
        lambda: all(coast.prompt(name).get("state") == "fresh" for name in OTHERS),
        lambda: str([coast.prompt(name) for name in OTHERS]),
        BUILDS_S,
    )
    assert {coast.prompt(name)["artifact"]["verified"] for name in OTHERS} == {"exact"}
    assert sorted(coast.built()) == sorted(("short", "long", *OTHERS))
