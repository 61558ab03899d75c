"""Conversations that come back as other programs keep them, and the variables of templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

HELLO = {"role": "user", "content": "hello"}

DUMP = "{{ messages | tojson }}{% if add_generation_prompt %}|{% endif %}"

# As Qwen3-Coder's template: it goes through the arguments one by one.
ITEMS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% for c in m.tool_calls or [] %}{% for name, value in c.function.arguments | items %}"
    "{{ name }}={{ value }};{% endfor %}{% endfor %}{% endfor %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
NINE = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}[{{ c.id }}]{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{{ m.content }}{% endfor %}"
)


def daemon(space: Workspace, template: str, script: dict[str, str]) -> Workspace:
    """A daemon whose model answers by what its prompt has in it."""
    space.memory_model(script=script)
    space.write("t.jinja", template)
    space.declare("{}", model="    chat_template: t.jinja\n")
    space.start()
    return space


def said(answer: dict[str, Any]) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def called(arguments: Any, call_id: str = "call_1") -> list[dict[str, Any]]:
    """A conversation with a call and its result."""
    function = {"name": "f", "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": call_id, "content": "4"}
    return [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]


def test_messages_reach_the_template_whole(workspace: Workspace) -> None:
    """Names, ids, arguments as an object or as the text that they are."""
    ids = '"tool_call_id": "call_1"'
    space = daemon(workspace, DUMP, {ids: "id", '"arguments": "{oops"': "text"})

    assert said(space.ask("m", messages=called("{}"))) == "id"
    assert said(space.ask("m", messages=called("{oops"))) == "text"


def test_a_template_that_cannot_show_a_text_as_arguments(workspace: Workspace) -> None:
    """The error names the call; a conversation without it goes on."""
    space = daemon(workspace, ITEMS, {"city=Oslo;": "right"})

    error = space.ask("m", messages=called("{oops"), status=400)["error"]

    assert error["param"] == "messages.1.tool_calls.0.function.arguments"
    assert "the call 'call_1' of 'f'" in error["message"]
    assert said(space.ask("m", messages=called('{"city": "Oslo"}'))) == "right"


def test_a_template_that_fails_for_another_reason(workspace: Workspace) -> None:
    """Then no call is blamed, even if there is one with a text."""
    space = daemon(workspace, ITEMS.replace("m.content", "m.nothing.at.all"), {})

    error = space.ask("m", messages=called("{oops"), status=400)["error"]

    assert error["param"] == "messages"
    assert "call_1" not in error["message"]


@pytest.mark.parametrize(
    ("call_id", "shown"), [("call12345", "call12345"), ("call_0123456789", "123456789")]
)
def test_ids_for_templates_that_want_nine_characters(
    workspace: Workspace, call_id: str, shown: str
) -> None:
    """Also ours, which have more."""
    space = daemon(workspace, NINE, {f"[{shown}]({shown})4": "right"})

    assert said(space.ask("m", messages=called("{}", call_id))) == "right"


def test_a_message_that_is_not_in_turn_is_named(workspace: Workspace) -> None:
    """The template is served as it is; the error has its words and the place."""
    space = daemon(workspace, ALTERNATES, {})

    messages = [{"role": "system", "content": "s"}, HELLO, HELLO]
    error = space.ask("m", messages=messages, status=400)["error"]

    assert "roles must alternate" in error["message"]
    assert "at messages.2 user and assistant stop taking turns" in error["message"]


@pytest.mark.parametrize("system", ["", "You are prompt A.\r\n", "You are prompt A."])
def test_a_system_message_that_says_the_same_as_the_prompt(
    two_prompts: Workspace, system: str
) -> None:
    """Nothing, and other ends of lines, are no conflict."""
    messages = [{"role": "system", "content": system}, HELLO]

    assert two_prompts.ask("m/a", messages=messages)["rkcached"]["state"] == "hit"


# Tools

# As gpt-oss's and Seed-OSS's templates: they want descriptions and parameters.
WANTS_WHOLE_TOOLS = (
    "{% for t in tools or [] %}{{ '//' + t.function.description }} {{ t.function.name }}"
    "({% for name, kind in t.function.parameters.properties | items %}"
    "{{ name + ':' + kind.type }},{% endfor %});{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endfor %}"
)


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (tool(), "// f();"),
        (tool(description="d"), "//d f();"),
        (tool(description=None, parameters={"type": "object"}), "// f();"),
        (tool(parameters={"properties": {"a": {"type": "string"}}}), "// f(a:string,);"),
    ],
)
def test_tools_without_what_a_template_wants(
    workspace: Workspace, sent: dict[str, Any], shown: str
) -> None:
    """OpenAI's clients may leave out the description and the parameters."""
    space = daemon(workspace, WANTS_WHOLE_TOOLS, {shown: "right"})

    assert said(space.ask("m", messages=[HELLO], tools=[sent])) == "right"


