"""The kinds of values in a manifest: names, paths, patterns, sizes, bounded parameters. Pure."""

from __future__ import annotations

import contextlib
import json
import os
import re
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationInfo,
    WithJsonSchema,
)

from rkcached.engines.rkllm.abi import ABIS
from rkcached.messages.builtin import BUILTIN, FORMATS
from rkcached.sources.problems import NAME, NAME_RULE, nearest_of_all, wrong
from rkcached.sources.trusted_keys import parse_trusted_key
from rkcached.sources.yaml_reader import show

RKLLM_ABIS: Final = tuple(abi.name for abi in ABIS)
"""The first version of each binary interface of RKLLM that the binding speaks."""


TODAY: Final = "today"
"""The value of `template_date` that stands for the day of the look."""

OWN_VARIABLES: Final = frozenset(
    {
        "messages",
        "tools",
        "bos_token",
        "eos_token",
        "add_generation_prompt",
        "strftime_now",
        "raise_exception",
        "rkcached_today",
    }
)
"""The variables of a chat template that are the program's to set."""

MAX_VARIABLES_BYTES: Final = 16 << 10
"""The most bytes of a template's variables, as JSON."""

_KWARGS: Final = "chat_template_kwargs"

MAX_PRELOADED: Final = 64
"""The most prompts of a model whose caches are loaded ahead."""

MAX_TRUSTED_KEYS: Final = 64
"""The most keys whose bundles are trusted."""

MAX_HOSTS: Final = 64
"""The most names of hosts that requests may be for."""

TEMPLATE_SUFFIXES: Final = (".jinja", ".jinja2")
"""The endings of a file that is a template as a whole."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _absolute(path: Path | str, info: ValidationInfo) -> str:
    """Join to the manifest's directory by the letters alone.

    Links are not followed, `~` and variables not expanded.
    """
    text = str(path)
    if re.search("[\0\ud800-\udfff]", text):
        raise wrong(f"{info.field_name}: {show(text)} holds a character that no path can have")
    if text.startswith("~"):
        raise wrong(
            f"{info.field_name}: '~' is not expanded in {show(text)}", "write the absolute path"
        )

    base = (info.context or {}).get("base")
    if not base:
        return text
    return os.path.abspath(os.path.join(base, text))  # noqa: PTH100, PTH118 - resolve() reads links


def _path(value: object, info: ValidationInfo) -> object:
    if value == "":
        raise wrong(f"{info.field_name}: the path is empty", "name a file")
    return Path(_absolute(value, info)) if isinstance(value, str | Path) else value


def _pattern(value: str, info: ValidationInfo) -> str:
    head, _, last = value.rpartition("/")
    if not last or last in {".", ".."}:
        raise wrong(
            f"prompts_from: {show(value)} names a directory",
            "say which files, for example 'prompts/*.md'",
        )

    if re.search(r"[*?\[]", head) or "**" in last:
        hint = "use one '*' for the file name, and one pattern for each directory"
        raise wrong(
            f"prompts_from: wildcards work only in the last part of a path, got {show(value)}", hint
        )

    return _absolute(value, info)


def _template(value: str, info: ValidationInfo) -> str:
    if value in BUILTIN:
        return value
    # A folder is known by its slash: a word without one is a name that was mistyped.
    if value.endswith((*TEMPLATE_SUFFIXES, ".json")) or "/" in value:
        return _absolute(value, info)
    message = f"chat_template: {show(value)} is neither a built-in template nor a .jinja file"
    raise wrong(message, nearest_of_all(value, FORMATS))


def _date(value: object) -> object:
    if value is None or value == TODAY or isinstance(value, date):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        with contextlib.suppress(ValueError):
            return date.fromisoformat(value)
    raise wrong(
        f"template_date: expected a date, got {show(value)}", "write YYYY-MM-DD, or `today`"
    )


def _variables(value: object) -> object:
    """Check a mapping of variables, which may hold any JSON."""
    if not isinstance(value, dict):
        raise wrong(
            f"{_KWARGS}: expected a mapping, got {show(value)}", "write {enable_thinking: false}"
        )

    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,63}", name):
            raise wrong(
                f"{_KWARGS}: {show(name)} cannot be the name of a variable",
                "use letters, digits and _, at most 64, with no digit first",
            )
        if name in OWN_VARIABLES:
            raise wrong(f"{_KWARGS}: {name} cannot be set in a manifest", "remove it")

    try:
        size = len(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise wrong(
            f"{_KWARGS}: it holds what JSON cannot express",
            "a date must be in quotes; .inf and .nan are not possible",
        ) from None
    if size > MAX_VARIABLES_BYTES:
        raise wrong(f"{_KWARGS}: {size:,} bytes are too many, at most {MAX_VARIABLES_BYTES:,}")
    return value


def _abi(value: str | None) -> str | None:
    if value is None or value in RKLLM_ABIS:
        return value
    raise wrong(
        f"abi: {show(value)} is no known binary interface", f"one of {', '.join(RKLLM_ABIS)}"
    )


def _window(value: object) -> object:
    """Check the part of a day: its beginning and its end, which may be on the next day."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(_WINDOW, value):
        raise wrong(
            f"window: expected two times of day, got {show(value)}",
            'write "02:00-05:00", in quotes',
        )

    begin, _, end = value.partition("-")
    if begin == end:
        raise wrong(
            f"window: {value} begins and ends at the same time",
            "leave it out if builds may begin at any time",
        )
    return value


