"""`rkcached check`: every problem of a manifest and of the files it names, with its line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import output
from rkcached.cli.service_view import ServiceView, view_of
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.errors import ManifestError, Problem, counted, printable
from rkcached.host import cpus
from rkcached.host.digests import Digests
from rkcached.host.settings import Settings
from rkcached.messages.sandbox import Renderer
from rkcached.plan import remarks
from rkcached.plan.desired import Desired, Resolver
from rkcached.sources.manifest import EngineConfig, Manifest
from rkcached.sources.manifest_file import manifest_text
from rkcached.sources.parser import parse_usable
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import Key, RuntimeSource, Sources, Trouble

if TYPE_CHECKING:
    from rkcached.cli import forms

MODEST_TOKENS = 256
"""Up to so many a model that must generate them at each build is not worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The results of `check`."""

    problems: tuple[Problem, ...]
    """In the order of their lines."""
    warnings: tuple[str, ...]
    """Things that work, but cost more or give less than their owner may know; each with its file
    and line."""
    skipped_files: tuple[str, ...]
    """In a prompts_from folder, but with names that no prompt can have."""
    summary: str
    """All of it in one line."""


def run(settings: Settings, *, want_json: bool) -> int:
    findings = check_manifest(settings)
    if want_json:
        checked: forms.Checked = {
            "format": 1,
            "problems": output.problems_data(findings.problems),
            "warnings": list(findings.warnings),
            "skipped_files": list(findings.skipped_files),
        }
        output.print_json(checked)
    else:
        _print(findings, settings.manifest)

    if findings.problems:
        return os.EX_CONFIG
    return os.EX_OK


def _print(findings: Findings, manifest: Path) -> None:
    for finding in (*findings.problems, *findings.warnings):
        click.echo(printable(str(finding)), err=True)

    if findings.skipped_files:
        from rkcached.api import words

        click.echo(printable(words.skipped_files(findings.skipped_files)), err=True)

    click.echo(f"{manifest}: {findings.summary}", err=bool(findings.problems))


def check_manifest(settings: Settings) -> Findings:
    """Look at the manifest and at every file that it names, as the daemon does. Blocking."""
    manifest_file = settings.manifest
    try:
        usable = parse_usable(manifest_text(manifest_file), file=manifest_file)
    except ManifestError as error:
        return _findings(list(error.problems), (), (), "")

    if usable.manifest is None:
        return _findings(list(usable.problems), (), (), "")

    manifest = usable.manifest
    if not usable.engine_known:
        manifest = manifest.model_copy(update={"engine": EngineConfig(kind=_takes_any_file())})

    sources = SourceReader(Digests()).scan(manifest)
    runtime = sources.runtime
    if isinstance(runtime, Trouble):  # reported once, beside the other problems
        sources = replace(sources, runtime=RuntimeSource(version="", digest=""))

    desired = Resolver(Renderer().compile).resolve(manifest, sources)
    service = view_of(settings, manifest, sources).without(runtime)
    troubles = list(_troubles(manifest, sources, desired, service))
    if isinstance(runtime, Trouble) and usable.engine_known:
        key = "kind"
        if ENGINES[manifest.engine.kind].names_library:
            key = "library"
        troubles.append((manifest.line_of("engine", key), runtime))

    problems = list(usable.problems)
    for line, trouble in troubles:
        problems.append(
            Problem(file=str(manifest_file), line=line, message=trouble.message, hint=trouble.hint)
        )

    warnings = tuple(
        f"{manifest_file}:{warning}" for warning in _warnings(manifest, sources, runtime)
    )
    ok = f"ok, {counted(len(manifest.models), 'model')}, {counted(len(desired.prompts), 'prompt')}"
    tools = sum(len(prompt.tools.names) for prompt in desired.prompts.values() if prompt.tools)
    if tools:
        ok += f", {counted(tools, 'tool')}"
    if service.whose:
        ok += f", {service.whose}"
    return _findings(problems, warnings, sources.skipped_files, ok)


def _takes_any_file() -> EngineKind:
    """An engine that knows no model by its first bytes."""
    return next(kind for kind, engine in ENGINES.items() if not engine.model_magic)


def _findings(
    problems: list[Problem], warnings: tuple[str, ...], skipped: tuple[str, ...], ok: str
) -> Findings:
    return Findings(
        problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        warnings=warnings,
        skipped_files=skipped,
        summary=counted(len(problems), "problem") if problems else ok,
    )


def _troubles(
    manifest: Manifest, sources: Sources, desired: Desired, service: ServiceView
) -> Iterator[tuple[int, Trouble]]:
    """Troubles of the files that a manifest names, each with the line that names the file."""
    for name, trouble in service.models_in_trouble(manifest, desired).items():
        yield manifest.line_of("models", name, *(trouble.place or ("path",))), trouble
    for name, trouble in {**sources.unlisted_models, **service.unlisted_models}.items():
        yield manifest.line_of("models", name, "prompts_from"), trouble
    for key, trouble in service.prompts_in_trouble(manifest, sources, desired).items():
        yield _prompt_line(manifest, sources, key, trouble), trouble


def _prompt_line(manifest: Manifest, sources: Sources, key: Key, trouble: Trouble) -> int:
    if key.prompt in manifest.models[key.model].prompts:
        return manifest.line_of("models", key.model, "prompts", key.prompt, *trouble.place)
    return sources.prompts[key].line


def _warnings(
    manifest: Manifest, sources: Sources, runtime: RuntimeSource | Trouble
) -> Iterator[str]:
    """Warn of what works, but costs more or gives less than its owner may know.

    Each begins with its line.
    """
    for remark in (*remarks.notices(manifest, sources), *remarks.warnings(manifest, sources)):
        yield f"{manifest.line_of(*remark.place)}: warning: {remark.text}"

    for name, model in manifest.models.items():
        if absent := cpus.absent(model.npu.enabled_cpus):
            line = manifest.line_of("models", name, "npu", "enabled_cpus")
            yield f"{line}: warning: npu.enabled_cpus of {name}: {absent}"

    if isinstance(runtime, Trouble) or runtime.samples_per_run:
        return

    for name, model in manifest.models.items():
        tokens = model.params.max_new_tokens
        if model.pools or tokens <= MODEST_TOKENS:
            continue

        line = manifest.line_of("models", name, "params", "max_new_tokens")
        yield (
            f"{line}: warning: max_new_tokens of {name} is {tokens}, and RKLLM {runtime.version} "
            "generates an answer "
            "of up to that many tokens at each build, while requests wait (lower it to what "
            "answers need, "
            f"{MODEST_TOKENS} or less, or install runtime 1.3.0 or newer, which generates one "
            "token)"
        )
