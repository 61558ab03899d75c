"""`rkcached key`: creates, lists and revokes the keys by which programs use a TCP port.

They are a file in the state directory, which the daemon reads again when it changed, so no daemon
has to run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from rkcached.cli import output
from rkcached.errors import printable
from rkcached.host.settings import Settings
from rkcached.sources.access_keys import AccessKey, add_key, list_keys, revoke_key

if TYPE_CHECKING:
    from rkcached.cli import forms


def add(
    settings: Settings, name: str, *, admin: bool, models: Sequence[str], want_json: bool
) -> int:
    """Print a new key: with the lines to paste at a terminal, and elsewhere alone."""
    key, text = add_key(settings.state_dir, name, admin=admin, models=models)
    if want_json:
        added: forms.AddedKey = {"format": 1, **described(key), "key": text}
        output.print_json(added)
    elif sys.stdout.isatty():
        click.echo(f"key {key.name}, {may(key)}; it is shown only now:\n\n  {text}\n")
        for line in lines_to_paste(text):
            click.echo(line)
    else:
        click.echo(text)
    if not want_json:
        place = printable(str(settings.state_dir))
        click.echo(
            f"it is for the daemon whose state directory is {place}; "
            "for another daemon, name its own with --state-dir",
            err=True,
        )
    return os.EX_OK


def show_all(settings: Settings, *, want_json: bool) -> int:
    keys = list_keys(settings.state_dir)
    if want_json:
        listed: forms.KeyList = {"format": 1, "keys": [described(key) for key in keys]}
        output.print_json(listed)
        return os.EX_OK

    if not keys:
        click.echo("no key; `rkcached key add NAME` creates one")
    for key in keys:
        click.echo(printable(f"{key.name}  {may(key)}, created {key.created}"))
    return os.EX_OK


def revoke(settings: Settings, name: str, *, want_json: bool) -> int:
    key = revoke_key(settings.state_dir, name)
    if want_json:
        revoked: forms.RevokedKey = {"format": 1, **described(key)}
        output.print_json(revoked)
    else:
        click.echo(f"revoked {key.name}: the daemon rejects it from now on")
    return os.EX_OK


def described(key: AccessKey) -> forms.Key:
    """A key for JSON, without its digest."""
    return {
        "name": key.name,
        "admin": key.admin,
        "models": list(key.models),
        "owner": key.owner,
        "created": key.created,
    }


def may(key: AccessKey) -> str:
    """The words for what a key may do."""
    if key.admin:
        return "may use all models and make changes"
    if key.models:
        return f"may use only {', '.join(key.models)}"
    return "may use all models"


def lines_to_paste(text: str, base_url: str = "http://ADDRESS:PORT/v1") -> list[str]:
    """The variables that clients of OpenAI's API read."""
    return [f"export OPENAI_BASE_URL={base_url}", f"export OPENAI_API_KEY={text}"]
