"""The Jinja2 sandbox of chat templates, set up as Hugging Face transformers does.

A template is compiled here to a function that writes. Pure: no I/O, no clock; whatever Jinja2
raises leaves as a TemplateError with the line in the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from traceback import walk_tb
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.message import Message

# The variable that becomes `strftime_now`: a date, as a function cannot be sent to another process.
TODAY: Final = "rkcached_today"

Write = Callable[[Mapping[str, Any], Sequence[Message]], str]
"""Renders variables and messages. Errors: TemplateError."""

Compile = Callable[[str, str], Write]
"""Compiles a template, from its source and name. Errors: TemplateError, with the line in the
template, if it does not parse."""


def compile_here(source: str, name: str) -> Write:
    """Compile a template in this process: for those that are trusted to end."""
    try:
        compiled = _compile(source)
    except Exception as error:
        raise _translate(name, error) from error

    def write(variables: Mapping[str, Any], messages: Sequence[Message]) -> str:
        given = dict(variables)
        if today := given.pop(TODAY, None):
            given["strftime_now"] = datetime.fromisoformat(today).strftime

        try:
            return _whole(compiled.render(given, messages=messages))
        except Exception as error:
            raise _translate(name, error) from error

    return write


def _whole(text: str) -> str:
    """The text with each pair of surrogates as one character: sources may write both as escapes.

    Errors: UnicodeError for half a pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    return text


# What Jinja2 says of a name; of what an object lacks it says more.
_NO_VARIABLE: Final = re.compile(r"'\w+' is undefined")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body passes through."""

    tags = {"generation"}  # noqa: RUF012  as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it; Jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


_ENVIRONMENT: Final = _environment()


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


def names_in(source: str) -> frozenset[str]:
    """The names of variables that a template looks at. Errors: TemplateError.

    It is parsed, not compiled: Jinja2 evaluates constant expressions when it compiles, also in
    `jinja2.meta`, and those of strangers may have no end.
    """
    try:
        tree = _ENVIRONMENT.parse(source)
    except Exception as error:
        raise _translate("", error) from error
    return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")


def _translate(name: str, error: Exception) -> TemplateError:
    place = f"template {name}"
    if line := _line(error):
        place += f", line {line}"
    kind = type(error).__name__
    words = str(error) or kind
    text = words.encode(errors="backslashreplace").decode()

    match error:
        case MemoryError():
            return TemplateExhausted(
                f"{place}: it needs more memory than a render may have", hint="correct the line"
            )
        case UnicodeError():
            message = "it writes half a surrogate pair, which is no text"
            hint = "correct its escapes: \\ud83d\\ude00 is a character, \\ud83d alone is none"
        case jinja2.UndefinedError() if "strftime_now" in text:
            message = "it asks for the date by strftime_now, and none is stated"
            hint = "set the model's template_date in the manifest"
        case jinja2.UndefinedError() if _NO_VARIABLE.fullmatch(text):
            message = text
            hint = "set it in the model's chat_template_kwargs, or correct its name there"
        case jinja2.TemplateSyntaxError():
            message = f"syntax error: {text}"
            hint = "chat templates are Jinja2; correct the line"
        case jinja2.exceptions.SecurityError():
            message = f"refused by the sandbox: {text}"
            hint = "a chat template may only read its variables"
        case jinja2.TemplateError():
            message = text
            hint = "change the messages, or choose another chat_template"
        case _:
            message = text
            if text != kind:
                message = f"{kind}: {text}"
            hint = "the template cannot handle these messages; choose another chat_template"

    return TemplateError(f"{place}: {message}", hint=hint)


def _line(error: Exception) -> int:
    """The 1-based line of the template where this happened, or 0.

    Jinja2 puts the template's lines into the traceback.
    """
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno

    last = 0
    for frame, line in walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<template>":
            last = line
    return last