def _preload(value: object) -> object:
    """Check what is loaded ahead: nothing, the model alone, or the model with these prompts."""
    if value is False or value is None:
        return None
    if value is True:
        return ()

    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise wrong(
            f"preload: expected true, a prompt or a list of prompts, got {show(value)}",
            "true loads the model alone",
        )
    if not names:
        raise wrong("preload: the list is empty", "write `preload: true` for the model alone")
    if len(names) > MAX_PRELOADED:
        raise wrong(
            f"preload: at most {MAX_PRELOADED} entries are allowed, got {len(names)}",
            "name those that are asked for most",
        )

    for name in names:
        if not NAME.fullmatch(name):
            raise wrong(f"preload: {show(name)} cannot be the name of a prompt", NAME_RULE)
    return tuple(dict.fromkeys(names))


def _size(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}(\.\d{1,9})?\s*[A-Za-z]*\s*", value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise wrong(
        f"max_bytes: expected a size, got {show(value)}", "write bytes, or a unit: 2GiB, 500 MB"
    )


def _texts(value: object, expected: str, hint: str) -> list[str]:
    """A text or a list of them, as a list. `expected` begins the sentence if it is neither."""
    texts = _listed(value)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong(f"{expected}, got {show(value)}", hint)
    return texts


def _hosts(value: object) -> object:
    names = _texts(
        value,
        "hosts: expected a name or a list of names",
        "write the names by which browsers and proxies call this machine",
    )
    for name in names:
        if not re.fullmatch(_HOST, name):
            raise wrong(
                f"hosts: {show(name)} is not the name of a host",
                "write it without a port and without http://, for example board.example.org",
            )
    return tuple(dict.fromkeys(name.lower() for name in names))


def _origins(value: object) -> object:
    origins = _texts(
        value,
        "cors: expected an origin or a list of origins",
        "write the origins of the pages that may send requests, as https://chat.example.org",
    )
    for origin in origins:
        if origin in ("*", "null"):
            raise wrong(
                f"cors: {show(origin)} would let any page send requests",
                "name each origin, as https://chat.example.org",
            )
        if not re.fullmatch(_ORIGIN, origin):
            raise wrong(
                f"cors: {show(origin)} is not an origin",
                "write scheme, host and port, and no path: https://chat.example.org or "
                "http://localhost:3000",
            )
    return tuple(dict.fromkeys(origin.lower() for origin in origins))


def _trusted_keys(value: object) -> object:
    keys = _texts(
        value,
        "trust: expected a public key or a list of them",
        "write the line that `rkcached bundle-key` printed",
    )
    for key in keys:
        try:
            parse_trusted_key(key)
        except ValueError as error:
            raise wrong(
                f"trust: {show(key)}: {error}",
                "write the line that `rkcached bundle-key` printed, or the second line of "
                "minisign's .pub file; a name may follow it",
            ) from error
    return tuple(dict.fromkeys(keys))


