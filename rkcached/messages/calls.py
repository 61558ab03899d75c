# ruff: noqa: RUF001 - tokens of models are spelled with fullwidth bars
"""The forms in which models write tool calls: a table, and nothing else.

No package that parses them while they stream would do. vllm and sglang need torch, and so does
llm-router-utils, which repackages sglang's parsers; mlx-lm needs mlx; transformers reads whole
answers only; openai-harmony knows one form; agent-tool-parser is some weeks old and knows no
template; llama.cpp has its parser behind its own templates, which xllamacpp does not give.

A form is chosen by proof, not by name: `detection` lets a template write a known call, and takes
the first form here that reads it back. So the order matters where two forms share their marks.
"""

from __future__ import annotations

from typing import Final

from rkcached.messages.call_form import (
    PYTHON_STRINGS,
    STRINGS,
    CallForm,
    attributes_between,
    json_between,
    pairs_between,
    xml_between,
)
from rkcached.messages.call_readers import (
    gemma,
    json_calls,
    named_json,
    nested_tags,
    pythonic,
    tagged,
)

_KIMI_NAME = r"(?P<id>(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>"
_PYTHON_TAG = r"<\|python_(?:tag|start|end)\|>"
_FENCED = r"\s*```json\s*"

TABLE: Final[tuple[CallForm, ...]] = (
    CallForm(
        name="Hermes and Qwen (JSON in <tool_call>)",
        openings=("<tool_call>",),
        closings=("</tool_call>",),
        read=json_calls(),
        values=STRINGS,
        told_by=(("<tool_call>", "args-json"), ("<tool_call>", "<args-dict>")),
    ),
    # These models leave the first mark out now and then.
    xml_between(
        "Qwen3-Coder and Nemotron 3 (XML in <tool_call>)",
        "<tool_call>",
        "<function=",
        closing="</tool_call>",
    ),
    pairs_between("GLM 4.5 (<arg_key> in <tool_call>)", "<tool_call>", "</tool_call>"),
    CallForm(
        name="Llama 3 (JSON with parameters)",
        inner=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
        read=json_calls(between=_PYTHON_TAG),
        bare=("{", "<|python_tag|>", "<|python_start|>"),
        arguments_key="parameters",
    ),
    CallForm(
        name="a JSON list of calls",
        read=json_calls(),
        bare=("{", "["),
    ),
    CallForm(
        name="Llama 4 and Gemma 3 (Python calls)",
        inner=("<|python_start|>", "<|python_end|>"),
        read=pythonic(around=_PYTHON_TAG),
        bare=("[", "<|python_start|>"),
        told_by=(("[func_name1(params_name1",),),
    ),
    # Mistral: a list; then name and arguments, with an id in some versions.
    json_between("Mistral (a list after [TOOL_CALLS])", "[TOOL_CALLS]"),
    CallForm(
        name="Mistral ([TOOL_CALLS]NAME[ARGS])",
        openings=("[TOOL_CALLS]",),
        read=named_json(
            r"(?:\[TOOL_CALLS\])?\s*(?P<name>[\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]",
        ),
        values=STRINGS,
        inner=("[ARGS]", "[CALL_ID]"),
        control=True,
    ),
    CallForm(
        name="DeepSeek V3 and R1",
        openings=("<｜tool▁calls▁begin｜>",),
        closings=("<｜tool▁calls▁end｜>",),
        read=named_json(
            rf"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[\w.-]+){_FENCED}",
            r"\s*```\s*<｜tool▁call▁end｜>",
        ),
        values=STRINGS,
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        control=True,
    ),
    CallForm(
        name="DeepSeek V3.1",
        openings=("<｜tool▁calls▁begin｜>",),
        closings=("<｜tool▁calls▁end｜>",),
        read=named_json(
            r"<｜tool▁call▁begin｜>(?P<name>[\w.-]+)<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
        ),
        values=STRINGS,
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        control=True,
    ),
    attributes_between(
        "DeepSeek V3.2", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "｜DSML｜"
    ),
    attributes_between(
        "DeepSeek V4",
        "<｜DSML｜tool_calls>",
        "</｜DSML｜tool_calls>",
        "｜DSML｜",
    ),
    CallForm(
        name="Gemma 4",
        openings=("<|tool_call>",),
        closings=("<tool_call|>",),
        read=gemma('<|"|>'),
        values=(('<|"|>', '<|"|>'),),
        control=True,
    ),
    CallForm(
        name="FunctionGemma",
        openings=("<start_function_call>",),
        closings=("<end_function_call>",),
        read=gemma("<escape>"),
        values=(("<escape>", "<escape>"),),
        control=True,
    ),
    CallForm(
        name="gpt-oss (harmony)",
        openings=("<|channel|>commentary to=functions.", "<|channel|>analysis to=functions."),
        first=("to=functions.",),
        closings=("<|call|>", "<|end|>"),
        read=named_json(
            r"(?P<name>[\w.-]+)(?:\s*<\|channel\|>\w+)?\s*"
            r"(?:<\|constrain\|>)?\s*\w*\s*<\|message\|>"
        ),
        values=STRINGS,
        inner=("<|message|>", "<|constrain|>"),
        control=True,
    ),
    CallForm(
        name="Kimi K2",
        openings=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        closings=("<|tool_calls_section_end|>",),
        read=named_json(rf"(?:<\|tool_call_begin\|>)?\s*{_KIMI_NAME}", r"\s*<\|tool_call_end\|>"),
        values=STRINGS,
        inner=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        control=True,
        told_by=(("<|im_system|>tool_declare",),),
    ),
    CallForm(
        name="Kimi K3",
        openings=("<|open|>tools<|sep|>",),
        closings=("<|close|>tools<|sep|>",),
        read=tagged(
            r'<\|open\|>call tool="(?P<name>[^"]+)"[^<]*<\|sep\|>',
            r'<\|open\|>argument key="(?P<key>[^"]+)" type="(?P<type>\w+)"<\|sep\|>'
            r"(?P<value>.*?)<\|close\|>argument<\|sep\|>",
            r"<\|close\|>call<\|sep\|>",
        ),
        must_close=True,
        values=(("<|open|>argument ", "<|close|>argument<|sep|>"),),
        inner=("<|open|>", "<|close|>", "<|sep|>"),
        control=True,
    ),
    attributes_between("MiniMax M2", "<minimax:tool_call>", "</minimax:tool_call>", ""),
    CallForm(
        name="MiniMax M3",
        openings=("]<]minimax[>[<tool_call>",),
        closings=("]<]minimax[>[</tool_call>",),
        read=nested_tags("]<]minimax[>["),
        must_close=True,
        control=True,
    ),
    json_between(
        "MiniMax M1, Apriel and Jamba (JSON in <tool_calls>)",
        "<tool_calls>",
        "</tool_calls>",
        read=json_calls(between="</?tool_call>"),
    ),
    CallForm(
        name="Hunyuan (name and JSON in <tool_calls>)",
        openings=("<tool_calls>",),
        closings=("</tool_calls>",),
        read=named_json(rf"<tool_call>(?P<name>[\w.-]+){_FENCED}", r"\s*```\s*</tool_call>"),
        values=STRINGS,
    ),
    pairs_between("Hunyuan 3 (<arg_key> in <tool_calls>)", "<tool_calls>", "</tool_calls>"),
    pairs_between(
        "Hunyuan 3 (opensource)",
        "<tool_calls:opensource>",
        "</tool_calls:opensource>",
        suffix=":opensource",
    ),
    xml_between("Seed-OSS", "<seed:tool_call>", closing="</seed:tool_call>"),
    xml_between("Zyphra", "<zyphra_tool_call>", closing="</zyphra_tool_call>"),
    json_between("Nemotron 2 (JSON in <TOOLCALL>)", "<TOOLCALL>", "</TOOLCALL>"),
    CallForm(
        name="Nemotron Mini",
        openings=("<toolcall>",),
        closings=("</toolcall>",),
        read=json_calls(),
        values=STRINGS,
        told_by=(("<tool> ", "<extra_id_1>"),),
    ),
    json_between("Command R7B and Command A", "<|START_ACTION|>", "<|END_ACTION|>"),
    json_between(
        "Apertus", "<|tools_prefix|>", "<|tools_suffix|>", read=json_calls(name_is_key=True)
    ),
    json_between("LongCat (JSON)", "<longcat_tool_call>", "</longcat_tool_call>"),
    pairs_between("LongCat 2", "<longcat_tool_call>", "</longcat_tool_call>", prefix="longcat_"),
    CallForm(
        name="Granite 3 and Phi-4-mini (JSON after <|tool_call|>)",
        openings=("<|tool_call|>",),
        closings=("<|tool_call_end|>", "<|/tool_call|>"),
        read=json_calls(),
        values=STRINGS,
        control=True,
        told_by=(("<|tool_call|>",),),
    ),
    json_between("InternLM", "<|action_start|><|plugin|>", "<|action_end|>"),
    json_between("GigaChat 3.1", "<|function_call|>", "<|message_sep|>"),
    CallForm(
        name="GigaChat 3",
        openings=("<|message_sep|>\n\nfunction call<|role_sep|>",),
        first=("function call<|role_sep|>",),
        closings=("<|message_sep|>",),
        read=json_calls(),
        values=STRINGS,
        control=True,
    ),
    json_between(
        "Granite 20B (JSON after <function_call>)",
        "<function_call>",
        read=json_calls(between="<function_call>"),
    ),
    CallForm(
        name="HyperCLOVA X",
        first=("-> tool/function_call\n",),
        closings=("<|im_end|>",),
        read=json_calls(),
        values=STRINGS,
    ),
    CallForm(
        name="LFM2 (Python calls)",
        openings=("<|tool_call_start|>",),
        closings=("<|tool_call_end|>",),
        read=pythonic(),
        values=PYTHON_STRINGS,
        control=True,
        told_by=(("<|tool_list_start|>",), ("List of tools: [", "ns.system_prompt")),
    ),
    CallForm(
        name="MiniCPM 3 (Python calls in a block of code)",
        openings=("<|tool_call_start|>",),
        closings=("<|tool_call_end|>",),
        read=pythonic(around="```(?:python)?"),
        values=PYTHON_STRINGS,
        control=True,
    ),
    CallForm(
        name="OLMo 3 (Python calls in <function_calls>)",
        openings=("<function_calls>",),
        closings=("</function_calls>",),
        read=pythonic(),
        values=PYTHON_STRINGS,
    ),
    CallForm(
        name="MiniCPM 4 and 5",
        openings=('<function name="',),
        closings=("</function>",),
        read=tagged(
            r'(?P<name>[^"]+)">',
            r'<param name="(?P<key>[^"]+)">(?:<!\[CDATA\[)?(?P<value>.*?)(?:\]\]>)?</param>'
            r"(?=\s*(?:<param |$))",
            r"\s*$",
        ),
        must_close=True,
        values=(("<param name=", "</param>"),),
    ),
    CallForm(
        name="Functionary 3.1 (JSON in <function=NAME>)",
        openings=("<function=",),
        closings=("</function>",),
        read=named_json(r"(?P<name>[^>\s]+)>\s*"),
        values=STRINGS,
    ),
    xml_between("Qwen3-Coder without <tool_call>", "<function=", closing="</function>"),
    CallForm(
        name="GLM 4 (the name, then JSON)",
        named_first=("{}\n{{",),
        read=named_json(r"(?P<name>[\w.-]+)\n"),
        told_by=(("在调用上述函数时",),),
    ),
    CallForm(
        name="Functionary 3.2",
        named_openings=(">>>{}\n",),
        named_first=("{}\n",),
        read=named_json(r"(?:>>>)?(?P<name>[\w.-]+)\n"),
    ),
    CallForm(
        name="Solar",
        openings=("<|tool_calls|>",),
        closings=("<|calls|>",),
        read=named_json(
            r"<\|tool_call:begin\|>[\w-]*<\|tool_call:name\|>(?P<name>[\w.-]+)<\|tool_call:args\|>",
            r"<\|tool_call:end\|>",
        ),
        values=STRINGS,
        inner=(
            "<|tool_call:begin|>",
            "<|tool_call:name|>",
            "<|tool_call:args|>",
            "<|tool_call:end|>",
        ),
        control=True,
    ),
    CallForm(
        name="Solar 2",
        openings=("<|tool_call:start|>",),
        closings=("<|tool_call:end|>",),
        read=tagged(
            r"\s*(?P<name>[\w.-]+)\s*",
            r"<\|tool_arg:start\|>(?P<key>.*?)<\|tool_arg:value\|>(?P<value>.*?)<\|tool_arg:end\|>",
            r"\s*$",
        ),
        must_close=True,
        values=(("<|tool_arg:value|>", "<|tool_arg:end|>"),),
        inner=("<|tool_arg:start|>", "<|tool_arg:value|>", "<|tool_arg:end|>"),
        control=True,
    ),
    CallForm(
        name="Step 3",
        openings=("<｜tool_calls_begin｜>",),
        closings=("<｜tool_calls_end｜>",),
        read=tagged(
            r"<｜tool_call_begin>?｜>\s*function<｜tool_sep｜>"
            r'<steptml:invoke name="(?P<name>[^"]+)">',
            r'<steptml:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</steptml:parameter>'
            r"(?=\s*</?steptml:)",
            r"</steptml:invoke>\s*<｜tool_call_end｜>",
        ),
        must_close=True,
        values=(("<steptml:parameter name=", "</steptml:parameter>"),),
        inner=("<｜tool_call_begin｜>", "<｜tool_sep｜>", "<｜tool_call_end｜>"),
        control=True,
    ),
    CallForm(
        name="Step Audio",
        openings=("<|CALL_START|>",),
        closings=("<|CALL_END|>",),
        read=named_json(r"\s*function\s*\n(?P<name>[^\n]+)\n"),
        values=STRINGS,
        control=True,
    ),
    attributes_between("Muse", "<atem:function_calls>", "</atem:function_calls>", "atem:"),
)
"""The forms, in the order in which they are tried."""

KNOWN: Final = ", ".join(form.name for form in TABLE)
