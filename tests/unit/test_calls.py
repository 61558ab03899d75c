# ruff: noqa: RUF001 - tokens of models are spelled with fullwidth bars
"""Every form of tool calls is read as its models write it, however the text is cut."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkcached.messages.call_form import CallForm
from rkcached.messages.call_readers import ToolCall, typed, types_of
from rkcached.messages.calls import TABLE
from rkcached.messages.literals import Literals
from rkcached.messages.marks import tokens_in
from rkcached.messages.reasoning import THINK, Marks, marks_of
from rkcached.messages.reply import Delta, Reply

FORMS = {form.name: form for form in TABLE}
TOOLS = {
    "f": {
        "type": "object",
        "properties": {
            "s": {"type": "string"},
            "n": {"type": "integer"},
            "o": {"type": "object"},
            "b": {"type": "boolean"},
        },
    },
    "g": {},
}
F = ("f", {"s": "é <b>", "n": 7, "o": {"a": [1, True]}})
G = ("g", {})
H = ("f", {"s": "12"})

F_JSON = '{"s": "é <b>", "n": 7, "o": {"a": [1, true]}}'
F_CALL = f'{{"name": "f", "arguments": {F_JSON}}}'
G_CALL = '{"name": "g", "arguments": {}}'
F_PYTHON = "f(s='é <b>', n=7, o={'a': [1, True]})"
F_GLM = (
    "f\n<arg_key>s</arg_key>\n<arg_value>é <b></arg_value>\n<arg_key>n</arg_key>\n"
    '<arg_value>7</arg_value>\n<arg_key>o</arg_key>\n<arg_value>{"a": [1, true]}</arg_value>\n'
)
F_XML = (
    "<function=f>\n<parameter=s>\né <b>\n</parameter>\n<parameter=n>\n7\n</parameter>\n"
    '<parameter=o>\n{"a": [1, true]}\n</parameter>\n</function>'
)


def attributes(prefix: str, invoke: str, parameters: str) -> str:
    return f'<{prefix}{invoke} name="f">\n{parameters}</{prefix}{invoke}>\n'


def parameters(prefix: str, strings: bool = False) -> str:
    lines = ""
    for key, value in (("s", "é <b>"), ("n", "7"), ("o", '{"a": [1, true]}')):
        told = f' string="{str(key == "s").lower()}"' if strings else ""
        lines += f'<{prefix}parameter name="{key}"{told}>{value}</{prefix}parameter>\n'
    return lines


DSML = "｜DSML｜"
F_DSML = attributes(DSML, "invoke", parameters(DSML, strings=True))
M3 = "]<]minimax[>["

EXAMPLES = [
    ("Hermes", f"<tool_call>\n{F_CALL}\n</tool_call>\n<tool_call>{G_CALL}</tool_call>", [F, G]),
    ("Hermes", f"<tool_call>[{F_CALL}, {G_CALL}]</tool_call>", [F, G]),
    ("Hermes", f'<tool_call>{{"id": "1", "function": {F_CALL}}}</tool_call>', [F]),
    ("Qwen3-Coder and", f"<tool_call>\n{F_XML}\n</tool_call>", [F]),
    (
        "Qwen3-Coder and",
        (
            "<tool_call>\n<function=g>\n</function>\n</tool_call><tool_call><function=f>\n"
            "<parameter=s>\n12\n</parameter>\n</function></tool_call>"
        ),
        [G, H],
    ),
    ("Qwen3-Coder and", f"{F_XML}\n</tool_call>\n<tool_call>{F_XML}</tool_call>", [F, F]),
    ("Qwen3-Coder and", F_XML, [F]),
    ("Qwen3-Coder without", F_XML, [F]),
    ("Seed", f"<seed:tool_call>\n{F_XML}\n</seed:tool_call>", [F]),
    ("Zyphra", f"<zyphra_tool_call>\n{F_XML}\n</zyphra_tool_call>", [F]),
    ("GLM 4.5", f"<tool_call>{F_GLM}</tool_call>\n<tool_call>g</tool_call>", [F, G]),
    (
        "Hunyuan 3 (<arg",
        (
            f"<tool_calls>\n<tool_call>{F_GLM.replace('f', 'f<tool_sep>', 1)}</tool_call>\n"
            "</tool_calls>"
        ),
        [F],
    ),
    (
        "Hunyuan 3 (opens",
        (
            "<tool_calls:opensource><tool_call:opensource>f<tool_sep:opensource>"
            "<arg_key:opensource>s</arg_key:opensource><arg_value:opensource>12"
            "</arg_value:opensource></tool_call:opensource></tool_calls:opensource>"
        ),
        [H],
    ),
    (
        "LongCat 2",
        (
            "<longcat_tool_call>f\n<longcat_arg_key>s</longcat_arg_key>\n"
            "<longcat_arg_value>12</longcat_arg_value>\n</longcat_tool_call>"
        ),
        [H],
    ),
    ("LongCat (JSON", f"<longcat_tool_call>{F_CALL}</longcat_tool_call>", [F]),
    ("Llama 3", F_CALL.replace("arguments", "parameters"), [F]),
    ("Llama 3", f"<|python_tag|>{F_CALL}; {G_CALL}", [F, G]),
    ("a JSON list", f"[{F_CALL}, {G_CALL}]", [F, G]),
    ("Llama 4", f"[{F_PYTHON}, g()]", [F, G]),
    ("Llama 4", f"<|python_start|>[{F_PYTHON}]<|python_end|>", [F]),
    ("Mistral (a", f"[TOOL_CALLS] [{F_CALL}, {G_CALL}]", [F, G]),
    ("Mistral ([", f"[TOOL_CALLS]f[ARGS]{F_JSON}[TOOL_CALLS]g[CALL_ID]1[ARGS]{{}}", [F, G]),
    (
        "DeepSeek V3 and",
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{F_JSON}\n```"
            "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        [F, G],
    ),
    (
        "DeepSeek V3.1",
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{F_JSON}<｜tool▁call▁end｜>"
            "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        [F, G],
    ),
    (
        "DeepSeek V3.2",
        f"<｜DSML｜function_calls>\n{F_DSML}</｜DSML｜function_calls>",
        [F],
    ),
    ("DeepSeek V4", f"<｜DSML｜tool_calls>\n{F_DSML}{F_DSML}</｜DSML｜tool_calls>", [F, F]),
    (
        "Gemma 4",
        (
            '<|tool_call>call:f{n:7,o:{a:[1,true]},s:<|"|>é <b><|"|>}<tool_call|>'
            "<|tool_call>call:g{}<tool_call|>"
        ),
        [F, G],
    ),
    (
        "FunctionGemma",
        (
            "<start_function_call>call:f{n:7,o:{a:[1,true]},s:<escape>é <b><escape>}"
            "<end_function_call>"
        ),
        [F],
    ),
    ("gpt-oss", f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{F_JSON}", [F]),
    ("gpt-oss", f" to=functions.f<|channel|>commentary json<|message|>{F_JSON}<|call|>", [F]),
    (
        "Kimi K2",
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
            f"{F_JSON}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{{}}"
            "<|tool_call_end|><|tool_calls_section_end|>"
        ),
        [F, G],
    ),
    (
        "Kimi K2",
        f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{F_JSON}<|tool_call_end|>",
        [F],
    ),
    (
        "Kimi K3",
        (
            '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
            '<|open|>argument key="s" type="string"<|sep|>12<|close|>argument<|sep|>'
            '<|open|>argument key="n" type="number"<|sep|>7<|close|>argument<|sep|>'
            "<|close|>call<|sep|><|close|>tools<|sep|>"
        ),
        [("f", {"s": "12", "n": 7})],
    ),
    (
        "MiniMax M2",
        f"<minimax:tool_call>\n{attributes('', 'invoke', parameters(''))}</minimax:tool_call>",
        [F],
    ),
    (
        "MiniMax M3",
        (
            f'{M3}<tool_call>\n{M3}<invoke name="f">{M3}<s>é <b>{M3}</s>{M3}<n>7{M3}</n>{M3}<o>'
            f"{M3}<a>{M3}<item>1{M3}</item>{M3}<item>true{M3}</item>{M3}</a>{M3}</o>{M3}</invoke>\n"
            f"{M3}</tool_call>"
        ),
        [F],
    ),
    ("MiniMax M1", f"<tool_calls>\n{F_CALL}\n{G_CALL}\n</tool_calls>", [F, G]),
    ("MiniMax M1", f"<tool_calls><tool_call>{F_CALL}</tool_call></tool_calls>", [F]),
    (
        "Hunyuan (name",
        f"<tool_calls><tool_call>f\n```json\n{F_JSON}\n```</tool_call></tool_calls>",
        [F],
    ),
    ("Nemotron 2", f"<TOOLCALL>[{F_CALL}, {G_CALL}]</TOOLCALL>", [F, G]),
    ("Nemotron Mini", f"<toolcall> {F_CALL} </toolcall>", [F]),
    (
        "Command R7B",
        (
            f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "f", "parameters": {F_JSON}}}]'
            "<|END_ACTION|>"
        ),
        [F],
    ),
    ("Apertus", f'<|tools_prefix|>[{{"f": {F_JSON}}}, {{"g": {{}}}}]<|tools_suffix|>', [F, G]),
    ("Granite 3", f"<|tool_call|>[{F_CALL}]", [F]),
    ("Granite 3", f"<|tool_call|>[{F_CALL}]<|/tool_call|>", [F]),
    ("InternLM", f"<|action_start|><|plugin|>\n{F_CALL}\n<|action_end|>", [F]),
    ("GigaChat 3.1", f"<|function_call|>{F_CALL}", [F]),
    ("GigaChat 3", f"<|message_sep|>\n\nfunction call<|role_sep|>\n{F_CALL}", [F]),
    ("Granite 20B", f"<function_call> {F_CALL}\n<function_call> {G_CALL}", [F, G]),
    ("HyperCLOVA", f" -> tool/function_call\n[{F_CALL}]", [F]),
    ("LFM2", f"<|tool_call_start|>[{F_PYTHON}, g()]<|tool_call_end|>", [F, G]),
    ("LFM2", '<|tool_call_start|>[f(s="a\\"b", from="c")]<|tool_call_end|>', None),
    (
        "MiniCPM 3",
        f"<|tool_call_start|>\n```python\n{F_PYTHON}\ng()\n```\n<|tool_call_end|>",
        [F, G],
    ),
    ("OLMo 3", f"<function_calls>{F_PYTHON}\ng()</function_calls>", [F, G]),
    (
        "MiniCPM 4",
        (
            '<function name="f"><param name="s"><![CDATA[é <b>]]></param><param name="n">7</param>'
            "<param name=\"o\">{'a': [1, True]}</param></function>"
        ),
        [F],
    ),
    ("Functionary 3.1", f"<function=f>{F_JSON}</function><function=g>{{}}</function>", [F, G]),
    ("Functionary 3.2", f"f\n{F_JSON}>>>g\n{{}}", [F, G]),
    ("Functionary 3.2", f"all\nSee:>>>f\n{F_JSON}", [F]),
    ("GLM 4 (", f"f\n{F_JSON}", [F]),
    (
        "Solar",
        (
            f"<|tool_calls|><|tool_call:begin|>ab1<|tool_call:name|>f<|tool_call:args|>{F_JSON}"
            "<|tool_call:end|><|calls|>"
        ),
        [F],
    ),
    (
        "Solar 2",
        (
            "<|tool_call:start|>f\n<|tool_arg:start|>s<|tool_arg:value|>12<|tool_arg:end|>\n"
            "<|tool_call:end|>"
        ),
        [H],
    ),
    (
        "Step 3",
        (
            "<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>"
            f"{attributes('steptml:', 'invoke', parameters('steptml:'))}"
            "<｜tool_call_end｜>\n<｜tool_calls_end｜>"
        ),
        [F],
    ),
    ("Step Audio", f"<|CALL_START|>function\nf\n{F_JSON}<|CALL_END|>", [F]),
    (
        "Muse",
        (
            f"<atem:function_calls>{attributes('atem:', 'invoke', parameters('atem:'))}"
            "</atem:function_calls>"
        ),
        [F],
    ),
]


def form_of(name: str) -> CallForm:
    """The form whose name begins so; `Solar` is not `Solar 2`."""
    return FORMS.get(name) or next(form for form in TABLE if form.name.startswith(name))


def split(
    pieces: list[str], form: CallForm | None, marks: Marks = THINK, *, reasons: bool = False
) -> tuple[str, str, list[ToolCall]]:
    """Content, reasoning, calls."""
    reply = Reply(form=form, tools=TOOLS if form else None, marks=marks, reasons=reasons)
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += reply.feed(piece)
    deltas += reply.end()

    calls = [delta.call for delta in deltas if delta.call is not None]
    return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), calls


def plain(calls: list[ToolCall]) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("name", "text", "calls"), EXAMPLES)
def test_a_form_is_read(name: str, text: str, calls: list[tuple[str, object]] | None) -> None:
    """Whole and letter by letter, with nothing left over."""
    form = form_of(name)
    marks = marks_of(">>>all\n") if "all\n" in text else THINK
    if calls is None:
        calls = [("f", {"s": 'a"b', "from": "c"})]  # a keyword of Python's is no keyword here

    content, reasoning, found = split([text], form, marks)
    assert plain(found) == calls
    assert (content.strip(), reasoning) == ("See:" if "See:" in text else "", "")
    assert split(list(text), form, marks) == (content, reasoning, found)


def test_every_form_has_an_example() -> None:
    assert {form_of(name).name for name, _, _ in EXAMPLES} == set(FORMS)


def test_no_mark_hides_another() -> None:
    """A mark that is the beginning of another one in the same form would be taken for it."""
    for form in TABLE:
        for marks in (form.opened_first(TOOLS), form.closings):
            hidden = [(a, b) for a in marks for b in marks if a != b and b.startswith(a)]
            assert not hidden, form.name


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=20)
@given(data=st.data())
def test_cuts_do_not_matter_and_nothing_is_lost(name: str, data: st.DataObject) -> None:
    """Marks, calls and words in any order, cut anywhere, give what they give in one piece."""
    form = FORMS[name]
    texts = [text for other, text, _ in EXAMPLES if form_of(other) is form]
    parts = [*form.opened_first(TOOLS), *form.closings, *form.bare, *form.inner, *texts]
    parts += ["<think>", "</think>", "\n", " ", "é<", '"', "\\", F_CALL, *"'[]{}(<|"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    reasons = data.draw(st.booleans())
    whole = split([text], form, reasons=reasons)
    assert split(pieces, form, reasons=reasons) == whole
    assert split(list(text), form, reasons=reasons) == whole
    if not reasons and not whole[2] and "think>" not in text:
        assert whole[0].replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize("name", FORMS)
def test_what_is_no_call_is_content(name: str) -> None:
    """Letter by letter, also behind it."""
    form = FORMS[name]
    for opening in (*form.openings, *form.bare):
        for closing in (*form.closings, ""):
            text = f"{opening}no call at all{closing}\n\nmore"
            assert split([text], form) == (text, "", [])


@pytest.mark.parametrize("name", [form.name for form in TABLE if form.must_close])
def test_a_call_that_was_cut_off_is_no_call(name: str) -> None:
    """Its last value may be a part of what the model wanted."""
    form = FORMS[name]
    text = next(text for other, text, _ in EXAMPLES if form_of(other) is form)
    cut = text[text.rindex(form.openings[0]) : text.rindex(form.closings[0])]
    assert split([cut], form) == (cut, "", [])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("Hermes", '<tool_call>{"name": "f", "arguments": {"s": "@"}}</tool_call>', "</tool_call>"),
        ("Qwen3-Coder and", f"<tool_call>{F_XML}</tool_call>", "</tool_call>\n</parameter>"),
        ("GLM 4.5", f"<tool_call>{F_GLM}</tool_call>", "</tool_call>"),
        ("LFM2", "<|tool_call_start|>[f(s='@')]<|tool_call_end|>", "<|tool_call_end|>"),
        ("Gemma 4", '<|tool_call>call:f{s:<|"|>@<|"|>}<tool_call|>', "<tool_call|>"),
    ],
)
def test_a_closing_within_a_value_is_text(name: str, text: str, value: str) -> None:
    text = text.replace("@", value).replace("é <b>", value)
    calls = split(list(text), form_of(name))[2]
    assert [json.loads(call.arguments)["s"] for call in calls] == [value]


REASONED = [
    ("<think>", "<think>\nhm</think>\n\nYes"),
    ("[THINK][/THINK]", "[THINK]hm[/THINK]Yes"),
    ("<seed:think></seed:think>", "<seed:think>hm</seed:think>Yes"),
    ("<|channel>", "<|channel>thought\nhm<channel|>Yes"),
    (
        "<|START_THINKING|><|END_THINKING|>",
        "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>",
    ),
    (
        "<|channel|><|message|>analysis",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes",
    ),
    (
        "Here is my thought process:Here is my response:",
        "Here is my thought process:hm Here is my response:Yes",
    ),
    ("<|think:start|><|think:end|>", "<|think:start|>hm<|think:end|>Yes"),
    ("'<think{}>'.format(':opensource')", "<think:opensource>hm</think:opensource>Yes"),
    (
        "'<|open|>' ~ 'think' ~ '<|sep|>' '<|close|>'",
        "<|open|>think<|sep|>hm<|close|>think<|sep|><|open|>response<|sep|>Yes<|end_of_msg|>",
    ),
    ("<|reasoning|>\\n<|end_reasoning|>", "<|reasoning|>\nhm\n<|end_reasoning|>\nYes"),
    (
        r"<|im_start|>assistant/think\n",
        "/think\nhm<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>",
    ),
    ("<thinking></thinking>", "<thinking>hm</thinking>Yes"),
    ("<thinking></thinking> <think></think>", "<think>hm</think>Yes"),
]


@pytest.mark.parametrize(("source", "text"), REASONED)
def test_reasoning_is_split_off(source: str, text: str) -> None:
    """By the marks that the template's source has."""
    marks = marks_of(source)
    content, reasoning, _ = split([text], None, marks)
    assert (content, reasoning.strip()) == ("Yes", "hm")
    assert split(list(text), None, marks) == (content, reasoning, [])


