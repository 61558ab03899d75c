"""The facts that a model's files state: which tokens are markers, and two templates as one."""

from __future__ import annotations

import pytest

from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.template import ChatTemplate, Message
from rkcached.messages.tokenizer_facts import TokenizerFacts, combined

QUESTION = [Message(role="user", content="Hi")]
TOOL = {"type": "function", "function": {"name": "light"}}


def facts(*added: str) -> TokenizerFacts:
    special = SpecialTokens(control=frozenset({"<|end|>"}), bos="<s>")
    return TokenizerFacts(special=special, added=frozenset(added))


@pytest.mark.parametrize("token", ["[|user|]", "<_user>", "]~b]", "\u2039\u7528\u6237>"])
def test_an_added_token_that_the_template_writes_is_a_control_token(token: str) -> None:
    """EXAONE, TeleChat2, MiniMax and MiniCPM do not all declare the marks of their turns."""
    found = facts(token, "<br>").special_in(f"{token}{{{{ messages[0].content }}}}")
    assert found.control == {"<|end|>", token}
    assert found.always == {token}
    assert found.bos == "<s>"


@pytest.mark.parametrize(
    ("token", "template"),
    [
        ("[|user|]", "{{ '[|' + m.role + '|]' }}"),
        ("[|endofturn|]", "{{ '[|' + m.role + '|]' }}"),
        ("<|user|>", "<|{{ m.role }}|>"),
        ("<_user>", "<_{{ m.role }}>"),
    ],
)
def test_an_added_token_that_the_template_puts_together_is_one(token: str, template: str) -> None:
    """EXAONE's template and ChatGLM's write the role between two signs."""
    found = facts(token, "<br>", "|]x").special_in(template)
    assert found.control == {"<|end|>", token}
    assert found.always == {token}


@pytest.mark.parametrize("token", ["<think>", "</think>", "<tool_call>", "<arg_key>"])
def test_a_tag_inside_a_turn_is_none(token: str) -> None:
    """A prompt may explain it."""
    assert facts(token).special_in(f"{token}").control == {"<|end|>"}


def test_an_added_token_that_the_template_does_not_write_is_none() -> None:
    """Gemma adds runs of blanks and HTML's tags."""
    assert facts("[|user|]").special_in("{{ 1 }}").control == {"<|end|>"}


def test_a_model_that_states_no_tokens_states_none_for_any_template() -> None:
    """Nothing is guessed from what is not there."""
    assert TokenizerFacts(added=frozenset({"[|user|]"})).special_in("[|user|]").control is None


DEFAULTS = [
    "plain {{ messages[0].content }}",
    "\n  a\n",
    "{%- if 1 %} b {% endif -%}",
    "c\n\n",
    "  ",
]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("with_tools", DEFAULTS)
def test_two_templates_as_one(default: str, with_tools: str) -> None:
    """Each renders as if it were alone, to the last blank."""
    both = ChatTemplate(combined(default, with_tools), name="both")
    assert both.render(QUESTION) == ChatTemplate(default, name="a").render(QUESTION)
    assert both.render(QUESTION, [TOOL]) == ChatTemplate(with_tools, name="b").render(
        QUESTION, [TOOL]
    )