# As browsers write them (RFC 6454); pages of extensions and of programs have schemes of their own.
_ORIGIN = r"[A-Za-z][A-Za-z0-9+.-]{0,63}://[A-Za-z0-9._\[\]:-]{1,255}"
_ORIGIN_SCHEMA = {"type": "string", "pattern": f"^{_ORIGIN}$"}
_ORIGINS_SCHEMA: dict[str, Any] = {
    "anyOf": [_ORIGIN_SCHEMA, {"type": "array", "items": _ORIGIN_SCHEMA, "maxItems": MAX_HOSTS}],
    "default": [],
}
_TRUSTED_KEY_SCHEMA = {"type": "string", "pattern": "^RW[A-Za-z0-9+/]{54}( .*)?$"}
_TRUSTED_KEYS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _TRUSTED_KEY_SCHEMA,
        {"type": "array", "items": _TRUSTED_KEY_SCHEMA, "maxItems": MAX_TRUSTED_KEYS},
    ],
    "default": [],
}
_HOST = r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,7}"
_HOST_SCHEMA = {"type": "string", "pattern": f"^{_HOST}$"}
_HOSTS_SCHEMA: dict[str, Any] = {
    "anyOf": [_HOST_SCHEMA, {"type": "array", "items": _HOST_SCHEMA, "maxItems": MAX_HOSTS}],
    "default": [],
}
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d"
_WINDOW = f"{_CLOCK}-{_CLOCK}"
_WINDOW_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "pattern": f"^{_WINDOW}$"}, {"type": "null"}]
}
_PRELOAD_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "boolean"},
        {"type": "string", "pattern": f"^{NAME.pattern}$"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PRELOADED},
    ]
}
_SIZE_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 1 << 20, "maximum": 1 << 60}, {"type": "string"}]
}
_ABI_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "enum": list(RKLLM_ABIS)}, {"type": "null"}]
}
_DATE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": rf"^(?:{TODAY}|\d{{4}}-\d\d-\d\d)$"},
        {"type": "null"},
    ]
}
_PATHS_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 64}]
}

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
FilePath = Annotated[Path, BeforeValidator(_path)]
_Pattern = Annotated[str, AfterValidator(_pattern)]
Template = Annotated[str, AfterValidator(_template)]
TemplateDate = Annotated[
    date | Literal["today"] | None, BeforeValidator(_date), WithJsonSchema(_DATE_SCHEMA)
]
TemplateVariables = Annotated[
    dict[str, Any], BeforeValidator(_variables), WithJsonSchema({"type": "object"})
]
Window = Annotated[str | None, BeforeValidator(_window), WithJsonSchema(_WINDOW_SCHEMA)]
Preload = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_preload),
    WithJsonSchema(_PRELOAD_SCHEMA),
]
Abi = Annotated[str | None, AfterValidator(_abi), WithJsonSchema(_ABI_SCHEMA)]
Paths = Annotated[
    tuple[FilePath, ...], BeforeValidator(_listed), WithJsonSchema(_PATHS_SCHEMA | {"minItems": 1})
]
Patterns = Annotated[
    tuple[_Pattern, ...], BeforeValidator(_listed), WithJsonSchema(_PATHS_SCHEMA | {"default": []})
]
Hosts = Annotated[
    tuple[str, ...],
    BeforeValidator(_hosts),
    Field(max_length=MAX_HOSTS),
    WithJsonSchema(_HOSTS_SCHEMA),
]
Origins = Annotated[
    tuple[str, ...],
    BeforeValidator(_origins),
    Field(max_length=MAX_HOSTS),
    WithJsonSchema(_ORIGINS_SCHEMA),
]
TrustedKeys = Annotated[
    tuple[str, ...],
    BeforeValidator(_trusted_keys),
    Field(max_length=MAX_TRUSTED_KEYS),
    WithJsonSchema(_TRUSTED_KEYS_SCHEMA),
]
Size = Annotated[
    ByteSize, BeforeValidator(_size), Field(ge=1 << 20, le=1 << 60), WithJsonSchema(_SIZE_SCHEMA)
]

# The bounds of each parameter, written once: a model has defaults, a prompt only what it changes.
number = partial(Field, strict=True, allow_inf_nan=False)
whole = partial(Field, strict=True)
max_new_tokens = partial(whole, ge=1, le=131_072, description="Most tokens an answer may have.")
temperature = partial(
    number, ge=0, le=5, description="Spread of the sampling; 0 always takes the likeliest token."
)
top_k = partial(
    whole, ge=0, le=100_000, description="Sample among this many likeliest tokens; 0 means all."
)
top_p = partial(
    number,
    gt=0,
    le=1,
    description="Sample among the likeliest tokens that sum to this probability.",
)
repeat_penalty = partial(
    number, gt=0, le=10, description="Makes recent tokens less likely; 1 is off."
)
frequency_penalty = partial(
    number, ge=-2, le=2, description="Penalty that grows with each use of a token."
)
presence_penalty = partial(
    number, ge=-2, le=2, description="Penalty for a token that was used at all."
)
