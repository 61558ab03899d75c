"""`rkcached suggest`: the beginnings that requests repeat and that no prompt cache has.

Whoever may open the socket for changes is shown those of all users.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from rkcached.api import words
from rkcached.cli import output
from rkcached.cli.client import Client
from rkcached.errors import DaemonUnreachable, NotAllowed, SourceError, UsageError, printable
from rkcached.host.settings import Settings

if TYPE_CHECKING:
    from rkcached.cli import forms

_WHAT_IT_TAKES: Final = (
    "it takes three requests that begin alike, with a beginning that is no prompt and was "
    "prefilled more than once"
)


def run(settings: Settings, wanted: str | None, name: str | None, *, want_json: bool) -> int:
    """List suggestions, or with `name` have the next request of one of them stored."""
    with _client(settings, will_write=name is not None) as client:
        found = client.suggestions()
        if wanted is not None:
            found = [suggestion for suggestion in found if suggestion["id"] == wanted]
            if not found:
                raise SourceError(
                    f"there is no suggestion {wanted!r}",
                    hint="`rkcached suggest` lists them; those of before a restart are forgotten",
                )

        if name is not None:
            found = [client.store_next(_only(found)["id"], name)]

    if want_json:
        suggested: forms.Suggested = {"format": 1, "suggestions": found}
        output.print_json(suggested)
    else:
        _print(found)
    return os.EX_OK


@contextlib.contextmanager
def _client(settings: Settings, *, will_write: bool) -> Iterator[Client]:
    """A client on the socket for changes; to read only, where that is not to be had, on the other.

    Errors: NotAllowed, DaemonUnreachable.
    """
    with contextlib.ExitStack() as closing:
        client = closing.enter_context(Client(settings.admin_socket))
        try:
            client.ready()
        except (NotAllowed, DaemonUnreachable):
            if will_write:
                raise
            client = closing.enter_context(Client(settings.socket))
        yield client


def _only(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The one suggestion that is meant. Errors: SourceError, UsageError."""
    if not found:
        raise SourceError(
            "there is no suggestion yet",
            hint=f"{_WHAT_IT_TAKES}; then run `rkcached suggest` again",
        )
    if len(found) > 1:
        ids = ", ".join(suggestion["id"] for suggestion in found[:5])
        raise UsageError(
            f"there are {len(found)} suggestions", hint=f"name the one to store: {ids}"
        )
    return found[0]


def _print(found: list[dict[str, Any]]) -> None:
    if not found:
        click.echo(f"no suggestion yet: {_WHAT_IT_TAKES}")

    for suggestion in found:
        line = f"{suggestion['id']}  {suggestion['model']}: {words.suggestion_of(suggestion)}"
        click.echo(printable(line))
        if suggestion["outcome"] not in ("", "waiting"):
            click.echo(printable(f"  {suggestion['prompt']}: {suggestion['outcome']}"))
        if suggestion["next_step"]:
            click.echo(printable(f"  {suggestion['next_step']}"))
