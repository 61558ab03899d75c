"""Asks what must be asked, writes the manifest, and says what to do next."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import output
from rkcached.cli.check import check_manifest
from rkcached.cli.init.folder import WHERE_MODELS_COME_FROM, Found, FoundModel, look_into
from rkcached.cli.init.text import SAMPLE, SCHEMA_NAME, Wanted, text_of
from rkcached.engines.kinds import EngineKind
from rkcached.errors import ManifestError, SourceError, StoreError, counted, printable
from rkcached.host import disk
from rkcached.host.places import SYSTEM_MANIFEST
from rkcached.host.settings import Settings
from rkcached.sources.manifest import json_schema
from rkcached.sources.manifest_file import manifest_text

if TYPE_CHECKING:
    from rkcached.cli import forms

_MODE = 0o644
_SHOWN = 20

_SAMPLES = frozenset({"1f20679ddf388cc5bfbab03caf1107ae139434b6d4575ebe0802efdc81ff7c78"})
"""The SHA-256 of each manifest that an installation has put in place. One that is still so is
nobody's work."""

Choose = Callable[[str, Sequence[str]], str]
"""Takes a question and the possible answers, of which the first is the default."""


def run(folder: Path, manifest: Path | None, *, yes: bool, want_json: bool) -> int:
    """Write a manifest for the models and prompts of a folder. Nobody's work is overwritten."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - links stay
    manifest = Path(os.path.abspath(manifest or folder / "manifest.yaml"))  # noqa: PTH100
    try:
        if folder.is_file():
            raise SourceError(f"{folder} is a file, not a folder", hint="name the folder it is in")
        _refuse_existing(manifest)
        _refuse_strange_schema(manifest.with_name(SCHEMA_NAME))
        found = look_into(folder)
    except OSError as error:
        raise SourceError(
            f"{error.filename or folder} cannot be read: {error.strerror}",
            hint="name the folder that has your models and prompts",
        ) from error
    if not found.models:
        raise SourceError(
            f"{folder} has no model",
            hint=f"put a .gguf or .rkllm file there; {WHERE_MODELS_COME_FROM}",
        )

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

    _write(manifest, text_of(wanted, manifest.parent), sample)
    if want_json:
        output.print_json(_data(manifest, wanted, found))
    else:
        _print(manifest, wanted, found, sample)
    return os.EX_OK


def _refuse_strange_schema(path: Path) -> None:
    """Refuse to write the schema over anything that is not one of an earlier `init`."""
    _refuse_strange(path)
    if not path.exists():
        return
    try:
        known = json.loads(path.read_bytes())["properties"]["models"]
    except (ValueError, KeyError, TypeError, OSError):
        known = None
    if known is None:
        raise StoreError(
            f"{path} exists, and is not a manifest's schema",
            hint="move it away, or name a manifest in another folder after -m",
        )


def _refuse_strange(path: Path) -> None:
    """Refuse to put a file in the place of a link, a pipe or a folder."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise StoreError(
            f"{path} is a link, a pipe or a folder, and a file of this name is to be written",
            hint="move it away, or name a manifest in another folder after -m",
        )


def _refuse_existing(manifest: Path) -> None:
    if manifest.name == SCHEMA_NAME:
        raise StoreError(
            f"{manifest} is the name of the schema beside a manifest", hint="name another after -m"
        )
    if manifest.is_dir():
        raise StoreError(f"{manifest} is a folder", hint="name the manifest's file after -m")
    if os.path.lexists(manifest) and not manifest.is_file():
        _refuse_strange(manifest)
    if os.path.lexists(manifest) and not _is_sample(manifest):
        raise StoreError(
            f"{manifest} exists already, and is not overwritten",
            hint="`rkcached check` says whether it is right; `rkcached add FILE` adds a model or a "
            "prompt to it",
        )


def _is_sample(manifest: Path) -> bool:
    """Whether it is as an installation put it there."""
    try:
        text = manifest_text(manifest)
    except ManifestError:
        return False
    return hashlib.sha256(text.encode()).hexdigest() in _SAMPLES


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
        if _is_sample(manifest):
            old = manifest.stat()
            disk.replace(
                manifest, text.encode(), stat.S_IMODE(old.st_mode), owner=(old.st_uid, old.st_gid)
            )
        else:
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
        kind = f"{model.pools} model" if model.pools else f"chat template: {model.format}"
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
        return [
            "sudo systemctl enable --now rkcached",
            "sudo rkcached wait",
            *(f"sudo {line}" for line in ask),
        ]

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
