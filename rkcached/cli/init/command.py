"""Asks what must be asked, writes the manifest, and says what to do next."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import output
from rkcached.cli.check import check_manifest
from rkcached.cli.init.folder import Found, FoundModel, look_into
from rkcached.cli.init.text import SAMPLE, SCHEMA_NAME, Wanted, manifest_text
from rkcached.engines.kinds import EngineKind
from rkcached.errors import SourceError, StoreError, counted, printable
from rkcached.host import disk
from rkcached.host.places import SYSTEM_MANIFEST
from rkcached.host.settings import Settings
from rkcached.sources.manifest import json_schema

if TYPE_CHECKING:
    from rkcached.cli import forms

_WHERE_MODELS_COME_FROM = (
    "put a .gguf or .rkllm file there; docs/models.md says where to get one, and `rkcached demo` "
    "brings a small one to try"
)

_MODE = 0o644
_SHOWN = 20

Choose = Callable[[str, Sequence[str]], str]
"""Takes a question and the possible answers, of which the first is the default."""


def run(folder: Path, manifest: Path | None, *, yes: bool, want_json: bool) -> int:
    """Write a manifest for the models and prompts of a folder. No file is overwritten."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - links stay
    manifest = Path(os.path.abspath(manifest or folder / "manifest.yaml"))  # noqa: PTH100
    _refuse_existing(manifest)
    try:
        found = look_into(folder)
    except OSError as error:
        raise SourceError(
            f"{error.filename or folder} cannot be read: {error.strerror}",
            hint="name the folder that has your models and prompts",
        ) from error
    if not found.models:
        raise SourceError(f"{folder} has no model", hint=_WHERE_MODELS_COME_FROM)

    choose = _ask if not yes and not want_json and sys.stdin.isatty() else _take_first
    wanted = wanted_of(found, choose)
    sample: Path | None = None
    if wanted.answering and not wanted.prompts:
        sample = manifest.parent / "prompts" / "assistant.md"
        wanted = Wanted(
            engine=wanted.engine,
            models=wanted.models,
            prompts={"assistant": sample},
            answering=wanted.answering,
        )

    _write(manifest, manifest_text(wanted, manifest.parent), sample)
    if want_json:
        output.print_json(_data(manifest, wanted, found))
    else:
        _print(manifest, wanted, found, sample)
    return os.EX_OK


def _refuse_existing(manifest: Path) -> None:
    if os.path.lexists(manifest):
        raise StoreError(
            f"{manifest} exists already, and is not overwritten",
            hint="`rkcached check` says whether it is right; `rkcached add FILE` adds a model or a "
            "prompt to it",
        )


# Asking


def wanted_of(found: Found, choose: Choose) -> Wanted:
    """One engine, its models, and the model that gets the prompts."""
    engines = sorted({model.engine for model in found.models})  # llamacpp before rkllm
    engine = engines[0]
    if len(engines) > 1:
        first = EngineKind.RKLLM if _has_npu() else EngineKind.LLAMACPP
        options = sorted(engines, key=lambda kind: kind is not first)
        question = "There are models for the NPU (rkllm) and for the CPU (llamacpp). Which engine?"
        engine = EngineKind(choose(question, [kind.value for kind in options]))

    models = tuple(model for model in found.models if model.engine is engine)
    answering = [model.name for model in models if not model.pools]
    name = answering[0] if answering else ""
    if len(answering) > 1 and found.prompts:
        name = choose(
            f"Which model shall have the {counted(len(found.prompts), 'prompt')}?", answering
        )
    return Wanted(engine=engine, models=models, prompts=dict(found.prompts), answering=name)


def _has_npu() -> bool:
    return any(Path("/sys/class/devfreq").glob("*npu*")) or os.path.lexists("/dev/rknpu")


def _take_first(_question: str, answers: Sequence[str]) -> str:
    return answers[0]


def _ask(question: str, answers: Sequence[str]) -> str:
    chosen: str = click.prompt(
        question, type=click.Choice(list(answers)), default=answers[0], err=True
    )
    return chosen


# Writing


