"""`rkcached edit`: opens the files of a prompt in an editor, and waits until its cache is fresh."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from rkcached.cli import exit_codes, looks, names, output, wait
from rkcached.cli.client import Client
from rkcached.cli.explain import explain_data
from rkcached.errors import DaemonUnreachable, SourceError, StoreError, UsageError, printable
from rkcached.host.settings import Settings
from rkcached.plan.fingerprint import changes
from rkcached.sources import patterns
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.names import hint_for
from rkcached.sources.records import Key
from rkcached.sources.stored_texts import StoredTexts

if TYPE_CHECKING:
    from rkcached.cli import forms

_EDITORS: Final = ("sensible-editor", "editor", "nano", "vi")


def run(settings: Settings, name: str, *, timeout_s: float) -> int:
    """Edit the files of MODEL/PROMPT, say what is rebuilt, and wait for that.

    Errors: SourceError, UsageError, ManifestError.
    """
    key = names.key_of(name)
    files = files_of(settings, key)
    before = _contents(files)
    looked = _explained(settings, key)
    _open_editor(files)
    if _contents(files) == before:
        click.echo("nothing was changed")
        return os.EX_OK

    _say_what_changed(key, looked, _explained(settings, key))
    return _wait(settings, name, timeout_s)


def files_of(settings: Settings, key: Key) -> list[Path]:
    """The files of a prompt: its texts, then its tools. Errors: SourceError, ManifestError."""
    manifest = read_manifest(settings.manifest)
    stored = StoredTexts(settings.state_dir)
    known = _files(manifest, stored)
    if key not in known:
        raise SourceError(f"there is no prompt {key}", hint=hint_for(str(key), map(str, known)))
    return known[key]


def _files(manifest: Manifest, stored: StoredTexts) -> dict[Key, list[Path]]:
    """The files of all prompts. What the manifest names goes before what a pattern finds."""
    found: dict[Key, list[Path]] = {}
    for model, config in manifest.models.items():
        with contextlib.suppress(OSError):  # this user may not look at stored texts
            for key in stored.keys(model):
                found[key] = [stored.path(key)]
        for pattern in config.prompts_from:
            for path in patterns.matches(pattern):
                found[Key(model, patterns.stem(path))] = [Path(path)]
        for prompt, declared in config.prompts.items():
            tools = [declared.tools] if declared.tools is not None else []
            found[Key(model, prompt)] = [*map(Path, declared.files), *tools]
    return found


def _contents(files: Sequence[Path]) -> list[bytes | None]:
    contents: list[bytes | None] = []
    for file in files:
        try:
            contents.append(file.read_bytes())
        except OSError:
            contents.append(None)
    return contents


def _open_editor(files: Sequence[Path]) -> None:
    """Errors: UsageError if there is no editor, or it failed."""
    command = editor()
    try:
        done = subprocess.run([*command, *map(str, files)], check=False)
    except OSError as error:
        raise UsageError(
            f"the editor {command[0]} cannot be started: {error.strerror}",
            hint="set EDITOR to another one",
        ) from error
    if done.returncode:
        raise UsageError(
            f"the editor {command[0]} ended with {done.returncode}",
            hint="what it has saved is kept, and a running daemon rebuilds the cache from it",
        )


def editor() -> list[str]:
    """The user's editor, with its options. Errors: UsageError."""
    for variable in ("VISUAL", "EDITOR"):
        try:
            words = shlex.split(os.environ.get(variable, ""))
        except ValueError as error:
            raise UsageError(
                f"{variable} is not a command: {error}", hint="correct its quotes"
            ) from error
        if words and shutil.which(words[0]) is None:
            raise UsageError(
                f"there is no program {words[0]!r}, which {variable} names",
                hint=f"set {variable} to an editor that is installed",
            )
        if words:
            return words
    for name in _EDITORS:
        if shutil.which(name) is not None:
            return [name]
    raise UsageError("no editor is installed", hint="set EDITOR to the one that you have")


def _explained(settings: Settings, key: Key) -> forms.ExplainedPrompt | None:
    """How its cache stands to its files; None where there is no store that this user may read."""
    try:
        return explain_data(looks.look_at(settings), key, settings.cache_dir)
    except (SourceError, StoreError):
        return None


def _say_what_changed(
    key: Key, before: forms.ExplainedPrompt | None, now: forms.ExplainedPrompt | None
) -> None:
    """By the fingerprints: a daemon may have built the new one already."""
    old = (before and before["wanted"]) or {}
    new = (now and now["wanted"]) or {}
    if old:
        for change in changes(old, new):
            click.echo(printable(f"{key}: {change}"))
    if now and not new:
        click.echo(printable(f"{key}: {now['reason']}; {now['hint']}"))


def _wait(settings: Settings, name: str, timeout_s: float) -> int:
    """Errors: as `wait.wait`."""
    try:
        with Client(settings.socket) as client:
            client.ready()
    except DaemonUnreachable:
        click.echo(
            "no daemon runs here; the prompt cache is built when you start one (`rkcached run`)"
        )
        return os.EX_OK

    with output.progress_line() as report:
        result = wait.wait(settings.socket, [name], timeout_s=timeout_s, report=report)
    for error in result.errors:
        exit_codes.complain(error)
    if not result.errors:
        click.echo(printable(f"{name} is fresh, after {result.waited_s:.1f} s"))
    return result.exit_code