def test_other_templates_get_tools_as_they_came(workspace: Workspace) -> None:
    whole = "'//' + t.function.description"
    template = WANTS_WHOLE_TOOLS.replace(whole, "t.function | tojson")
    template = template.replace("t.function.parameters.properties", "{}")
    space = daemon(workspace, template, {'{"name": "f"} f();': "right"})

    assert said(space.ask("m", messages=[HELLO], tools=[tool()])) == "right"


def test_tools_that_a_template_refuses(workspace: Workspace) -> None:
    """The error is about the tools, unless the messages alone are refused, too."""
    template = WANTS_WHOLE_TOOLS + "{% if messages[-1].content == 'x' %}{{ 1 + none }}{% endif %}"
    space = daemon(workspace, template, {})
    bad = tool(parameters={"properties": {"a": {"enum": [1, 2]}}})
    both = [{"role": "user", "content": "x"}]

    error = space.ask("m", messages=[HELLO], tools=[bad], status=400)["error"]
    assert error["param"] == "tools"
    assert "no attribute 'type'" in error["message"]
    error = space.ask("m", messages=both, tools=[tool()], status=400)["error"]
    assert error["param"] == "messages"
    assert "NoneType" in error["message"]


# Variables

SHOWS = (
    "{{ enable_thinking }},{{ reasoning_effort }},{{ date_string }},"
    "{{ documents | tojson }},{{ custom_tools | tojson if custom_tools is defined }}"
)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, ",,,null,"),
        ({"think": False}, "False,,,null,"),
        ({"reasoning_effort": "none"}, "False,none,,null,"),
        ({"think": "high"}, "True,high,,null,"),
        ({"chat_template_kwargs": {"date_string": "1 May"}}, ",,1 May,null,"),
        ({"documents": [{"text": "x"}]}, ',,,[{"text": "x"}],'),
        ({"chat_template_kwargs": {"custom_tools": [1]}}, ",,,null,[1]"),
    ],
)
def test_variables_reach_the_template(
    workspace: Workspace, fields: dict[str, Any], shown: str
) -> None:
    space = daemon(workspace, f"<{SHOWS}>", {f"<{shown}>": "right"})

    assert said(space.ask("m", **fields)) == "right"


def test_variables_are_data(workspace: Workspace) -> None:
    """A control token in one is broken, as in a message."""
    space = daemon(workspace, "<|im_start|>{{ date_string }}", {"<|im_start|>< |im_end|>": "right"})

    kwargs = {"date_string": "<|im_end|>"}
    assert said(space.ask("m", chat_template_kwargs=kwargs)) == "right"
    error = space.ask("m", chat_template_kwargs={"date_string": "\0"}, status=400)["error"]
    assert "NUL" in error["message"]


def test_a_variable_of_a_request_goes_before_the_manifests(workspace: Workspace) -> None:
    workspace.memory_model(script={"True": "on", "False": "off"})
    workspace.write("t.jinja", "{{ enable_thinking }}")
    workspace.declare("{}", model="    chat_template: t.jinja\n    thinking: false\n")
    workspace.start()

    assert said(workspace.ask("m")) == "off"
    assert said(workspace.ask("m", enable_thinking=True)) == "on"


def test_a_variable_that_changes_the_prompt_makes_it_cold(workspace: Workspace) -> None:
    """And the answer says which."""
    template = "{{ '/no_think' if enable_thinking is false }}"
    template += "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    workspace.memory_model()
    workspace.write("t.jinja", template)
    workspace.write("p.md", "You are prompt P.")
    workspace.declare("{p: p.md}", model="    chat_template: t.jinja\n")
    workspace.start()
    workspace.wait_state("p", "fresh")

    assert workspace.ask("m/p", enable_thinking=True)["rkcached"]["state"] == "hit"
    report = workspace.ask("m/p", enable_thinking=False)["rkcached"]
    assert report["state"] == "cold"
    assert (
        "the request's variables (enable_thinking); declare them with the prompt"
        in report["reason"]
    )


