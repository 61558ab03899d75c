"""Messages for templates that refuse what clients send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.environment import Write, compile_here
from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate

# As Gemma 2's template.
NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
)

# As Mistral Nemo's template.
NINE = (
    "{% for m in messages %}"
    "{% for c in m.tool_calls or [] %}"
    "{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}[{{ c.id }}]{% endfor %}"
    "{% if m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}({{ m.tool_call_id }}){% endif %}"
    "{% endfor %}"
)
ANY_ID = NINE.replace("length != 9", "length == 0")

texts = st.text(st.characters(codec="utf-8"))


def message(role: str, content: str = "", **more: Any) -> Message:
    return Message(role=role, content=content, **more)


def called(call_id: str) -> list[Message]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {}}}
    return [
        message("user", "u"),
        message("assistant", tool_calls=[call]),
        message("tool", "r", tool_call_id=call_id),
    ]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("s:a u:b", "<user>a\n\nb</user>"),
        ("s:a s:b u:c", "<user>a\n\nb\n\nc</user>"),
        ("u:a a:b s:c u:d", "<user>a</user><assistant>b</assistant><user>c\n\nd</user>"),
        ("s:a", "<user>a</user>"),
        ("s:a a:b u:c", "<user>a</user><assistant>b</assistant><user>c</user>"),
        ("u:a a:b s:c", "<user>a</user><assistant>b</assistant><user>c</user>"),
    ],
)
def test_system_messages_open_the_turn_of_the_user(roles: str, expected: str) -> None:
    """Where the template has no turn for them, in the order in which they came."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [message(names[one[0]], one[2:]) for one in roles.split()]

    assert ChatTemplate(NO_SYSTEM, name="t").render(messages) == expected


@given(system=texts, first=texts, second=texts)
def test_prefix_starts_every_request_with_a_folded_prompt(
    system: str, first: str, second: str
) -> None:
    """It ends where the user's text begins, unless trimming takes the blank line before it."""
    chat = ChatTemplate(NO_SYSTEM, name="t")
    messages = [
        message("system", system),
        message("user", "x" + first),
        message("assistant", "b"),
        message("user", second),
    ]

    assert chat.render(messages).startswith(chat.prefix(system))
    if system.strip():  # a blank may break what looks like a control token
        folded = system.rstrip("\r\n").lstrip() + "\n\n"
        assert chat.prefix(system).replace(" ", "").endswith(folded.replace(" ", ""))


def test_a_refusal_that_has_another_cause_stays_as_it_is() -> None:
    """Two messages of the user's in a row are refused with the template's own words."""
    chat = ChatTemplate(NO_SYSTEM, name="t")

    with pytest.raises(TemplateError, match="Conversation roles must alternate"):
        chat.render([message("user", "a"), message("user", "b")])


@pytest.mark.parametrize("name", BUILTIN)
def test_builtins_keep_the_system_message(name: str) -> None:
    """Their own turns and their own words about what they do not know."""
    chat = ChatTemplate(BUILTIN[name], name=name)

    with pytest.raises(TemplateError, match="narrator"):
        chat.render([message("system", "s"), message("user", "u"), message("narrator", "n")])


@pytest.mark.parametrize(
    ("given_id", "expected"),
    [
        ("call12345", "call12345"),
        ("call_0123456789abcdef", "789abcdef"),
        ("chatcmpl-tool-7f3a", "ltool7f3a"),
        ("call_1", "0000call1"),
        ("", "000000000"),
        ("é" * 9, "000000000"),
    ],
)
def test_call_ids_of_nine_characters(given_id: str, expected: str) -> None:
    """A template that wants them gets them, the same in the call and in its result."""
    assert ChatTemplate(NINE, name="t").render(called(given_id)) == f"[{expected}]({expected})"


@pytest.mark.parametrize("given_id", ["call12345", "call_0123456789abcdef", "call_1"])
def test_other_templates_get_the_ids_as_they_came(given_id: str) -> None:
    assert ChatTemplate(ANY_ID, name="t").render(called(given_id)) == f"[{given_id}]({given_id})"


def test_a_template_that_adds_lists_has_a_system_turn() -> None:
    """As those of Ministral 3 and Devstral 2 do: what is tried is what requests have, a list."""
    source = "{% for m in [] + messages + [] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [message("system", "s"), message("user", "u")]

    assert ChatTemplate(source, name="t").render(messages) == "<system>s<user>u"


# As FunctionGemma's template: a result without the name of its function has no place.
NAMED = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if not m.name %}"
    "{{ raise_exception('Invalid tool response mapping') }}{% endif %}{{ m.name }}={{ m.content }};"
    "{% endif %}{% endfor %}"
)


def test_results_have_the_name_of_their_call() -> None:
    """OpenAI's clients send the id alone; a name that was sent stays."""
    messages = called("a")
    messages[2] = message("tool", "1", tool_call_id="a", name="mine")
    messages += called("b")[1:]

    assert ChatTemplate(NAMED, name="t").render(messages) == "mine=1;f=r;"
    with pytest.raises(TemplateError, match="Invalid tool response"):
        ChatTemplate(NAMED, name="t").render([message("tool", "1", tool_call_id="unknown")])


def test_names_are_not_made_up_for_other_templates() -> None:
    """As transformers does: Kimi's template writes the name in the place of the role."""
    source = "{% for m in messages %}<{{ m.name or m.role }}>{% endfor %}"

    assert ChatTemplate(source, name="t").render(called("a")) == "<user><assistant><tool>"


# As gpt-oss's template.
ONE_OF_TWO = (
    "{% for m in messages %}{% if m.tool_calls and m.content and m.thinking %}"
    "{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}"
    "{{ m.thinking or m.content }};{% endfor %}"
)


def test_reasoning_beside_a_text_and_a_call() -> None:
    """The template shows the text; where there is none, the reasoning."""
    (user, call, result) = called("a")
    both = message("assistant", "text", tool_calls=call["tool_calls"], thinking="hm")
    one = message("assistant", "", tool_calls=call["tool_calls"], thinking="hm")
    chat = ChatTemplate(ONE_OF_TWO, name="t")

    assert chat.render([user, both, result, one, result]) == "u;text;r;hm;r;"


def test_templates_are_tried_once() -> None:
    """Not at each request: a template that is not built in costs a turn of another process."""
    tried: list[Any] = []

    def counting(source: str, name: str) -> Write:
        write = compile_here(source, name)

        def counted(variables: Any, messages: Any) -> str:
            tried.append(messages)
            return write(variables, messages)

        return counted

    chat = ChatTemplate(NO_SYSTEM, name="t", compile_elsewhere=counting)
    messages = [message("system", "s"), message("user", "u")]
    chat.render(messages)
    first = len(tried)
    for _ in range(5):
        chat.render(messages)
    chat.render([message("user", "u")])

    assert (first, len(tried)) == (3, 9)


def test_a_template_that_did_not_end_has_shown_nothing() -> None:
    """It is tried again, as it may have been the machine's fault."""
    answers: Iterator[bool] = iter([False, True, True, True])

    def slow(source: str, name: str) -> Write:
        write = compile_here(source, name)

        def late(variables: Any, messages: Any) -> str:
            if not next(answers):
                raise TemplateExhausted("it did not end")
            return write(variables, messages)

        return late

    chat = ChatTemplate(NO_SYSTEM, name="t", compile_elsewhere=slow)
    messages = [message("system", "s"), message("user", "u")]
    with pytest.raises(TemplateExhausted):
        chat.render(messages)

    assert chat.render(messages) == "<user>s\n\nu</user>"
