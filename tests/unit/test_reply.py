"""An answer is taken apart the same way, however its pieces are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.messages.call_readers import ToolCall
from rkcached.messages.calls import TABLE
from rkcached.messages.reply import Delta, Reply

TOOLS: dict[str, dict[str, object]] = {"f": {}, "g": {}}
FORMS = {form.name: form for form in TABLE}
HERMES = {"form": FORMS["Hermes and Qwen (JSON in <tool_call>)"], "tools": TOOLS}
LLAMA3 = {"form": FORMS["Llama 3 (JSON with parameters)"], "tools": TOOLS}
F = ToolCall(name="f", arguments='{"a": 1}')
G = ToolCall(name="g", arguments="{}")
F_HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F_LLAMA3 = '{"name": "f", "parameters": {"a": 1}}'


def taken_apart(pieces: list[str], **how: object) -> tuple[str, str, list[ToolCall]]:
    """Content, reasoning, calls."""
    reply = Reply(**how)  # type: ignore[arg-type]
    deltas: list[Delta] = [delta for piece in pieces for delta in reply.feed(piece)] + list(
        reply.end()
    )
    assert all(bool(d.content) + bool(d.reasoning) + (d.call is not None) == 1 for d in deltas)
    calls = [delta.call for delta in deltas if delta.call is not None]
    return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), calls


CASES = [
    ("Hello", {}, ("Hello", "", [])),
    ("  two spaces", {}, ("  two spaces", "", [])),
    (" ", {}, (" ", "", [])),
    ("", {}, ("", "", [])),
    ("1 < 2 <thin", {}, ("1 < 2 <thin", "", [])),
    ("a <think>b</think>", {}, ("a <think>b</think>", "", [])),
    ("<think>\nhm</think>\n\nYes", {}, ("Yes", "hm", [])),
    ("\n<think>hm", {}, ("", "hm", [])),
    ("hm\n</think>\n\nYes", {"reasons": True}, ("Yes", "hm\n", [])),
    ("<think></think>ok", {}, ("ok", "", [])),
    (F_HERMES, HERMES, ("", "", [F])),
    (F_HERMES, {}, (F_HERMES, "", [])),
    ("Let me see." + F_HERMES, HERMES, ("Let me see.", "", [F])),
    (F_HERMES + "\n<tool_call>" + '{"name": "g"}</tool_call>\n', HERMES, ("", "", [F, G])),
    ("<think>x</think>\n" + F_HERMES, HERMES, ("", "x", [F])),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}', HERMES, ("", "", [F])),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', HERMES, ("", "", [F])),
    ("<tool_call>nonsense</tool_call>", HERMES, ("<tool_call>nonsense</tool_call>", "", [])),
    ('<tool_call>["f"]</tool_call>', HERMES, ('<tool_call>["f"]</tool_call>', "", [])),
    ('<tool_call>{"name": "f", "arg', HERMES, ('<tool_call>{"name": "f", "arg', "", [])),
    (F_LLAMA3, LLAMA3, ("", "", [F])),
    ("<|python_tag|>" + F_LLAMA3, LLAMA3, ("", "", [F])),
    (F_LLAMA3 + '; {"name": "g", "parameters": {}}', LLAMA3, ("", "", [F, G])),
    (
        '{"name": "other", "parameters": {}}',
        LLAMA3,
        ('{"name": "other", "parameters": {}}', "", []),
    ),
    ('{"just": "json"}', LLAMA3, ('{"just": "json"}', "", [])),
    ("I call " + F_LLAMA3, LLAMA3, ("I call " + F_LLAMA3, "", [])),
    ('{"name": "f", "arguments": {"a": 1}}', HERMES | {"forced": True}, ("", "", [F])),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
        HERMES,
        ("", "", [ToolCall(name="f", arguments='{"a": "</tool_call>"}')]),
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800é"}}</tool_call>',
        HERMES,
        ("", "", [ToolCall(name="f", arguments='{"a": "\\ud800\\u00e9"}')]),
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', HERMES, (..., "", [])),
    ('<tool_call>{"name": "", "arguments": {}}</tool_call>', HERMES, (..., "", [])),
    ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', HERMES, (..., "", [])),
    ('{"name": "f", "parameters": {"a": ' + "[" * 980 + "]" * 980 + "}}", LLAMA3, (..., "", [])),
    ('{"name": "f", "n": 1}', HERMES | {"forced": True}, ('{"name": "f", "n": 1}', "", [])),
    ('{"name": "f", "argum', HERMES | {"forced": True}, ('{"name": "f", "argum', "", [])),
]


@pytest.mark.parametrize(("text", "how", "expected"), CASES)
def test_reply(
    text: str, how: dict[str, object], expected: tuple[str, str, list[ToolCall]]
) -> None:
    """Whole, and letter by letter. Content of `...` is the text as it came."""
    if expected[0] is ...:
        expected = (text, *expected[1:])
    assert expected == taken_apart([text], **how)
    assert expected == taken_apart(list(text), **how)


@given(
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                '{"name": "f"}',
                "\n",
                " ",
                "a<",
                "é",
            ]
        )
    ),
    st.lists(st.integers(1, 5), min_size=1),
    st.sampled_from([{}, {"reasons": True}, HERMES, LLAMA3, HERMES | {"forced": True}]),
)
def test_cuts_do_not_matter(parts: list[str], widths: list[int], how: dict[str, object]) -> None:
    """Any sequence of tags and text, cut anywhere, gives what it gives in one piece."""
    text = "".join(parts)
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(text[at : at + widths[turn % len(widths)]])
        at, turn = at + widths[turn % len(widths)], turn + 1
    assert taken_apart([text], **how) == taken_apart(pieces, **how)


def test_content_is_not_kept_waiting() -> None:
    """What cannot be a tag's beginning comes out at once."""
    reply = Reply(**HERMES)
    assert [Delta(content="Hello")] == list(reply.feed("Hello"))
    assert [Delta(content=" and ")] == list(reply.feed(" and <too"))
    assert [Delta(content="<tools")] == list(reply.feed("ls"))
