"""`rkcached load`, `unload` and `ps`: the models in memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from rkcached.api import words
from rkcached.cli import output
from rkcached.cli.client import Client
from rkcached.errors import printable
from rkcached.host.settings import Settings

if TYPE_CHECKING:
    from rkcached.cli import forms


def load(settings: Settings, model: str, *, want_json: bool) -> int:
    """Load a model now. Errors: DaemonUnreachable, RequestError."""
    with output.progress_line() as report, Client(settings.admin_socket) as client:
        report(f"loading {model}")
        answer = client.request("POST", "/v1/models/load", {"model": model})
    return _print(answer, f"{model} is loaded, after {answer['took_ms'] / 1000:.1f} s", want_json)


def unload(settings: Settings, model: str, *, want_json: bool) -> int:
    """Unload a model, when its answer is over. Errors: DaemonUnreachable, RequestError."""
    with output.progress_line() as report, Client(settings.admin_socket) as client:
        report(f"unloading {model}")
        answer = client.request("POST", "/v1/models/unload", {"model": model})
    return _print(answer, f"{model} is unloaded; the next request loads it again", want_json)


def _print(answer: dict[str, Any], sentence: str, want_json: bool) -> int:
    if want_json:
        changed: forms.ModelChanged = {"format": 1, "model": answer}
        output.print_json(changed)
    else:
        click.echo(printable(sentence))
    return os.EX_OK


def ps(settings: Settings, *, want_json: bool) -> int:
    """Show the models in memory. Errors: DaemonUnreachable, RequestError."""
    with Client(settings.socket) as client:
        loaded = client.request("GET", "/v1/models/loaded")["data"]
    if want_json:
        models: forms.LoadedModels = {"format": 1, "models": loaded}
        output.print_json(models)
        return os.EX_OK
    if not loaded:
        click.echo("no model is loaded; a request or `rkcached load MODEL` loads one")
        return os.EX_OK

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("model", "state", "for", "memory", "CPU time", "pid"):
        table.add_column(name, justify="left" if name in ("model", "state") else "right")
    for model in loaded:
        table.add_row(
            printable(model["name"]),
            model["worker"],
            words.duration(model["state_s"] or 0.0),
            "-" if model["memory_bytes"] is None else words.size(model["memory_bytes"]),
            "-" if model["cpu_s"] is None else words.duration(model["cpu_s"]),
            str(model["pid"]),
        )
    output.console().print(table)
    return os.EX_OK