@pytest.mark.parametrize(("source", "text"), REASONED)
def test_a_prompt_may_end_inside_reasoning(source: str, text: str) -> None:
    marks = marks_of(source)
    opening = marks.openings[0]
    assert marks.begun(f"<user>hi\n{opening}\n")
    assert not marks.begun(f"<user>hi\n{opening}{marks.closings[0]}")
    inside = text.removeprefix(opening)
    content, reasoning, _ = split(list(inside), None, marks, reasons=True)
    assert (content, reasoning.strip()) == ("Yes", "hm")


@pytest.mark.parametrize("name", ["Hermes", "Qwen3-Coder and", "Kimi K2", "DeepSeek V4"])
def test_a_call_may_end_reasoning(name: str) -> None:
    """Without its closing, as some models do; before the closing, it is a thought."""
    form = form_of(name)
    call = next(text for other, text, _ in EXAMPLES if other == name)
    _, reasoning, calls = split(list(f"I look.{call}"), form, reasons=True)
    assert (reasoning, calls) == ("I look.", split([call], form)[2])
    thought = f"I could write {call} but no"
    assert split(list(f"{thought}</think>No."), form, reasons=True) == ("No.", thought, [])
    broken = f"I look.{form.openings[0]} no call"
    assert split(list(broken), form, reasons=True) == ("", broken, [])


