"""A template's own rendering of a call decides about the form of its model's answers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.detection import TRIALS_S, AnswerForm, detect
from rkcached.messages.environment import Write, compile_here
from rkcached.messages.reasoning import THINK
from rkcached.messages.template import ChatTemplate

TURNS = """\
{% for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}{% set f = call.function %}CALL{% endfor %}<|end|>
{% endfor %}<|assistant|>
"""
TOOLS = "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"


def answer(call: str, *, before: str = TOOLS) -> AnswerForm:
    """Of a template that writes calls so."""
    return ChatTemplate(before + TURNS.replace("CALL", call), name="t").answer


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("<tool_call>{{ f | tojson }}</tool_call>", "Hermes"),
        (
            (
                "<tool_call><function={{ f.name }}>{% for k, v in f.arguments.items() %}"
                "<parameter={{ k }}>{{ v if v is string else v | tojson }}</parameter>{% endfor %}"
                "</function></tool_call>"
            ),
            "Qwen3-Coder",
        ),
        ('{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}', "Llama 3"),
        ("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}", "Mistral"),
        # As many templates do, it writes what Python prints, and JSON only by chance.
        ("<TOOLCALL>[{'name': '{{ f.name }}', 'arguments': {{ f.arguments }}}]</TOOLCALL>", "Nemo"),
        # It takes the arguments as text: see `adapt`.
        ("{{ '<function=' + f.name + '>' + f.arguments + '</function>' }}", "Functionary 3.1"),
    ],
)
def test_the_form_is_the_one_that_reads_what_is_written(call: str, name: str) -> None:
    found = answer(call)
    assert found.calls is not None
    assert found.calls.name.startswith(name)


def test_built_in_templates() -> None:
    """The calls of each format that shows tools are read; some mark reasoning in their own way."""
    forms = {name: ChatTemplate(source, name=name).answer for name, source in BUILTIN.items()}
    shown: dict[str, set[str]] = {}
    for name, form in forms.items():
        if form.calls:
            shown.setdefault(form.calls.name.partition(" (")[0], set()).add(name)
        else:
            assert form.why == "cannot show tools"

    qwen3 = {"qwen3", "qwen3-instruct-2507", "qwen3-thinking-2507"}
    assert shown == {
        "Hermes and Qwen": {"chatml", "qwen2.5", *qwen3, "smollm3", "exaone4"},
        "Qwen3-Coder and Nemotron 3": {"qwen3.5", "qwen3.5-small", "qwen3.6"},
        "Llama 3": {"llama3", "llama3.1", "llama3.2", "llama3.3"},
        "Gemma 4": {"gemma4", "gemma4-26b"},
        "MiniCPM 3": {"minicpm3"},
        "GLM 4": {"glm4", "glm4-0414"},  # the name, a newline, the arguments as JSON
    }
    others = {name for name, form in forms.items() if form.marks != THINK}
    assert others == {"gemma4", "gemma4-26b", "minicpm3"}


def test_a_form_that_nobody_knows_is_named_as_unknown() -> None:
    """With the forms that are known."""
    found = answer("<<{{ f.name }} WITH {{ f.arguments | tojson }}>>")
    assert found.calls is None
    assert found.why.startswith("shows tools, but writes calls in a form that is not known")
    assert "Hermes" in found.why


def test_a_form_that_loses_something_is_not_it() -> None:
    """A call must come back with all its arguments."""
    found = answer('<tool_call>{"name": "{{ f.name }}", "arguments": {}}</tool_call>')
    assert found.calls is None


def test_who_shows_no_tools_has_no_calls() -> None:
    found = answer("<tool_call>{{ f | tojson }}</tool_call>", before="")
    assert (found.calls, found.why) == (None, "cannot show tools")


def test_a_template_that_cannot_take_tools_says_why() -> None:
    found = answer("", before="{{ raise_exception('no tools here') if tools }}")
    assert found.calls is None
    assert "no tools here" in found.why


def test_a_template_that_drops_calls_is_taken_at_its_word() -> None:
    """LFM2's and Granite 3's show the model a form, and no earlier calls."""
    told = "{% if tools %}<|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}"
    found = answer("", before=told)
    assert found.calls is not None
    assert found.calls.name.startswith("LFM2")


def test_a_template_that_is_out_of_time_is_asked_again() -> None:
    """It is not the same as one without tools."""

    def render(*_: object) -> str:
        raise TemplateExhausted("too slow")

    with pytest.raises(TemplateExhausted):
        detect("", render)


def test_a_slow_template_is_given_up() -> None:
    """The limit holds for all renderings together, also for those that try what it refuses.

    Its marks are found without one.
    """
    rendered = []

    def slow(source: str, name: str) -> Write:
        write = compile_here(source, name)

        def late(variables: Any, messages: Any) -> str:
            rendered.append(messages)
            time.sleep(0.4)  # how slow the template is: no wait for anything
            return write(variables, messages)

        return late

    unknown = TOOLS + TURNS.replace("CALL", "<<{{ f.name }}: {{ f.arguments | tojson }}>>")
    chat = ChatTemplate(unknown, name="t", compile_elsewhere=slow)
    assert chat.marks == THINK
    assert rendered == []

    begun = time.monotonic()
    with pytest.raises(TemplateExhausted, match=r"template t is too slow: 2 s were not enough"):
        _ = chat.answer
    assert time.monotonic() - begun < 2 * TRIALS_S
    assert len(rendered) < 8


def test_a_template_that_writes_much_is_not_read() -> None:
    found = answer("", before="{{ 'x' * 100_000 }}{% if tools %}{{ tools }}{% endif %}")
    assert found.calls is None
    assert "characters for a short conversation" in found.why


def test_calls_are_tried_with_results_too() -> None:
    """Some templates write nothing of a last answer."""
    turns = TURNS.replace("in messages %}", "in messages %}{% set is_last = loop.last %}", 1)
    written = "{% if not is_last %}<tool_call>{{ f | tojson }}</tool_call>{% endif %}"
    found = ChatTemplate(TOOLS + turns.replace("CALL", written), name="t").answer
    assert found.calls is not None


def test_one_call_is_enough_where_two_are_refused() -> None:
    """Llama 3.1's template takes a single call."""
    refuses = "{{ raise_exception('one at a time') if message.tool_calls | length > 1 }}"
    found = answer(refuses + "<tool_call>{{ f | tojson }}</tool_call>")
    assert found.calls is not None


def test_a_template_that_refuses_all_is_no_defect() -> None:
    def render(*_: object) -> str:
        raise TemplateError("no")

    assert detect("", render).why == "cannot show tools: no"
