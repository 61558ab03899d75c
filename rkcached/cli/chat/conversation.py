"""A conversation: its messages, and how an answer is asked for and shown, with figures below it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkcached.cli import output
from rkcached.cli.client import Client
from rkcached.errors import harmless, printable

if TYPE_CHECKING:
    from rkcached.cli import forms


class Conversation:
    """The model that answers, the messages so far, and how to ask the next."""

    def __init__(self, socket: Path, model: str, options: dict[str, Any]) -> None:
        """`options`: further fields of each request."""
        self._socket = socket
        self.model = model
        """MODEL or MODEL/PROMPT."""
        self.system = ""
        """A system message of one's own."""
        self.turns: list[dict[str, str]] = []
        """Questions and answers; an answer also has the model that gave it."""
        self._options = options

    def messages(self) -> list[dict[str, str]]:
        """All of them, with the system message. An answer has the model that gave it."""
        own = [{"role": "system", "content": self.system}] if self.system else []
        return [*own, *self.turns]

    def ask_for_json(self, question: str) -> None:
        """Print the answer's document. Errors: DaemonUnreachable, RequestError."""
        with Client(self._socket) as client:
            answered: forms.Answered = {"format": 1, "answer": client.chat(self._body(question))}
        output.print_json(answered)

    def ask(self, question: str) -> bool:
        """Print the answer as it comes, and remember both. False if Ctrl-C ended it.

        What came of it is then remembered. Errors: DaemonUnreachable, RequestError; nothing is
        remembered.
        """
        shown = _Shown()
        report: dict[str, Any] = {}
        usage: dict[str, Any] = {}
        was_ended = False
        try:
            with contextlib.closing(self._chunks(question)) as chunks:
                for chunk in chunks:
                    report = chunk.get("rkcached", report)
                    usage = chunk.get("usage", usage)
                    for choice in chunk["choices"]:
                        shown.add(choice["delta"])
        except KeyboardInterrupt:
            was_ended = True

        click.echo()
        figures = "[ended]" if was_ended else _measured(report, usage, shown.thought_ms)
        click.secho(figures, dim=True, err=True)
        if shown.content or not was_ended:
            self.turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": shown.content, "model": self.model},
            ]
        return not was_ended

    def _chunks(self, question: str) -> Generator[dict[str, Any]]:
        with Client(self._socket) as client:
            body = self._body(question)
            yield from client.stream({**body, "stream_options": {"include_usage": True}})

    def _body(self, question: str) -> dict[str, Any]:
        messages = [*self.messages(), {"role": "user", "content": question}]
        messages = [
            {key: value for key, value in message.items() if key != "model"} for message in messages
        ]
        return {**self._options, "model": self.model, "messages": messages}


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
        reuse = f"{cached:,} of {total:,} prompt tokens reused, "
    thought = ""
    if thought_ms is not None:
        thought = f"the answer after {thought_ms:,.0f} ms, "
    return (
        f"[{cache}{reason}: first token after {report['ttft_ms']:,.0f} ms, {thought}{reuse}"
        f"{report['decode_tokens_per_s']:.0f} tokens/s]"
    )
