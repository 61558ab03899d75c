"""`rkcached reload`, as `systemctl reload` runs it: quick, so it imports little."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import output
from rkcached.cli.client import Client
from rkcached.errors import RequestError, RkcachedError
from rkcached.host import places

if TYPE_CHECKING:
    from rkcached.cli import forms

# A look that hashes a large model for the first time takes this long; usually 0.1 s.
_TIMEOUT_S = 60.0


def run(admin_socket: Path | None, *, want_json: bool) -> int:
    summary = reload(admin_socket or places.admin_socket_to_ask())
    if want_json:
        reloaded: forms.Reloaded = {"format": 1, "summary": summary}
        output.print_json(reloaded)
    else:
        click.echo(summary)
    return os.EX_OK


def reload(admin_socket: Path) -> str:
    """Make the daemon read its manifest; returns its summary.

    Errors: ManifestError, DaemonUnreachable, NotAllowed, RkcachedError.
    """
    with Client(admin_socket, patience_s=_TIMEOUT_S) as client:
        try:
            return client.reload()
        except RequestError as error:
            raise RkcachedError(error.message) from error
