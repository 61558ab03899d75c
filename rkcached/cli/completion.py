"""Completes names of models and prompts in a shell: the daemon's, else those of the manifest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from rkcached.host import places

_PATIENCE_S: Final = 1.0
_MOST_BYTES: Final = 4 << 20


def prompts(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """MODEL/PROMPT."""
    return _beginning(incomplete, (name for name in _names(context) if "/" in name))


def models(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """MODEL."""
    return _beginning(incomplete, (name for name in _names(context) if "/" not in name))


def both(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """MODEL or MODEL/PROMPT."""
    return _beginning(incomplete, _names(context))


def schemas(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The next word of a name that `rkcached schema` knows."""
    typed = list(context.params.get("words") or ())
    known = [["manifest"], ["error"], *with_json(context.find_root().command)]
    following = (name[len(typed)] for name in known if name[: len(typed)] == typed != name)
    return _beginning(incomplete, following)


def with_json(command: click.Command) -> Iterator[list[str]]:
    """The words of each command that has --json, below this one."""
    for name, below in getattr(command, "commands", {}).items():
        if isinstance(below, click.Group):
            yield from ([name, *words] for words in with_json(below))
        elif any("--json" in parameter.opts for parameter in below.params):
            yield [name]


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete) and name.isprintable()})


def _names(context: click.Context) -> list[str]:
    """Nothing that goes wrong here may show: the user is in the middle of a line."""
    for find in (_of_daemon, _of_manifest):
        with contextlib.suppress(Exception):
            return list(find(context))
    return []


def _of_daemon(context: click.Context) -> list[str]:
    from rkcached.cli.client import Client

    given = context.params.get("socket") or os.environ.get("RKCACHED_SOCKET")
    with Client(Path(given or places.socket_to_ask()), patience_s=_PATIENCE_S) as client:
        status = client.status()
    names = [model["name"] for model in status["models"]]
    return [*names, *(f"{each['model']}/{each['prompt']}" for each in status["prompts"])]


def _of_manifest(context: click.Context) -> Iterable[str]:
    """By its keys alone: to check it takes longer than a user waits."""
    import yaml

    given = context.params.get("manifest") or os.environ.get("RKCACHED_MANIFEST")
    with Path(given or places.manifest()).open("rb") as stream:
        data: dict[str, Any] = yaml.safe_load(stream.read(_MOST_BYTES))
    for model, config in data["models"].items():
        yield str(model)
        for prompt in config.get("prompts") or ():
            yield f"{model}/{prompt}"