# Continued answers

ANSWER = {"role": "assistant", "content": "The sum is"}
CONTINUED = "<|im_start|>assistant\nThe sum is"
CLOSED = "The sum is<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "continued"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "continued"),
        ({"continue_final_message": False}, "closed"),
        ({"add_generation_prompt": True}, "closed"),
        ({"response_format": {"type": "json_object"}}, "closed"),
    ],
)
def test_an_answer_continues_the_last_message(
    workspace: Workspace, fields: dict[str, Any], shown: str
) -> None:
    """The continuation alone is the answer; a new one is asked for by name, or by its form."""
    workspace.memory_model(script={CONTINUED: " 4.", CLOSED: '{"n": 4}'})
    workspace.declare("{}", model="    chat_template: chatml\n")
    workspace.start()

    answer = said(workspace.ask("m", messages=[HELLO, ANSWER], **fields))

    assert answer == {"continued": " 4.", "closed": '{"n": 4}'}[shown]


def test_reasoning_is_continued(workspace: Workspace) -> None:
    """What goes on inside of <think> is reasoning."""
    workspace.memory_model(script={"<think>\nLet me": " see.\n</think>\n\n4"})
    workspace.declare("{}", model="    chat_template: chatml\n")
    workspace.start()

    begun = {"role": "assistant", "content": "<think>\nLet me"}
    message = workspace.ask("m", messages=[HELLO, begun])["choices"][0]["message"]

    assert (message["reasoning_content"].strip(), message["content"]) == ("see.", "4")


def test_an_answer_that_is_bound_cannot_continue_a_message(two_prompts: Workspace) -> None:
    error = two_prompts.ask(
        "m",
        messages=[HELLO, ANSWER],
        continue_final_message=True,
        response_format={"type": "json_object"},
        status=400,
    )["error"]

    assert error["param"] == "continue_final_message"
    assert "response_format" in error["message"]


def test_a_template_that_hides_the_last_message(workspace: Workspace) -> None:
    """Who asked for the continuation is told; who did not gets an answer of its own."""
    space = daemon(workspace, "{{ messages[0].content }}", {"hello": "Good day"})
    messages = [HELLO, ANSWER]

    assert said(space.ask("m", messages=messages)) == "Good day"
    error = space.ask("m", messages=messages, continue_final_message=True, status=400)["error"]
    assert "does not write the last message" in error["message"]


def test_an_empty_answer_is_begun_anew(workspace: Workspace) -> None:
    """There is nothing to continue, and no closed turn with nothing in it."""
    script = {"hello<|im_end|>\n<|im_start|>assistant\n": "once", "assistant\n<|im_end|>": "twice"}
    workspace.memory_model(script=script)
    workspace.declare("{}", model="    chat_template: chatml\n")
    workspace.start()

    empty = {"role": "assistant", "content": None}
    assert said(workspace.ask("m", messages=[HELLO, empty])) == "once"


# A real model

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.mark.long
@pytest.mark.model
def test_the_prompt_cache_serves_with_either_value(workspace: Workspace, small_model: Path) -> None:
    """A variable that changes the text after the prompt alone costs no hit."""
    workspace.write("cook.md", "You are a ship's cook, and you never forget the salt. " * 3)
    workspace.write("t.jinja", THINKS)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n    chat_template: t.jinja\n"
        "    params: {max_context_len: 1024, max_new_tokens: 8, temperature: 0}\n"
        "    prompts: {cook: cook.md}\n",
    )
    workspace.start()
    workspace.wait_state("cook", "fresh")
    tokens = workspace.prompt("cook")["artifact"]["tokens"]

    sent = []
    for fields in ({}, {"think": True}, {"enable_thinking": False}, {"reasoning_effort": "none"}):
        answer = workspace.ask("m/cook", "What is for dinner?", **fields)
        assert answer["rkcached"]["state"] == "hit"
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= tokens
        sent.append(answer["usage"]["prompt_tokens"])

    assert sent[0] == sent[1] < sent[2] == sent[3]

    begun = [{"role": "user", "content": "Dinner?"}, {"role": "assistant", "content": "We have"}]
    continued = workspace.ask("m/cook", messages=begun, continue_final_message=True)
    assert continued["rkcached"]["state"] == "hit"
    assert not said(continued).startswith("We have")
