"""`rkcached check`: every problem of a manifest and of the files it names, with the line that names them."""

from __future__ import annotations

from pathlib import Path

from rkcached.desired import Resolver
from rkcached.digests import Digests
from rkcached.errors import ManifestError, Problem
from rkcached.observe import read_manifest
from rkcached.plan import Trouble
from rkcached.rendering import Renderer
from rkcached.sources import SourceReader


def problems_of(manifest_file: Path) -> tuple[list[Problem], str]:
    """The problems in the order of their lines, and one line that sums up."""
    try:
        manifest = read_manifest(manifest_file)
    except ManifestError as error:
        return list(error.problems), _counted(len(error.problems), "problem")
    sources = SourceReader(Digests()).scan(manifest)
    desired = Resolver(Renderer().compile).resolve(manifest, sources)
    troubles: list[tuple[int, Trouble]] = []
    for name, model in desired.models.items():
        if isinstance(model, Trouble):
            troubles.append((manifest.line_of("models", name, "path"), model))
    troubles += [
        (manifest.line_of("models", name, "prompts_from"), trouble) for name, trouble in sources.unlisted_models.items()
    ]
    for key, prompt in desired.prompts.items():
        # What is wrong with a model was said once, for the model; a prompt may have a trouble of its own besides.
        own = sources.prompts[key].source if isinstance(desired.models[key.model], Trouble) else prompt.trouble
        if isinstance(own, Trouble):
            troubles.append((sources.prompts[key].line, own))
    problems = [
        Problem(file=str(manifest_file), line=line, message=trouble.message, hint=trouble.hint)
        for line, trouble in sorted(troubles, key=lambda found: found[0])
    ]
    if problems:
        return problems, _counted(len(problems), "problem")
    return [], f"ok, {_counted(len(manifest.models), 'model')}, {_counted(len(desired.prompts), 'prompt')}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
