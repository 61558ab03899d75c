"""The kinds of values in a manifest: names, paths, patterns, sizes, bounded parameters. Pure."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

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
from rkcached.sources.problems import NAME, nearest_of_all, wrong
from rkcached.sources.yaml_reader import show

RKLLM_ABIS: Final = tuple(abi.name for abi in ABIS)
"""The first version of each binary interface of RKLLM that the binding speaks."""


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
    if value.endswith((".jinja", ".jinja2")):
        return _absolute(value, info)
    message = f"chat_template: {show(value)} is neither a built-in template nor a .jinja file"
    raise wrong(message, nearest_of_all(value, FORMATS))


def _abi(value: str | None) -> str | None:
    if value is None or value in RKLLM_ABIS:
        return value
    raise wrong(
        f"abi: {show(value)} is no known binary interface", f"one of {', '.join(RKLLM_ABIS)}"
    )


def _size(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}(\.\d{1,9})?\s*[A-Za-z]*\s*", value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise wrong(
        f"max_bytes: expected a size, got {show(value)}", "write bytes, or a unit: 2GiB, 500 MB"
    )


_SIZE_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 1 << 20, "maximum": 1 << 60}, {"type": "string"}]
}
_ABI_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "enum": list(RKLLM_ABIS)}, {"type": "null"}]
}
_PATHS_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 64}]
}

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
FilePath = Annotated[Path, BeforeValidator(_path)]
_Pattern = Annotated[str, AfterValidator(_pattern)]
Template = Annotated[str, AfterValidator(_template)]
Abi = Annotated[str | None, AfterValidator(_abi), WithJsonSchema(_ABI_SCHEMA)]
Paths = Annotated[
    tuple[FilePath, ...], BeforeValidator(_listed), WithJsonSchema(_PATHS_SCHEMA | {"minItems": 1})
]
Patterns = Annotated[
    tuple[_Pattern, ...], BeforeValidator(_listed), WithJsonSchema(_PATHS_SCHEMA | {"default": []})
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
