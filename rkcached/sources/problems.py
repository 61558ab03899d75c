"""Problems of the manifest in words: where, what is wrong, and the next thing to do.

Pydantic finds most problems; `explain` turns its errors into this program's words. Rules of our own
raise `wrong`, whose words pass through. `Sections` tells which model is at which place, so that a
message can name the known keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from rkcached.sources.yaml_reader import Steps, show

Sections: TypeAlias = Mapping[
    str, type[BaseModel]
]  # by the way to them, joined by dots; * is a name, "" the top

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE: Final = (
    "a name has 1 to 64 of the characters a-z 0-9 . _ - and starts with a letter or a digit"
)

# A key that people call `variables`.
_VARIABLES: Final = "chat_template_kwargs"

_EXPECTED: Final = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_unicode": "valid Unicode text",
    "bool_type": "true or false",
    "path_type": "a path",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a path or a list of paths",
}


_EXAMPLES: Final = {"version": "1", "path": "model.gguf", "files": "[prompts/name.md]"}
"""Values of keys that must be there."""


_MANUAL: Final = "rkcached-manifest(5) explains `{key}`"


def wrong(message: str, hint: str = "") -> PydanticCustomError:
    return all_wrong([((), message, hint)])


def all_wrong(problems: list[tuple[Steps, str, str]]) -> PydanticCustomError:
    """One pydantic error for several problems, each at its place below the validated field."""
    return PydanticCustomError("rkcached", "see problems", {"problems": problems})


def nearest(word: object, known: Iterable[str]) -> str:
    """The known word that is nearest; all of them where none is near."""
    known = list(known)
    match = difflib.get_close_matches(str(word)[:64].lower(), known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(known)}"


def nearest_of_all(word: object, known: Iterable[str]) -> str:
    """For a closed choice: the nearest word, and all that there are."""
    known = list(known)
    everything = f"known are {', '.join(known)}"
    near = nearest(word, known)
    return near if near == everything else f"{near} {everything}"


def explain(error: ErrorDetails, sections: Sections) -> list[tuple[Steps, str, str]]:
    """Pydantic's error in this program's words: where, what, and the next thing to do."""
    kind, value, steps = error["type"], error["input"], error["loc"]
    if steps[-1:] == ("[key]",):
        steps = steps[:-1]
    key = next((str(step) for step in reversed(steps) if isinstance(step, str)), "manifest")
    place = ".".join("*" if depth in {1, 3} else str(step) for depth, step in enumerate(steps[:-1]))
    section = sections.get(place, sections[""])
    match kind:
        case "rkcached":
            return [
                ((*steps, *below), message, hint)
                for below, message, hint in error["ctx"]["problems"]
            ]
        case "too_short" if value:
            # pydantic counts what is left after the entries that have problems of their own
            return []
        case "too_short" | "missing" if key == "models":
            message, hint = "no models declared", "say under `models:` what to serve"
        case "too_short":
            message, hint = (
                f"{key}: at least one is needed, got {show(value)} without entries",
                "name a file",
            )
        case "missing":
            message, hint = f"missing key {key!r}", f"add `{key}: {_EXAMPLES.get(key, '...')}`"
        case "extra_forbidden" if key == "max_context_len" and place.endswith("prompts.*.params"):
            message, hint = (
                f"max_context_len is set per model, got {show(value)}",
                "move it to the model's params",
            )
        case "extra_forbidden":
            message, hint = f"unknown key {show(key)}", _known_key(key, section)
        case "string_pattern_mismatch":
            near = re.sub(r"[^a-z0-9._-]+", "-", key.lower()).strip("-._")[:64]
            message, hint = (
                f"{show(key)} cannot be a name",
                NAME_RULE + (f"; for example {near!r}" if near else ""),
            )
        case _:
            message, hint = _explain_value(error, key, section.model_fields.get(key))

    return [(steps, message, hint)]


def _known_key(word: str, section: type[BaseModel]) -> str:
    """Suggest a key of the section instead of a word that is none."""
    if word == "variables" and _VARIABLES in section.model_fields:
        return f"write `{_VARIABLES}: ...`"
    return nearest(word, section.model_fields)


def _explain_value(error: ErrorDetails, key: str, field: FieldInfo | None) -> tuple[str, str]:
    kind, got, context = error["type"], show(error["input"]), error.get("ctx", {})
    match kind:
        case "enum" if (
            field and isinstance(field.annotation, type) and issubclass(field.annotation, StrEnum)
        ):
            choices = [str(choice) for choice in field.annotation]
            return f"{key}: unknown value {got}", nearest_of_all(error["input"], choices)
        case "literal_error" if field:
            choices = [str(choice) for choice in get_args(field.annotation)]
            return f"{key}: unknown value {got}", nearest_of_all(error["input"], choices)
        case "too_long" | "string_too_long":
            unit = "characters" if kind == "string_too_long" else "entries"
            allowed = f"at most {context['max_length']} {unit} are allowed"
            return f"{key}: {allowed}, got {len(error['input'])}", "shorten it"
        case "byte_size_unit":
            return (
                f"max_bytes: unknown unit in {got}",
                "the units are KB, MB, GB, TB, KiB, MiB, GiB, TiB",
            )
        case "model_type" if len(error["loc"]) == 4:
            return f"{key}: expected a path or a mapping, got {got}", _prompt_hint(
                key, error["input"]
            )
        case _ if expected := _EXPECTED.get(kind):
            return f"{key}: expected {expected}, got {got}", _type_hint(key, error["input"], field)
        case _ if key == "max_bytes":
            return f"{key}: {got} is out of range", "allowed is 1 MiB to 1 EiB"
        case _ if field and (bounds := _bounds(field)):
            return f"{key}: {got} is out of range", f"allowed is {bounds}"

    return f"{key}: {error['msg']}, got {got}", _MANUAL.format(key=key)


def _prompt_hint(key: str, value: object) -> str:
    """Suggest what to write where something else stands than a prompt's file."""
    if not isinstance(value, list):
        return "name the prompt's file"
    files = ", ".join(item if isinstance(item, str) else "..." for item in value[:3])
    more = ", ..." if len(value) > 3 else ""
    return f"write `{key}: {{files: [{files}{more}]}}`"


def _type_hint(key: str, value: object, field: FieldInfo | None) -> str:
    """Suggest what to write instead of a value of the wrong kind."""
    if field is None:
        return _MANUAL.format(key=key)
    if field.annotation in (bool, bool | None):
        return f"write `{key}: true` or `{key}: false`"
    if key == "models":
        return "write `models: {name: {path: model.gguf}}`"
    if key == "prompts":
        return "write `prompts: {name: prompts/name.md}`"
    if value is None and not field.is_required():
        return "remove the key to get its default"
    if bounds := _bounds(field):
        return f"allowed is {bounds}"
    section = field.annotation
    if not isinstance(section, type) or not issubclass(section, BaseModel):
        return _MANUAL.format(key=key)
    first, choice = next(iter(section.model_fields.items()))
    if isinstance(choice.annotation, type) and issubclass(choice.annotation, StrEnum):
        near = nearest_of_all(value, [str(member) for member in choice.annotation])
        return f"write `{key}: {{{first}: ...}}`; {near}"

    return f"its keys are {', '.join(section.model_fields)}"


def _bounds(field: FieldInfo) -> str:
    limits = {
        name: getattr(item, name)
        for item in field.metadata
        for name in ("ge", "gt", "le")
        if hasattr(item, name)
    }
    match limits:
        case {"ge": low, "le": high}:
            return f"{low}..{high}"
        case {"gt": low, "le": high}:
            return f"more than {low}, at most {high}"

    return ""
