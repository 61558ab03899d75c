"""Declares the commands about the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import completion
from rkcached.cli.options import PATH, as_json, places, waits_for_fresh

if TYPE_CHECKING:
    from rkcached.host.settings import Settings


@click.command()
@places("manifest", as_service=True)
@as_json
def check(settings: Settings, want_json: bool) -> int:
    """List every problem of the manifest and of its files, with file:line and what to do.

    It also lists warnings, and files that are skipped because their names cannot be a prompt's.
    With sudo it checks the service's own manifest as the service sees the files. The exit code is 0
    when there is no problem, 78 otherwise.
    """
    from rkcached.cli import check as command

    return command.run(settings, want_json=want_json)


@click.command()
@click.argument("words", metavar="[COMMAND]", nargs=-1, shell_complete=completion.schemas)
@as_json
def schema(words: Sequence[str], want_json: bool) -> int:
    """Print the JSON Schema of what COMMAND prints with --json; without COMMAND, list all of them.

    Two more have names of their own: `manifest`, for editors that complete and check YAML, and
    `error`, the line that any command prints on standard error when it fails with --json. The exit
    code is 66 for another name.
    """
    from rkcached.cli import schema as command

    return command.run(" ".join(words), want_json=want_json)


@click.command()
@click.argument("folder", metavar="[DIR]", type=PATH, default=Path())
@click.option(
    "--manifest",
    "-m",
    type=PATH,
    metavar="FILE",
    help="Where to write the manifest; default: manifest.yaml in DIR.",
)
@click.option("--yes", "-y", is_flag=True, help="Ask nothing: take the first choice of each.")
@as_json
def init(*, folder: Path, manifest: Path | None, yes: bool, want_json: bool) -> int:
    """Write a manifest for the models and prompts in DIR, and say what to do next.

    It finds .gguf and .rkllm models, the files of tokenizers beside them, and prompts: .md and .txt
    files in DIR, or in folders below it that are named prompts. At a terminal it asks what it must,
    such as which engine to use. It overwrites no file, except the
    sample manifest of an installation while nobody has edited it. The exit code is 66 when there is
    no model, 73 when there is a manifest already.
    """
    from rkcached.cli.init import command

    return command.run(folder, manifest, yes=yes, want_json=want_json)


@click.command()
@click.argument("file", metavar="FILE", type=PATH)
@places("manifest")
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=completion.models,
    help="The model that gets the prompt, where there are several.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="The name of the model or prompt; default: taken from the file's.",
)
@as_json
def add(
    *, settings: Settings, file: Path, model: str | None, name: str | None, want_json: bool
) -> int:
    """Declare a model (.gguf, .rkllm) or a prompt (any other file) in the manifest.

    Comments and order of the manifest stay. A running daemon notices it at once.
    """
    from rkcached.cli import add as command

    return command.run(settings, file, model=model, name=name, want_json=want_json)


@click.command()
@click.argument("name", metavar="MODEL/PROMPT", shell_complete=completion.prompts)
@places("manifest", "cache_dir", "state_dir", "socket")
@waits_for_fresh("Wait at most S seconds for the new cache.")
def edit(*, settings: Settings, name: str, timeout_s: float) -> int:
    """Open a prompt's files in your editor; then show what changed, and wait for the new cache.

    The editor is $VISUAL or $EDITOR. `rkcached wait --help` has the exit codes; it is 0 if nothing
    was changed, or no daemon runs.
    """
    from rkcached.cli import edit as command

    return command.run(settings, name, timeout_s=timeout_s)


COMMANDS = (init, check, add, edit, schema)
