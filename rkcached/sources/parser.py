"""Parses the text of a manifest: all that can be used of it, and every problem of the rest.

`parse` turns YAML text into a `Manifest`, or raises one ManifestError with every problem, each with
its line and a hint; `parse_usable` leaves out what is wrong. `yaml_reader` reads the text, so that
`verify: off` means what it says; `problems` has the words. Pure: no file is opened, and whether a
path exists is for `reader` to say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from rkcached.errors import ManifestError, Problem
from rkcached.sources.manifest import (
    CacheConfig,
    EngineConfig,
    Manifest,
    ModelConfig,
    ModelParams,
    NpuConfig,
    PromptConfig,
    SamplingParams,
    ServingConfig,
)
from rkcached.sources.problems import Sections, explain
from rkcached.sources.yaml_reader import Steps, YamlReader, nearest_line

_SECTIONS: Final[Sections] = {
    "": Manifest,
    "engine": EngineConfig,
    "cache": CacheConfig,
    "serving": ServingConfig,
    "models.*": ModelConfig,
    "models.*.npu": NpuConfig,
    "models.*.params": ModelParams,
    "models.*.prompts.*": PromptConfig,
    "models.*.prompts.*.params": SamplingParams,
}


def parse(text: str, *, file: Path) -> Manifest:
    """The manifest in `text`; relative paths start at the directory of `file`, which is not opened.

    Raises ManifestError with every problem there is, in file order.
    """
    usable = parse_usable(text, file=file)
    if usable.problems or usable.manifest is None:
        raise ManifestError(usable.problems)
    return usable.manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """The part of a manifest that can be understood, and all problems of the rest in file order."""

    manifest: Manifest | None
    """Without what is wrong. None: nothing is left."""
    problems: tuple[Problem, ...]
    engine_known: bool
    """Nothing under `engine` is wrong, so it is the one that its owner means."""


def parse_usable(text: str, *, file: Path) -> Usable:
    """As `parse`, but a problem does not keep the rest from being looked at.

    A model or a prompt that lacks something is left out as a whole, a wrong value alone. Raises
    ManifestError for text that gives no data at all.
    """
    reader = YamlReader(file)
    data = reader.read(text.removeprefix("\ufeff"))
    manifest, wrong_places = _validate(data, file)
    problems = list(reader.problems)
    problems += [
        reader.problem(nearest_line(reader.lines, steps), message, hint)
        for steps, message, hint in wrong_places
    ]

    engine_known = not any(steps[:1] == ("engine",) for steps, _, _ in wrong_places)

    # What is left out may reveal something wrong around it, which is no news to anybody.
    while manifest is None and _leave_out(data, [steps for steps, _, _ in wrong_places]):
        manifest, wrong_places = _validate(data, file)

    if manifest is not None:
        manifest.note_place(file, reader.lines)

    # What an alias repeats is one problem.
    in_order = sorted(dict.fromkeys(problems), key=lambda problem: problem.line)
    return Usable(manifest=manifest, problems=tuple(in_order), engine_known=engine_known)


def _validate(
    data: dict[str, Any], file: Path
) -> tuple[Manifest | None, list[tuple[Steps, str, str]]]:
    base = os.path.abspath(file.parent)  # noqa: PTH100 -- resolve() follows links
    try:
        return Manifest.model_validate(data, context={"base": base}), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    return None, [problem for detail in details for problem in explain(detail, _SECTIONS)]


def _leave_out(data: dict[str, Any], places: list[Steps]) -> bool:
    """Remove what is at these places from the data.

    Where nothing is, something is missing: what lacks it is removed.

    False if there is nothing to remove.
    """

    def inner_and_last_first(steps: Steps) -> tuple[int, int]:
        last = steps[-1] if steps else 0
        return len(steps), last if isinstance(last, int) else 0

    targets = {_there(data, steps) for steps in places}
    done = False

    for steps in sorted(targets, key=inner_and_last_first, reverse=True):
        if steps == ("version",) or (not steps and data.get("version") != 1):
            data["version"] = 1
            done = True
        elif steps:
            holder: Any = data
            for step in steps[:-1]:
                holder = holder[step]

            del holder[steps[-1]]
            done = True

    return done


def _there(data: dict[str, Any], steps: Steps) -> Steps:
    """The way to what is at `steps`, or to the nearest thing around it."""
    value: Any = data

    for depth, step in enumerate(steps):
        known = (
            step in value
            if isinstance(value, dict)
            else isinstance(value, list) and step in range(len(value))
        )
        if not known:
            return steps[:depth]
        value = value[step]

    return steps