@pytest.mark.parametrize("cut", ["\n</parameter>", "</parameter>\n</function>", "7"])
def test_xml_that_was_cut_off_is_no_call(cut: str) -> None:
    text = f"<tool_call>{F_XML[: F_XML.index(cut)]}"
    assert split([text], form_of("Qwen3-Coder and")) == (text, "", [])


def test_gpt_oss_reasons_speaks_and_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
        f"<|message|>{F_JSON}<|call|>"
    )
    marks = marks_of("<|channel|>analysis<|message|>")
    content, reasoning, calls = split(list(text), FORMS["gpt-oss (harmony)"], marks)
    assert (content, reasoning, plain(calls)) == ("Let me see.", "hm", [F])


def test_hyperclova_reasons_and_calls_in_two_turns() -> None:
    call = f"<|im_start|>assistant -> tool/function_call\n[{F_CALL}]<|im_end|>"
    marks = marks_of(r"<|im_start|>assistant/think\n")
    for text in (f"/think\nhm<|im_end|>\n{call}", f"\nhm<|im_end|>\n{call}"):
        content, reasoning, calls = split(list(text), FORMS["HyperCLOVA X"], marks)
        assert (content + reasoning).strip() == "hm"
        assert bool(reasoning) == text.startswith("/think")
        assert plain(calls) == [F]


