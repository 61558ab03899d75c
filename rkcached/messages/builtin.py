"""The built-in chat templates, by name. Data: `template` renders them, the manifest names them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# Lines that end in a block tag lose their newline (trim_blocks), lines that end in text or a value
# keep it. Tools, calls and results are written as Hermes and Qwen models were trained on them: JSON
# between tags.
_CHATML: Final = """\
{% macro tool_list() %}
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{%- endmacro %}
{% if tools and (not messages or messages[0].role != 'system') %}
<|im_start|>system
{{ tool_list() }}<|im_end|>
{% endif %}
{% for message in messages %}
{% if message.role == 'tool' %}
{% if loop.first or loop.previtem.role != 'tool' %}
<|im_start|>user
{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or loop.nextitem.role != 'tool' %}
<|im_end|>
{% else %}

{% endif %}
{% elif message.role in ['system', 'user', 'assistant'] %}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- if tools and loop.first and message.role == 'system' %}


{{ tool_list() }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{ '\\n' if message.content or not loop.first }}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
<|im_end|>
{% else %}
{{ raise_exception('chatml knows the roles system, user, assistant and tool, not ' ~ message.role) }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}
<think>

</think>

{% endif %}
{% endif %}
"""

# Llama 3.1 and later: the tools stand in the first user message, so a prompt's prefix is the same
# with them.
_LLAMA3: Final = """\
{% set seen = namespace(user=false) %}
{% for message in messages %}
{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{ raise_exception('llama3 knows the roles system, user, assistant and tool, not ' ~ message.role) }}
{% endif %}
<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>

{% if tools and message.role == 'user' and not seen.user %}
Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. \
Do not use variables.

{% for tool in tools %}
{{ tool | tojson(indent=4) }}

{% endfor %}
{% endif %}
{% if message.role == 'user' %}{% set seen.user = true %}{% endif %}
{% if message.tool_calls %}
{{ message.content | trim }}
{%- for call in message.tool_calls %}
{{ '; ' if not loop.first }}{"name": {{ call.function.name | tojson }}, \
"parameters": {{ call.function.arguments | tojson }}}
{%- endfor %}
<|eot_id|>
{%- else %}
{{ message.content | trim }}<|eot_id|>
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""

# Gemma has no system turn: its text opens the first user turn, a blank line apart.
_GEMMA: Final = r"""
{%- set has_system = messages and messages[0].role == 'system' %}
{% set turns = messages[1:] if has_system else messages %}
{% if has_system and not turns %}
{{ raise_exception('gemma puts the system message into the first user message, and there is none') }}
{% endif %}
{% for message in turns %}
{% if message.role not in ['user', 'assistant'] %}
{{ raise_exception('gemma knows one system message at the start, then user and assistant, not ' ~ message.role) }}
{% elif message.role != ('user' if loop.index0 is even else 'assistant') %}
{{ raise_exception('gemma wants user and assistant messages in turns, the user first') }}
{% endif %}
<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}
{{ messages[0].content ~ '\n\n' if has_system and loop.first }}{{ message.content | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

# The distilled R1 models: system text first and bare; the reasoning of earlier answers is not shown
# again.
_DEEPSEEK: Final = """\
{% for message in messages if message.role == 'system' %}
{{- '' if loop.first else '\\n\\n' }}{{ message.content }}
{%- endfor %}
{% for message in messages if message.role != 'system' %}
{% if message.role == 'user' %}<｜User｜>{{ message.content }}
{%- elif message.role == 'assistant' %}<｜Assistant｜>{{ message.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>
{%- else %}{{ raise_exception('deepseek knows the roles system, user and assistant, not ' ~ message.role) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}<｜Assistant｜>{% endif %}
{% if add_generation_prompt and enable_thinking is defined %}
<think>
{% if not enable_thinking %}

</think>

{% endif %}
{% endif %}
"""  # noqa: RUF001  the models' own tokens are spelled with fullwidth bars

_PHI: Final = """\
{% for message in messages %}
{% if message.role not in ['system', 'user', 'assistant'] %}
{{ raise_exception('phi knows the roles system, user and assistant, not ' ~ message.role) }}
{% endif %}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

BUILTIN: Final[Mapping[str, str]] = MappingProxyType(
    {"chatml": _CHATML, "llama3": _LLAMA3, "gemma": _GEMMA, "deepseek": _DEEPSEEK, "phi": _PHI}
)
