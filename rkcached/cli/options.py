"""Options that several commands share, and how the places they name become settings."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from rkcached.errors import SettingsError

MAX_WAIT_S = 31_536_000
"""A year."""

# click would refuse what may not be read itself, as a mistake on the command line.
PATH = click.Path(path_type=Path, readable=False)


class Whole(click.IntRange):
    """A whole number; the error of any other value says which are allowed."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number: int = super().convert(value, param, ctx)
        except click.BadParameter:
            bound = "" if self.max is None else f" and at most {self.max:,}"
            self.fail(f"{value!r} is not a whole number of at least {self.min}{bound}", param, ctx)
        return number


class Seconds(click.FloatRange):
    """Seconds to wait; the error of any other value says which are allowed."""

    name = "seconds"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True, max=MAX_WAIT_S)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds: float = super().convert(value, param, ctx)
        except click.BadParameter:
            self._refuse(value, param, ctx)
        if math.isnan(seconds):
            self._refuse(value, param, ctx)
        return seconds

    def _refuse(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> NoReturn:
        self.fail(
            f"{value!r} is not a number of seconds, more than 0 and at most {MAX_WAIT_S:,}; "
            "write it as 60 or 0.5",
            param,
            ctx,
        )


FLAGS = {
    "manifest": click.option(
        "--manifest",
        "-m",
        type=PATH,
        metavar="FILE",
        help="The manifest: the YAML file that names your models and prompts; default: "
        "manifest.yaml here if it exists, else /etc/rkcached/manifest.yaml. "
        "[RKCACHED_MANIFEST]",
    ),
    "cache_dir": click.option(
        "--cache-dir",
        type=PATH,
        metavar="DIR",
        help="The folder of the finished prompt caches (the store), which large files fill. To "
        "keep them on another disk, give this to the daemon and to every command; default: "
        "cache in the current folder; with the manifest /etc/rkcached/manifest.yaml it is "
        "/var/cache/rkcached. [RKCACHED_CACHE_DIR]",
    ),
    "state_dir": click.option(
        "--state-dir",
        type=PATH,
        metavar="DIR",
        help="The folder of what cannot be built again: the texts of prompts that were stored over "
        "HTTP or learned, and the keys of TCP ports. To keep them elsewhere, as on a disk with "
        "backups, give this to the daemon and to every command; default: state beside the store; "
        "beside /var/cache/rkcached it is /var/lib/rkcached. [RKCACHED_STATE_DIR]",
    ),
    "admin_socket": click.option(
        "--admin-socket",
        type=PATH,
        metavar="PATH",
        help="The file by which commands that change something reach the daemon: a Unix socket of "
        "its owner. Name it if the daemon was started with another one; default: admin.sock beside "
        "the other socket. [RKCACHED_ADMIN_SOCKET]",
    ),
    "socket": click.option(
        "--socket",
        "-s",
        type=PATH,
        metavar="PATH",
        help="The file by which programs and commands reach the daemon: a Unix socket. Name it if "
        "the daemon was started with another one, or if you run several; default: rkcached.sock in "
        "$XDG_RUNTIME_DIR; in /run/rkcached if that is not set, or if only the system's daemon has "
        "a socket. [RKCACHED_SOCKET]",
    ),
}


def waits_for_fresh(help_: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The option of a command that waits for prompt caches: `timeout_s`, in seconds."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=Seconds(),
        default=300,
        show_default=True,
        metavar="S",
        help=help_,
    )


as_json = click.option("--json", "want_json", is_flag=True, help="Print JSON.")


def _bad_setting(error: ValueError) -> SettingsError:
    """The validation library's first complaint, as one sentence."""
    details: list[Any] = getattr(error, "errors", list)()
    first = details[0] if details else {"loc": ("setting",), "msg": str(error)}
    name = str(first["loc"][0])
    return SettingsError(
        f"{name.replace('_', '-')}: {str(first['msg']).removeprefix('Input ')}",
        hint=f"correct RKCACHED_{name.upper()}, or the flag of that name",
    )


def _words(paths: dict[str, Path], others: dict[str, Any]) -> list[str]:
    """The command's own line again, with these places."""
    context = click.get_current_context()
    words = [str(context.info_name)]
    for name, path in paths.items():
        words.append(f"--{name.replace('_', '-')}={path}")

    arguments: list[str] = []
    for parameter in context.command.params:
        value: Any = others.get(str(parameter.name))
        if value is True:
            words.append(parameter.opts[0])
        if isinstance(parameter, click.Argument):
            arguments += [value] if isinstance(value, str) else value

    return [*words, "--", *arguments]


def _as_typed() -> str:
    """The command line, as its caller typed it."""
    return shlex.join(["rkcached", *sys.argv[1:]])


def _imports(*, listens: bool) -> contextlib.AbstractContextManager[None]:
    """Wraps imports that take long: systemd waits for those of the daemon."""
    if not listens:
        return contextlib.nullcontext()

    from rkcached.host.systemd import asking_for_time

    return asking_for_time()


def places(
    *names: str, listens: bool = False, as_service: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the flags for these places, and their values as `settings`.

    `as_service`: where they are those of the installed unit, root runs the command with the
    daemon's eyes.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def with_settings(**kwargs: Any) -> int:
            # all that a daemon imports stays: looking for garbage in it takes a tenth of its start
            if listens:
                gc.disable()

            with _imports(listens=listens):
                from rkcached.host.settings import Settings

            given = {name: kwargs.pop(name) for name in names}
            try:
                settings = Settings(**{k: v for k, v in given.items() if v is not None})
            except ValueError as error:
                raise _bad_setting(error) from None

            if as_service:
                from rkcached.host import unit

                paths = {name: getattr(settings, name) for name in names}
                unit.become_it(_words(paths, kwargs), **paths)

            if listens or "manifest" not in names:
                return command(settings=settings if listens else settings.of_client(), **kwargs)

            from rkcached.host import access, unit

            advice = functools.partial(unit.advice, settings.manifest, _as_typed())
            with access.advising(advice):
                return command(settings=settings.of_client(), **kwargs)

        for name in reversed(names):
            with_settings = FLAGS[name](with_settings)
        return with_settings

    return decorate