def test_kimi_gives_the_ids_that_its_template_wants_back() -> None:
    text = next(text for name, text, _ in EXAMPLES if name == "Kimi K2")
    assert [call.id for call in split([text], FORMS["Kimi K2"])[2]] == [
        "functions.f:0",
        "functions.g:1",
    ]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        ("12", {"type": "integer"}, 12),
        ("12", {}, 12),
        ("red", {}, "red"),
        ("True", {"type": "boolean"}, True),
        ("True", {}, "True"),
        ("null", {"type": ["string", "null"]}, None),
        ("12", {"type": ["string", "null"]}, "12"),
        ("12", {"anyOf": [{"type": "string"}, {"type": "number"}]}, 12),
        ("12", {"enum": ["12", "13"]}, "12"),
        ("12", {"$ref": "#/$defs/Text"}, "12"),
        ("{'a': None}", {"type": "object"}, {"a": None}),
        ("{broken", {"type": "object"}, "{broken"),
    ],
)
def test_a_value_has_the_type_of_the_schema(text: str, schema: object, value: object) -> None:
    """Where that says string, the text is the value, whatever it looks like."""
    root = {"properties": {"v": schema}, "$defs": {"Text": {"type": "string"}}}
    assert typed(text, types_of(root, "v")) == value


@pytest.mark.parametrize("schema", [{"$ref": "#/a"}, {"$ref": "#/properties/v"}, {"type": 5}, []])
def test_a_schema_that_tells_no_type_allows_any(schema: object) -> None:
    assert "object" in types_of({"properties": {"v": schema}}, "v")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'a\\'b\\n\\u00e9\\ud83d\\ude00\\q'", "a'b\né😀\\q"),
        ('"""a "b" c"""', 'a "b" c'),
        ("[1, -2.5e3, .5, (True, none),]", [1, -2500.0, 0.5, [True, None]]),
        ("{a: 'b', \"c\": {}}", {"a": "b", "c": {}}),
        ("'two\nlines'", "two\nlines"),
    ],
)
def test_literals(text: str, value: object) -> None:
    literals = Literals(text)
    assert literals.value() == value
    assert literals.at == len(text)


