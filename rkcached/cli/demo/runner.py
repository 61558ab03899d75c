"""`rkcached demo`: the real daemon on a small workspace, asked one question cold and warm.

The daemon is a child process, started as anybody would start it; this module only talks to its
socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rkcached.api import words
from rkcached.cli.client import Client
from rkcached.cli.demo.workspace import PROMPTS, prepare
from rkcached.cli.launcher import STOP_S, Daemon, Workspace, is_settled
from rkcached.errors import DaemonUnreachable

QUESTION = "In one sentence, what is your most important rule?"

_WARM = frozenset({"hit", "loaded"})
"""States of an answer from its cache; `loaded`: on a runtime that does not count reused tokens."""


def run_demo(directory: Path, model: Path | None, library: Path | None, *, once: bool) -> int:
    """Run it; returns the exit code: 0 if every warm answer came from its cache."""
    console = Console(highlight=False)
    root = _absolute(directory)
    findings = prepare(root, model and _absolute(model), library and _absolute(library))
    workspace = Workspace.at(root)
    for line in (f"workspace {root}", *findings):
        console.print(line, markup=False, soft_wrap=True)

    with _daemon(workspace, console) as daemon:
        status = _wait_until_settled(console, daemon)
        rows = []
        troubled = []
        for prompt in status["prompts"]:
            if prompt["state"] == "fresh":
                rows.append(_compare(workspace.socket, prompt))
            else:
                troubled.append(prompt)

        models = ", ".join(sorted({row["model"] for row in rows}))
        console.print(f"time to first token, one question to {models}", soft_wrap=True)
        console.print(_table(rows))

        for prompt in troubled:
            console.print(
                f"{prompt['model']}/{prompt['prompt']} is {prompt['state']}: {prompt['reason']}"
            )

        good = bool(rows) and not troubled and all(row["state"] in _WARM for row in rows)
        if not good:
            console.print("not every prompt cache was hit", style="bold red")
        if once:
            return 0 if good else 1

        _invite(console, workspace, status["prompts"])
        with contextlib.suppress(KeyboardInterrupt):
            daemon.process.wait()
            console.print("the daemon ended; its log is above", style="bold red")
            return 1

    console.print("stopped")
    return 0 if good else 1


def _absolute(path: Path) -> Path:
    """The path from the root, as the manifest has it; links stay."""
    return Path(os.path.abspath(path))  # noqa: PTH100


@contextlib.contextmanager
def _daemon(workspace: Workspace, console: Console) -> Iterator[Daemon]:
    """The daemon, with its log on standard error; above whatever is drawn at a terminal."""
    # SIGTERM ends the demo as Ctrl-C does, daemon included.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = None
    if console.is_terminal:
        log = subprocess.PIPE

    with contextlib.ExitStack() as stack:
        daemon = Daemon(workspace, log=log)
        relay = threading.Thread(
            target=_relay, args=(daemon.process.stderr or (), console), daemon=True
        )
        stack.callback(relay.join, STOP_S)
        stack.enter_context(daemon)
        relay.start()
        yield daemon


def _relay(log: Iterable[bytes], console: Console) -> None:
    """Print the daemon's log above whatever display goes on.

    Read to its end, for a full pipe would stop the daemon.
    """
    for line in log:
        with contextlib.suppress(OSError, SystemExit):  # nobody reads our output any more
            console.print(line.decode(errors="replace").rstrip("\n"), markup=False, soft_wrap=True)


def _wait_until_settled(console: Console, daemon: Daemon) -> dict[str, Any]:
    """Show the builds until none is left to do; returns the last status.

    Errors: DaemonUnreachable.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}
        for status in daemon.statuses(every_s=0.2):
            for prompt in status["prompts"]:
                name = words.name_of(prompt)
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=None, note="")
                _advance(progress, tasks[name], prompt)
            if is_settled(status):
                return status

    raise DaemonUnreachable("the daemon does not answer", hint="its log is above")


def _advance(progress: Progress, task: TaskID, prompt: dict[str, Any]) -> None:
    tokens = prompt.get("progress") or {}
    if prompt["state"] == "building" and tokens.get("total_tokens"):
        done = tokens["done_tokens"]
        total = tokens["total_tokens"]
        note = "proving it"
        if done < total:
            note = f"{done} of {total} tokens"
        progress.update(task, completed=done, total=total, note=note)
    elif prompt["state"] == "fresh":
        figures = prompt["artifact"]
        note = f"fresh, {figures['tokens']} tokens"
        progress.update(task, completed=figures["tokens"], total=figures["tokens"], note=note)
        progress.stop_task(task)
    else:
        progress.update(task, note=prompt["state"])


def _compare(socket: Path, prompt: dict[str, Any]) -> dict[str, Any]:
    """The same question without the cache and with it."""
    body = {
        "model": f"{prompt['model']}/{prompt['prompt']}",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
    }
    with Client(socket) as client:
        cold = client.chat({**body, "cache": False})
        warm = client.chat(body)
    return {
        "model": prompt["model"],
        "prompt": prompt["prompt"],
        "tokens": warm["usage"]["prompt_tokens"],
        "cold_ms": cold["rkcached"]["ttft_ms"],
        "warm_ms": warm["rkcached"]["ttft_ms"],
        "cached": warm["rkcached"]["cached_tokens"],
        "state": warm["rkcached"]["state"],
        "size": prompt["artifact"]["size_bytes"],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(pad_edge=False, box=None)
    for name in (
        "prompt",
        "tokens",
        "cold\nTTFT",
        "warm\nTTFT",
        "reduction",
        "cached\ntokens",
        "file\nsize",
    ):
        table.add_column(name, justify="left" if name == "prompt" else "right", no_wrap=True)

    for row in rows:
        table.add_row(
            row["prompt"],
            _counted(row["tokens"] or None),
            f"{row['cold_ms']:,.0f} ms",
            f"{row['warm_ms']:,.0f} ms",
            f"{(1 - row['warm_ms'] / row['cold_ms']) * 100:.0f} %",
            _counted(row["cached"]),
            words.size(row["size"]),
        )

    return table


def _counted(tokens: int | None) -> str:
    """A number of tokens; None where the runtime does not count them."""
    return "not measured" if tokens is None else str(tokens)


def _invite(console: Console, workspace: Workspace, prompts: list[dict[str, Any]]) -> None:
    console.print()
    console.print(
        f"Edit [bold]{workspace.root / PROMPTS[1]}[/bold] and save: its cache is rebuilt at once.",
        soft_wrap=True,
    )
    if prompts:
        ask = json.dumps(
            {
                "model": words.name_of(prompts[0]),
                "messages": [{"role": "user", "content": "May I open the roof?"}],
            }
        )
        console.print("Ask over the socket, from another terminal:")
        curl = (
            f"  curl -s --unix-socket {workspace.socket} http://localhost/v1/chat/completions -d "
            f"'{ask}'"
        )
        console.print(curl, soft_wrap=True, markup=False)

    program = Path(sys.argv[0])
    if program.name != "rkcached":  # started as a module
        program = Path("rkcached")

    console.print("Watch it, and measure more than one question:")
    for command in ("status --watch", "bench"):
        console.print(f"  {program} {command} -s {workspace.socket}", soft_wrap=True, markup=False)

    console.print("Ctrl-C ends the demo.")
