"""A prompt that is named, beside the system messages of the request itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.api.named_prompt import with_prompt
from rkcached.errors import RequestError
from rkcached.messages.message import Message
from rkcached.plan.desired import Desired
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.parser import parse
from rkcached.sources.records import Key

KEY = Key("m", "a")
TEXT = "You are A.\nBe brief."
USER = Message(role="user", content="hello")
OTHER = Message(role="system", content="You are a pirate.")


def system(text: str) -> Message:
    return Message(role="system", content=text)


def snapshot(serving: str = "{}", prompt: str = "{files: a.md}") -> Snapshot:
    text = (
        f"version: 1\nserving: {serving}\nmodels: {{m: {{path: m.gguf, prompts: {{a: {prompt}}}}}}}"
    )
    manifest = parse(text, file=Path("/etc/m.yaml"))
    return Snapshot(manifest=manifest, desired=Desired(models={}, prompts={}, texts={KEY: TEXT}))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [system(TEXT), USER]),
        ([system(""), USER], [system(TEXT), USER]),
        ([system(" \n"), USER], [system(TEXT), USER]),
        ([system(TEXT), USER], [system(TEXT), USER]),
        ([system(f"{TEXT}\n"), USER], [system(TEXT), USER]),
        ([system(TEXT.replace("\n", "\r\n")), USER], [system(TEXT), USER]),
        ([system(f"{TEXT} It is 9."), USER], [system(f"{TEXT} It is 9."), USER]),
    ],
)
@pytest.mark.parametrize("policy", ["refuse", "prompt", "client", "append"])
def test_what_agrees_is_no_conflict(
    policy: str, messages: list[Message], expected: list[Message]
) -> None:
    """Nothing, the same text, also with Windows' line ends, and a text that begins with it."""
    found = with_prompt(snapshot(f"{{system_conflict: {policy}}}"), KEY, messages, "model")

    assert found == (expected, ())


def test_a_conflict_is_refused() -> None:
    """With all that one can do."""
    with pytest.raises(RequestError) as refused:
        with_prompt(snapshot(), KEY, [OTHER, USER], "model")

    assert (refused.value.status, refused.value.code) == (409, "system_message_conflict")
    assert "serving.system_conflict" in refused.value.hint


@pytest.mark.parametrize(
    ("policy", "expected", "ignored"),
    [
        ("prompt", [system(TEXT), USER], ("messages.0", "messages.2")),
        ("client", [OTHER, USER, system("Ahoy.")], ("model",)),
        ("append", [system(f"{TEXT}\n\nYou are a pirate.\n\nAhoy."), USER], ()),
    ],
)
def test_a_conflict_is_settled(
    policy: str, expected: list[Message], ignored: tuple[str, ...]
) -> None:
    """By the manifest; what is left out is named."""
    messages = [OTHER, USER, system("Ahoy.")]

    for_all = with_prompt(snapshot(f"{{system_conflict: {policy}}}"), KEY, messages, "model")
    own = f"{{files: a.md, system_conflict: {policy}}}"
    for_one = with_prompt(snapshot("{system_conflict: refuse}", own), KEY, messages, "model")

    assert for_all == for_one == (expected, ignored)