@pytest.mark.parametrize("text", ["", "'a", "{a", "[1 2]", "f(1)", "__import__('os')", "[" * 5000])
def test_what_is_no_literal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Literals(text).value()


def test_marks_are_told_to_the_engine_by_their_tokens() -> None:
    """A mark may be several tokens; what is not one is ignored by the engine."""
    assert tokens_in("<|channel|>final<|message|>", "]<]minimax[>[<tool_call>", "[ARGS]") == (
        "<|channel|>final<|message|>",
        "<|channel|>",
        "<|message|>",
        "]<]minimax[>[<tool_call>",
        "]<]minimax[>[",
        "<tool_call>",
        "[ARGS]",
    )
    assert {"[TOOL_CALLS]", "[ARGS]"} < {*form_of("Mistral ([").shown_tokens}
    assert {"<|channel|>", "<|call|>", "<|message|>"} < {*form_of("gpt-oss").shown_tokens}


LONG = 100_000


@pytest.mark.parametrize("name", ["Hermes", "gpt-oss"])
@pytest.mark.parametrize("word", ["a", "<", " \n", '<tool_call>"', "<tool_call>", "</tool_call>"])
def test_a_long_answer_takes_no_quadratic_time(name: str, word: str) -> None:
    """100,000 characters, one by one: 0.05 to 0.3 s on one x86 core."""
    form = form_of(name)
    text = word * (LONG // len(word))
    begin = time.process_time()
    content, _, calls = split(list(text), form)
    assert time.process_time() - begin < 2.5
    assert (content.replace("\n", ""), calls) == (text.replace("\n", ""), [])


def test_a_long_argument_takes_no_quadratic_time() -> None:
    value = 'a "quoted" word</tool_call>' * (LONG // 27)
    call = json.dumps({"name": "f", "arguments": {"s": value}})
    begin = time.process_time()
    calls = split(list(f"<tool_call>{call}</tool_call>"), form_of("Hermes"))[2]
    assert time.process_time() - begin < 2.5
    assert plain(calls) == [("f", {"s": value})]
