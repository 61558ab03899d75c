"""The first fault of a JSON value that a record refuses: its place, and what is wrong. Pure."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_MAX_COMPARED: Final = 20  # errors of one value; a union has one for each of its alternatives

# JSON's words for what pydantic calls by Python's. The names in braces are of its context.
_WORDS: Final = {
    "model_type": "should be an object",
    "model_attributes_type": "should be an object",
    "dict_type": "should be an object",
    "list_type": "should be an array",
    "string_type": "should be a text",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "greater_than": "should be more than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "too_short": "should have at least {min_length} item, and has {actual_length}",
    "string_too_long": "should have at most {max_length} characters",
    "union_tag_invalid": "the {discriminator} '{tag}' is none of {expected_tags}",
}

_MAX_QUOTED: Final = 300  # characters of the value in an error: enough to find the place


class Fault(NamedTuple):
    kind: str
    """Pydantic's name for it, such as `missing`."""
    place: str | None
    """The way to it, joined by dots; None for the value as a whole."""
    words: str
    """As the end of a sentence about the place."""


def first_fault(value: Any, error: ValidationError) -> Fault:
    """The first fault. Of a union's alternatives, the one that came furthest."""
    problems = error.errors(include_url=False, include_input=False)
    places = []
    for problem in problems[:_MAX_COMPARED]:
        missing = problem["type"] == "missing"
        places.append((_place(value, problem["loc"], missing=missing), problem))

    first = places[0][0]
    same = [pair for pair in places if f"{pair[0]}.".startswith(f"{first}.")]

    def depth(pair: tuple[str, ErrorDetails]) -> tuple[int, bool]:
        place, problem = pair
        return place.count("."), not problem["type"].endswith("_type")

    place, telling = max(same, key=depth)
    kind = telling["type"]
    if kind == "union_tag_not_found":
        tag = telling["ctx"]["discriminator"].strip("'")
        return Fault(kind="missing", place=f"{place}.{tag}".lstrip("."), words="is missing")
    return Fault(kind=kind, place=place or None, words=_shortened(_words(telling)))


def _words(problem: ErrorDetails) -> str:
    if (words := _WORDS.get(problem["type"])) is not None:
        context = {name: str(value).strip() for name, value in problem.get("ctx", {}).items()}
        if "discriminator" in context:
            context["discriminator"] = context["discriminator"].strip("'")
        return words.format_map(context)
    return problem["msg"].removeprefix("Value error, ").removeprefix("Input ")


def _place(value: Any, steps: tuple[str | int, ...], *, missing: bool) -> str:
    """The place in the value; empty for the value itself."""
    path = _path(value, steps, missing=missing)
    return ".".join(_shortened(str(step)) for step in path)


def _path(here: Any, steps: tuple[str | int, ...], *, missing: bool) -> list[str | int]:
    """The steps that lead into the value.

    Between these, pydantic names the alternatives of unions. A key may have the name of one, so
    each step is also tried as such a name, and the reading that leads further counts.
    """
    if not steps:
        return []

    step = steps[0]
    rest = steps[1:]
    without = _path(here, rest, missing=missing)
    if _is_inside(here, step):
        path = [step, *_path(here[step], rest, missing=missing)]
        return path if len(path) > len(without) else without

    if missing and not rest and isinstance(here, dict):
        return [step]
    return without


def _is_inside(here: Any, step: str | int) -> bool:
    if isinstance(here, dict):
        return step in here
    return isinstance(here, list) and isinstance(step, int) and step < len(here)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_QUOTED:
        return text
    return text[:_MAX_QUOTED] + "..."
