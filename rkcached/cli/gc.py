"""`rkcached gc`: remove what no prompt uses; by the daemon if one runs, else here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkcached.api.words import size
from rkcached.cli import looks, output
from rkcached.cli.client import Client
from rkcached.errors import StoreLocked, counted, printable
from rkcached.host.settings import Settings
from rkcached.reconcile import collection
from rkcached.store import garbage

if TYPE_CHECKING:
    from rkcached.cli import forms


def run(settings: Settings, *, dry_run: bool, strangers: bool, want_json: bool) -> int:
    looks.need_store(settings)
    try:
        rubbish = _collect(settings, dry_run=dry_run, strangers=strangers)
    except StoreLocked as locked:
        rubbish = _ask_daemon(settings, locked, strangers=strangers)

    if want_json:
        collected: forms.Collected = {
            "format": 1,
            "store": str(settings.cache_dir),
            "removed": not dry_run,
            "size_bytes": sum(item["size_bytes"] for item in rubbish["items"]),
            "items": rubbish["items"],
            "strangers": rubbish["strangers"],
            "failed": rubbish["failed"],
        }
        output.print_json(collected)
    else:
        _print(rubbish, settings.cache_dir, dry_run=dry_run)

    if rubbish["failed"]:
        return os.EX_CANTCREAT
    return os.EX_OK


def _collect(settings: Settings, *, dry_run: bool, strangers: bool) -> dict[str, Any]:
    """Errors: StoreLocked where a daemon owns the store."""
    store = looks.store_of(settings)
    try:
        if not dry_run:
            store.open()

        look = looks.look_at(settings)
        named = collection.named_in(look, *looks.inputs_of(settings, look))
        rubbish = collection.find(store, look, named, strangers=strangers)
        if not dry_run:
            rubbish = garbage.remove_rubbish(store, rubbish, named)
        return garbage.as_data(rubbish)
    finally:
        store.close()


def _ask_daemon(settings: Settings, locked: StoreLocked, *, strangers: bool) -> dict[str, Any]:
    """Errors: `locked` where the daemon that answers owns another store."""
    with Client(settings.admin_socket) as client:
        if Path(client.status()["cache"]["directory"]) != settings.cache_dir:
            raise locked
        return client.collect(strangers=strangers)


def _print(rubbish: dict[str, Any], store: Path, *, dry_run: bool) -> None:
    items = rubbish["items"]
    strangers = rubbish["strangers"]
    failed = rubbish["failed"]

    for item in (*items, *strangers, *failed):
        click.echo(printable(f"{size(item['size_bytes']):>9}  {item['path']}  {item['reason']}"))

    done = "removed"
    if dry_run:
        done = "would remove"

    total = sum(item["size_bytes"] for item in items)
    left = ""
    if strangers:
        left_bytes = sum(item["size_bytes"] for item in strangers)
        left = f"; {len(strangers)} that are not the store's stay, {size(left_bytes)}"

    if failed:
        left += f"; {len(failed)} could not be removed"

    what = counted(len(items), "item")
    click.echo(printable(f"{done} {what}, {size(total)}{left}; store {store}"))
