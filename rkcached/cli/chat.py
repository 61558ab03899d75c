"""`rkcached chat`: one question or a conversation, streamed, with figures under each answer."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from rkcached.cli import output
from rkcached.cli.client import Client
from rkcached.errors import RkcachedError, UsageError, harmless, printable
from rkcached.host.settings import Settings


def run(
    settings: Settings,
    model: str,
    message: str | None,
    *,
    max_tokens: int | None,
    cold: bool,
    want_json: bool,
) -> int:
    options: dict[str, Any] = {"model": model}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if cold:
        options["cache"] = False

    conversation = Conversation(settings.socket, options, want_json=want_json)

    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise UsageError(
                "there is no question", hint="give it as an argument or on standard input"
            )

    if message is not None:
        conversation.ask(message)
    else:
        conversation.talk()

    return os.EX_OK


class Conversation:
    """Messages so far, and how to ask the next."""

    def __init__(self, socket: Path, options: dict[str, Any], *, want_json: bool) -> None:
        self._socket = socket
        self._options = options
        self._want_json = want_json
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> None:
        """Ask, print the answer as it comes, and remember both.

        Errors: DaemonUnreachable, RequestError.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        body = {**self._options, "messages": messages}
        with Client(self._socket) as client:
            if self._want_json:
                output.print_json(client.chat(body))
                return

            shown = _Shown()
            report: dict[str, Any] = {}
            usage: dict[str, Any] = {}

            for chunk in client.stream({**body, "stream_options": {"include_usage": True}}):
                report = chunk.get("rkcached", report)
                usage = chunk.get("usage", usage)
                for choice in chunk["choices"]:
                    shown.add(choice["delta"])

        click.echo()
        click.secho(_measured(report, usage, shown.thought_ms), dim=True, err=True)
        self._messages = [*messages, {"role": "assistant", "content": shown.content}]

    def talk(self) -> None:
        """A conversation at the terminal, until end of file (Ctrl-D).

        A refused question is reported and forgotten.
        """
        click.secho("Ctrl-D ends the conversation.", dim=True, err=True)
        while True:
            try:
                question = click.prompt(">", prompt_suffix=" ", err=True).strip()
            except click.Abort:
                click.echo(err=True)
                return

            try:
                self.ask(question)
            except RkcachedError as error:
                click.secho(f"error: {error.message}", fg="red", err=True)


class _Shown:
    """An answer on the screen: the reasoning dim, then the content, then calls."""

    def __init__(self) -> None:
        self.content = ""
        self.thought_ms: float | None = None
        """From the question to the first piece after the reasoning; None if there was none."""
        self._asked = time.monotonic()
        self._is_reasoning = False

    def add(self, delta: dict[str, Any]) -> None:
        if reasoning := delta.get("reasoning_content"):
            self._is_reasoning = True
            click.secho(harmless(reasoning), dim=True, nl=False)

        text = delta.get("content") or ""
        calls = delta.get("tool_calls", ())
        if self._is_reasoning and (text or calls):
            self._is_reasoning = False
            self.thought_ms = (time.monotonic() - self._asked) * 1000
            click.echo("\n")

        self.content += text
        click.echo(harmless(text), nl=False)
        for call in calls:
            if self.content:
                click.echo()
            click.secho(_shown(call["function"]), dim=True)


def _shown(function: dict[str, str]) -> str:
    """A call of a tool that the prompt declares, as a line. Nobody here can carry it out."""
    return printable(f"[the model calls {function['name']} with {function['arguments']}]")


def _measured(report: dict[str, Any], usage: dict[str, Any], thought_ms: float | None) -> str:
    """The figures under an answer. `thought_ms`: until the reasoning was over, if there was any."""
    cache = f"{report['state']} on {report['cache']}" if report["cache"] else report["state"]
    reason = ""
    if report["reason"]:
        reason = f" ({report['reason']})"

    cached = report["cached_tokens"]
    total = usage["prompt_tokens"]
    reuse = ""
    if cached is not None:
        reuse = f"{cached} of {total} prompt tokens reused, "
    thought = ""
    if thought_ms is not None:
        thought = f"the answer after {thought_ms:.0f} ms, "
    return (
        f"[{cache}{reason}: first token after {report['ttft_ms']:.0f} ms, {thought}{reuse}"
        f"{report['decode_tokens_per_s']:.0f} tokens/s]"
    )
