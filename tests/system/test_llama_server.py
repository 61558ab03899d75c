"""llama.cpp's own endpoints, as programs ask its server for them."""

from __future__ import annotations

import pytest
from conftest import Workspace


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_settled()
    return workspace


def test_what_a_request_becomes(space: Workspace) -> None:
    """The text that `/apply-template` shows has as many tokens as the answer says it had."""
    asked = {"model": "m/a", "messages": [{"role": "user", "content": "hello"}]}
    prompt = space.request("POST", "/apply-template", json=asked).json()["prompt"]
    assert "You are prompt A." in prompt
    assert prompt.endswith("<|im_start|>assistant\n")
    tokens = space.request("POST", "/tokenize", json={"content": prompt}).json()["tokens"]
    assert len(tokens) == space.ask("m/a")["usage"]["prompt_tokens"]


def test_props(space: Workspace) -> None:
    props = space.request("GET", "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 4096
    assert props["model_alias"] == "m"


def test_a_model_must_be_named_where_there_are_several(space: Workspace) -> None:
    space.declare("{a: a.md}", model="  n: {path: m.model}\n")
    space.hang_up()
    for refused in (
        space.request("GET", "/props"),
        space.request("POST", "/tokenize", json={"content": "hello"}),
    ):
        assert refused.status_code == 400
        assert "models that it could use: m, n" in refused.json()["error"]["message"]
    assert space.request("GET", "/props?model=n").json()["model_alias"] == "n"


@pytest.mark.parametrize(
    ("content", "words"), [("x" * 300_000, "larger than 262,144 bytes"), ("a\0b", "NUL")]
)
def test_a_text_that_would_hold_the_others_up_is_refused(
    space: Workspace, content: str, words: str
) -> None:
    """Nothing interrupts a tokenizer: of 6 MB, one took 11 s, and its worker was ended for it."""
    refused = space.request("POST", "/tokenize", json={"content": content})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "content")
    assert words in error["message"]
