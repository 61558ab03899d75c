"""`rkcached regenerate`: have the daemon build prompt caches again, with a progress line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status

from rkcached.api import words
from rkcached.cli import exit_codes, names, output
from rkcached.cli.client import Client
from rkcached.errors import RequestError, UsageError
from rkcached.host.settings import Settings

if TYPE_CHECKING:
    from rkcached.cli import forms

_REFRESH_S = 0.25


def run(settings: Settings, prompts: Sequence[str], *, everything: bool, want_json: bool) -> int:
    if not prompts and not everything:
        raise UsageError("nothing to regenerate", hint="name MODEL or MODEL/PROMPT, or use --all")

    declared = declared_prompts(settings.socket)
    wanted: Sequence[tuple[str, str]] = declared
    if not everything:
        wanted = names.matching(prompts, declared)

    console = output.console(quiet=want_json)
    answers, refusals = regenerate(settings.socket, settings.admin_socket, wanted, console)
    if want_json:
        regenerated: forms.Regenerated = {
            "format": 1,
            "built": answers,
            "errors": output.complaints_data(refusals),
        }
        output.print_json(regenerated)
    else:
        for refusal in refusals:
            exit_codes.complain(refusal)

    if refusals:
        return exit_codes.exit_code(refusals[0])
    return os.EX_OK


def declared_prompts(socket: Path) -> list[tuple[str, str]]:
    """Every prompt that the daemon's manifest declares, in its order. Errors: DaemonUnreachable."""
    with Client(socket) as client:
        return [
            (p["model"], p["prompt"]) for p in client.status()["prompts"] if p["state"] != "orphan"
        ]


def regenerate(
    socket: Path, admin_socket: Path, wanted: Sequence[tuple[str, str]], console: Console
) -> tuple[list[dict[str, Any]], list[RequestError]]:
    """Build each; returns the daemon's answers and its refusals, which do not stop the others.

    Errors: DaemonUnreachable.
    """
    answers = []
    refusals = []
    with ThreadPoolExecutor(1) as pool:
        for number, (model, prompt) in enumerate(wanted, 1):
            name = f"[{number}/{len(wanted)}] {model}/{prompt}"
            future = pool.submit(_one, admin_socket, model, prompt)
            if console.is_terminal:
                with console.status(_escaped(name)) as line:
                    _follow(socket, future, line, name, (model, prompt))

            try:
                answer = future.result()
            except RequestError as error:
                console.print(f"{name} failed", markup=False)
                refusals.append(error)
                continue

            seconds = answer["build_ms"] / 1000
            size = words.size(answer["size_bytes"])
            console.print(
                f"{name} {answer['tokens']} tokens, {size} in {seconds:.1f} s", markup=False
            )
            answers.append(answer)

    return answers, refusals


def _one(socket: Path, model: str, prompt: str) -> dict[str, Any]:
    with Client(socket) as client:
        return client.regenerate(model, prompt)


def _follow(
    socket: Path, future: Future[dict[str, Any]], line: Status, name: str, key: tuple[str, str]
) -> None:
    """Show how far the daemon is, until the build is over."""
    while not wait([future], timeout=_REFRESH_S).done:
        with Client(socket) as client:
            prompts = client.status()["prompts"]

        for prompt in prompts:
            progress = prompt.get("progress")
            if (prompt["model"], prompt["prompt"]) != key or not progress:
                continue
            done = progress["done_tokens"]
            total = progress["total_tokens"]
            if total:
                line.update(_escaped(f"{name} {done} of {total} tokens"))


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