def _write(manifest: Path, text: str, sample: Path | None) -> None:
    """The sample first, so the manifest never names what is not there. Errors: StoreError."""
    schema = manifest.with_name(SCHEMA_NAME)
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        if sample is not None and not os.path.lexists(sample):
            sample.parent.mkdir(exist_ok=True)
            disk.write_new(sample, SAMPLE.encode(), _MODE)
        disk.replace(schema, (json.dumps(json_schema(), indent=1) + "\n").encode(), _MODE)
        disk.write_new(manifest, text.encode(), _MODE)
    except OSError as error:
        _refuse_existing(manifest)  # somebody may have been quicker
        raise StoreError(
            f"{error.filename or manifest} cannot be written: {error.strerror}",
            hint="choose another place with --manifest FILE, or use sudo",
        ) from error


# What was done, and what comes next


def _data(manifest: Path, wanted: Wanted, found: Found) -> forms.Initialised:
    problems = check_manifest(Settings(manifest=manifest)).problems
    return {
        "format": 1,
        "manifest": str(manifest),
        "engine": wanted.engine.value,
        "models": [_model_data(model) for model in wanted.models],
        "prompts": [
            {"model": wanted.answering, "prompt": name, "file": str(path)}
            for name, path in wanted.prompts.items()
        ],
        "skipped": [{"file": str(path), "reason": why} for path, why in _left_out(wanted, found)],
        "problems": output.problems_data(problems),
    }


def _model_data(model: FoundModel) -> forms.InitialModel:
    return {
        "name": model.name,
        "path": str(model.path),
        "context_tokens": model.context_tokens,
        "chat_template": model.own_template or model.template or None,
    }


def _left_out(wanted: Wanted, found: Found) -> list[tuple[Path, str]]:
    others = [
        (model.path, f"it is for the engine {model.engine.value}")
        for model in found.models
        if model not in wanted.models
    ]
    return sorted([*others, *found.skipped])


def _print(manifest: Path, wanted: Wanted, found: Found, sample: Path | None) -> None:
    models = counted(len(wanted.models), "model")
    prompts = counted(len(wanted.prompts), "prompt")
    say = _say
    say(f"wrote {_shown(manifest)}: {models}, {prompts}")
    for model in wanted.models:
        form = (
            model.own_template or model.template or "unknown, chatml is assumed; see the manifest"
        )
        kind = f"{model.pools} model" if model.pools else f"chat template: {form}"
        say(f"  {model.name}: {model.context_tokens:,} tokens of context, {kind}")
    for name, path in list(wanted.prompts.items())[:_SHOWN]:
        new = " (a sample; write your own text into it)" if path == sample else ""
        say(f"  {wanted.answering}/{name}: {_shown(path)}{new}")
    if (more := len(wanted.prompts) - _SHOWN) > 0:
        say(f"  and {more:,} more prompts")
    for path, why in _left_out(wanted, found)[:_SHOWN]:
        say(f"  left out: {_shown(path)}: {why}")

    problems = check_manifest(Settings(manifest=manifest)).problems
    if problems:
        click.echo("before you start it:")
    for problem in problems:
        say(f"  {problem}")
    click.echo("next:")
    for line in next_steps(manifest, wanted):
        say(f"  {line}")


def next_steps(manifest: Path, wanted: Wanted) -> list[str]:
    """The commands that lead from the manifest to an answer."""
    name = wanted.answering
    if name and wanted.prompts:
        name = f"{name}/{next(iter(wanted.prompts))}"
    ask = [f'rkcached chat {name} "hello"'] if name else []
    if manifest == SYSTEM_MANIFEST:
        return ["sudo systemctl enable --now rkcached", *ask]

    start = "rkcached run"
    if manifest.parent != Path.cwd() or manifest.name != "manifest.yaml":
        start = f"cd {shlex.quote(str(manifest.parent))} && rkcached run -m {manifest.name}"
    return [
        f"{start}    # it stays; Ctrl-C ends it",
        *(f"{line}    # in another terminal" for line in ask),
    ]


def _shown(path: Path) -> str:
    """The path, from the current folder where it lies below."""
    here = Path.cwd()
    return os.fspath(path.relative_to(here) if path.is_relative_to(here) else path)


def _say(text: str) -> None:
    click.echo(printable(text))
