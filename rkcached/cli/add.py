"""`rkcached add`: declares a model or a prompt in the manifest, whose comments and order stay."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, Final

import click
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from rkcached.cli import output
from rkcached.cli.init.folder import model_name, template_of
from rkcached.errors import (
    SourceError,
    StoreError,
    UsageError,
    printable,
)
from rkcached.host import disk
from rkcached.host.settings import Settings
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import manifest_text
from rkcached.sources.parser import parse
from rkcached.sources.problems import NAME, NAME_RULE

_MODELS: Final = (".gguf", ".rkllm")
_LINE: Final = 4096
"""No line of the manifest is broken anew."""


def run(
    settings: Settings, file: Path, *, model: str | None, name: str | None, want_json: bool
) -> int:
    """Declare a model's or a prompt's file. Errors: ManifestError, SourceError, UsageError."""
    path = Path(os.path.abspath(file))  # noqa: PTH100 - links stay
    if not path.is_file():
        raise SourceError(f"{file} is no file", hint="name a model (.gguf, .rkllm) or a text")

    text = manifest_text(settings.manifest)
    manifest = parse(text, file=settings.manifest)
    if path.suffix.lower() in _MODELS:
        if model is not None:
            raise UsageError("a model is not added to a model", hint="leave out --model")
        added = _Added(model=name or model_name(path), prompt="")
    else:
        added = _Added(model=_model_for(manifest, model), prompt=name or path.stem.lower())
    _refuse_name(manifest, added)

    new = _with(text, added, _shown(path, settings.manifest.parent))
    _refuse_other_changes(manifest, parse(new, file=settings.manifest), added)
    _write(settings.manifest, new)
    if want_json:
        data = {"manifest": str(settings.manifest), "model": added.model, "file": str(path)}
        output.print_json(data | {"prompt": added.prompt or None})
    else:
        click.echo(printable(f"{settings.manifest}: added {added}; a running daemon reads it now"))
    return os.EX_OK


class _Added:
    def __init__(self, *, model: str, prompt: str) -> None:
        self.model = model
        self.prompt = prompt
        """Empty: the model itself is added."""

    def __str__(self) -> str:
        return (
            f"the prompt {self.model}/{self.prompt}" if self.prompt else f"the model {self.model}"
        )


def _model_for(manifest: Manifest, wanted: str | None) -> str:
    """The model that gets a prompt. Errors: UsageError."""
    answering = [name for name, model in manifest.models.items() if not model.pools]
    if wanted is not None:
        if wanted not in answering:
            raise UsageError(
                f"no model {wanted!r} of the manifest could have a prompt",
                hint=f"models that could: {', '.join(answering) or 'none'}",
            )
        return wanted
    if len(answering) != 1:
        raise UsageError(
            "the prompt could be for several models" if answering else "no model could have it",
            hint=f"name one with --model: {', '.join(answering)}" if answering else "add one first",
        )
    return answering[0]


def _refuse_name(manifest: Manifest, added: _Added) -> None:
    """Errors: UsageError."""
    name = added.prompt or added.model
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name: {NAME_RULE}", hint="give another one with --name")
    model = manifest.models.get(added.model)
    taken = model is not None and (not added.prompt or added.prompt in model.prompts)
    if taken:
        raise UsageError(f"the manifest has {added} already", hint="give another name with --name")


def _shown(path: Path, folder: Path) -> str:
    return os.fspath(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _with(text: str, added: _Added, path: str) -> str:
    """The text with one declaration more. Errors: UsageError."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = _LINE
    editor.indent(mapping=2, sequence=4, offset=2)
    try:
        data = editor.load(text)
        if added.prompt:
            _section(data["models"][added.model], "prompts")[added.prompt] = path
        else:
            _section(data, "models")[added.model] = _new_model(added.model, path)
        stream = io.StringIO()
        editor.dump(data, stream)
    except (YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the manifest cannot be changed by a program: {type(error).__name__}",
            hint=f"add it by hand: {added.prompt or added.model}: {path}",
        ) from error
    return stream.getvalue()


def _section(above: Any, name: str) -> Any:
    if above.get(name) is None:
        above[name] = CommentedMap()
    return above[name]


def _new_model(name: str, path: str) -> CommentedMap:
    model = CommentedMap(path=path)
    template = template_of(name)
    if path.endswith(".rkllm") and template:
        model["chat_template"] = template
    return model


def _refuse_other_changes(before: Manifest, after: Manifest, added: _Added) -> None:
    """Whether nothing but this was added, as the manifest is understood. Errors: UsageError."""
    rest = after.model_dump()
    model = rest["models"][added.model]
    gone = (
        model["prompts"].pop(added.prompt, None)
        if added.prompt
        else rest["models"].pop(added.model)
    )
    if gone is None or rest != before.model_dump():
        raise UsageError(
            "the manifest is written in a way that a program cannot extend",
            hint=f"add {added} by hand",
        )


def _write(manifest: Path, text: str) -> None:
    """Errors: StoreError."""
    try:
        info = manifest.stat()
        target = Path(os.path.realpath(manifest))  # a link stays one
        owner = (info.st_uid, info.st_gid)
        disk.replace(
            target,
            text.encode(),
            stat.S_IMODE(info.st_mode),
            owner=owner if owner != (os.geteuid(), os.getegid()) else None,
        )
    except OSError as error:
        raise StoreError(
            f"{manifest} cannot be written: {error.strerror}", hint="try again with sudo"
        ) from error
