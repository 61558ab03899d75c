"""`rkcached status`: the table, the document or the live view."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rkcached.cli import output
from rkcached.cli.client import Client
from rkcached.cli.status import show
from rkcached.errors import UsageError
from rkcached.host.settings import Settings

NOT_ALL_FRESH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How somebody wants to see the status."""

    want_json: bool
    watch: bool
    verbose: bool


def run(settings: Settings, view: View, *, exit_code: bool) -> int:
    if view.watch and exit_code:
        raise UsageError(
            "--watch and --exit-code cannot be combined",
            hint="`rkcached wait` ends when all is fresh",
        )

    if view.watch:
        from rkcached.cli.status import live

        live.watch(settings.socket, output.console(), want_json=view.want_json)
        return os.EX_OK

    with Client(settings.socket) as client:
        status = client.status()

    if view.want_json:
        output.print_json(status)
    else:
        show.print_status(output.console(), status, verbose=view.verbose)

    if exit_code and not show.all_fresh(status):
        return NOT_ALL_FRESH
    return os.EX_OK
