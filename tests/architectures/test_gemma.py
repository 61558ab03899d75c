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

from rkcached.worker.operations import BOUNDARY_TOKENS
from tests.architectures.gemma import gemma
from tests.waiting import wait_until

WINDOW_TOKENS = 512
BUILDS_S = 900
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


def likeliest(answer: dict[str, Any]) -> list[tuple[str, float]]:
    """The tokens of an answer with their log-probabilities."""
    entries = answer["choices"][0]["logprobs"]["content"]
    return [(entry["token"], entry["logprob"]) for entry in entries]


@pytest.mark.parametrize("name", ["short", "long"])
def test_a_prompt_of_gemma_is_reused(coast: Workspace, name: str) -> None:
    """By one question after the other and after a restart, with the answers that it gives cold."""
    artifact = coast.prompt(name)["artifact"]
    assert (artifact["tokens"] < WINDOW_TOKENS) == (name == "short")
    assert artifact["verified"] == "exact"

    def check(question: str) -> None:
        cold = coast.ask(f"m/{name}", question, cache=False, logprobs=True)
        warm = coast.ask(f"m/{name}", question, logprobs=True)
        report = warm["rkcached"]
        assert (report["state"], report["reason"]) == ("hit", "")
        assert report["cached_tokens"] >= artifact["tokens"] - BOUNDARY_TOKENS
        assert cold["rkcached"]["cached_tokens"] == 0
        for (one, probability), (other, expected) in zip(
            likeliest(warm), likeliest(cold), strict=True
        ):
            assert one == other
            assert probability == pytest.approx(expected, abs=0.1)

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
