"""`rkcached add`: declares a model or a prompt in the manifest, whose comments and order stay."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from rkcached.cli import output
from rkcached.cli.init.folder import model_name, template_of
from rkcached.engines.kinds import EngineKind
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
from rkcached.sources.text_files import read_text

if TYPE_CHECKING:
    from rkcached.cli import forms

_MODELS: Final = {".gguf": EngineKind.LLAMACPP, ".rkllm": EngineKind.RKLLM}
_LINE: Final = 4096
"""No line of the manifest is broken anew."""


def run(
    settings: Settings, file: Path, *, model: str | None, name: str | None, want_json: bool
) -> int:
    """Declare a model's or a prompt's file. Errors: ManifestError, SourceError, UsageError."""
    path = Path(os.path.abspath(file))  # noqa: PTH100 - links stay
    if not path.is_file():
        hint = "name a model (.gguf, .rkllm) or a text"
        if path.is_dir():
            hint = f"for all texts in it, write `prompts_from: {file}/*.md` below the model"
        raise SourceError(f"{file} is no file", hint=hint)

    with _alone(settings.manifest):
        text = manifest_text(settings.manifest)
        manifest = parse(text, file=settings.manifest)
        added = _added(manifest, path, model, name)
        shown = _shown(path, settings.manifest.parent)
        new = _moved_up(text, _with(text, added, shown))
        _refuse_other_changes(text, new)
        _refuse_another_meaning(manifest, parse(new, file=settings.manifest), added)
        _write(settings.manifest, text, new)

    if want_json:
        data: forms.Added = {
            "format": 1,
            "manifest": str(settings.manifest),
            "model": added.model,
            "prompt": added.prompt or None,
            "file": str(path),
        }
        output.print_json(data)
    else:
        what = f"{settings.manifest}: added {added}"
        click.echo(printable(f"{what}; the daemon of this manifest, if one runs, reads it now"))
    return os.EX_OK


@contextlib.contextmanager
def _alone(manifest: Path) -> Iterator[None]:
    """Wait until no other `add` works on this manifest."""
    # Of its folder, as each change puts another file in the place of the manifest.
    try:
        folder = os.open(Path(os.path.realpath(manifest)).parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield  # to read the manifest says what is wrong
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _added(manifest: Manifest, path: Path, model: str | None, name: str | None) -> _Added:
    """The declaration that the file becomes. Errors: SourceError, UsageError."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the name of {path} is not UTF-8, so no manifest can have it", hint="rename the file"
        ) from None

    suffix = path.suffix.lower()
    if suffix in _MODELS:
        if model is not None:
            raise UsageError(
                "--model is for prompts, and FILE is a model", hint="leave out --model"
            )
        if manifest.engine.kind is not _MODELS[suffix]:
            raise UsageError(
                f"the manifest's engine is {manifest.engine.kind.value}, which reads no {suffix}",
                hint=f"models of this kind need engine.kind: {_MODELS[suffix].value}",
            )
        added = _Added(model=name or model_name(path), prompt="")
    else:
        if not read_text(path).strip():
            raise SourceError(f"{path} is empty", hint="write the prompt's text into it first")
        added = _Added(model=_model_for(manifest, model), prompt=name or path.stem.lower())
    _refuse_name(manifest, added)
    return added


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
            "this manifest cannot be changed by a program",
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


def _moved_up(text: str, new: str) -> str:
    """The new lines, above the comments and the blank lines that they were written below."""
    before, after = text.splitlines(keepends=True), new.splitlines(keepends=True)
    changes = [
        one for one in SequenceMatcher(None, before, after).get_opcodes() if one[0] != "equal"
    ]
    if len(changes) != 1 or changes[0][0] != "insert":
        return new

    _, _, _, first, last = changes[0]
    start = first
    while start and (not after[start - 1].strip() or after[start - 1].lstrip().startswith("#")):
        start -= 1
    if start and not after[start - 1].rstrip("\n").endswith(":"):  # else they are the first
        after[start:last] = after[first:last] + after[start:first]
    return "".join(after)


def _refuse_other_changes(text: str, new: str) -> None:
    """Lines may come, and one line of a flow mapping may grow, but for its comments.

    Errors: UsageError.
    """
    before, after = text.splitlines(keepends=True), new.splitlines(keepends=True)
    gone = []
    for kind, start, end, _, _ in SequenceMatcher(None, before, after).get_opcodes():
        if kind in ("replace", "delete"):
            gone += before[start:end]
    if len(gone) > 1 or any("#" in line for line in gone):
        raise UsageError(
            "this cannot be added without changing other lines or comments of the manifest",
            hint="add it by hand, below `models:` or `prompts:`; then run `rkcached check`",
        )


def _refuse_another_meaning(before: Manifest, after: Manifest, added: _Added) -> None:
    """Whether nothing but this was added, as the manifest is understood. Errors: UsageError."""
    rest = after.model_dump()
    models = rest["models"]
    new = models.pop(added.model)
    if added.prompt:
        new["prompts"].pop(added.prompt, None)
        models[added.model] = new
    if rest != before.model_dump():
        raise UsageError(
            "this cannot be added without changing something else in the manifest",
            hint=f"add {added} by hand; then run `rkcached check`",
        )


def _write(manifest: Path, before: str, text: str) -> None:
    """Errors: StoreError, also if somebody changed it meanwhile."""
    if manifest_text(manifest) != before:
        raise StoreError(f"{manifest} was just changed by somebody else", hint="try again")
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
