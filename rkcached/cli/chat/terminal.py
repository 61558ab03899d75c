"""A conversation at a terminal: lines with history, and the commands that begin with a slash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from rkcached.cli.chat.conversation import Conversation
from rkcached.cli.client import Client
from rkcached.errors import RkcachedError, SourceError, StoreError, UsageError, printable
from rkcached.host import disk
from rkcached.sources.names import hint_for

_PRIVATE: Final = 0o600


def talk(socket: Path, model: str | None, options: dict[str, Any]) -> None:
    """Talk until end of file (Ctrl-D) or `/quit`. A refused question is reported and forgotten.

    Without `model` one is chosen from a list. Errors: DaemonUnreachable; SourceError.
    """
    Terminal(socket, options).talk(model)


class Terminal:
    def __init__(self, socket: Path, options: dict[str, Any]) -> None:
        self._socket = socket
        self._names: list[str] = []
        self._conversation = Conversation(socket, "", options)
        # Many terminals, such as serial consoles, do not tell where their cursor is.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self._lines: PromptSession[str] = PromptSession(
            history=_history(), completer=_Commands(self._known), complete_while_typing=False
        )

    def talk(self, model: str | None) -> None:
        self._refresh_names()
        if model is not None:
            self._conversation.model = self._check(model)
        elif not self._choose():
            return

        click.secho(
            f"{printable(self._conversation.model)}. /help lists commands, Ctrl-C ends an answer, "
            "Ctrl-D the conversation.",
            dim=True,
            err=True,
        )
        for line in self._typed("> "):
            try:
                if line.startswith("/"):
                    if not self._obey(line):
                        return
                else:
                    self._conversation.ask(line)
            except RkcachedError as error:
                hint = f" ({error.hint})" if error.hint else ""
                click.secho(printable(f"error: {error.message}{hint}"), fg="red", err=True)

    # Lines

    def _typed(self, prompt: str) -> Iterator[str]:
        """The lines that are typed; Ctrl-C drops one that has begun."""
        while True:
            try:
                line = self._lines.prompt(prompt).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line:
                yield line

    def _known(self) -> list[str]:
        return self._names

    def _refresh_names(self) -> None:
        with Client(self._socket) as client:
            names = [model["id"] for model in client.request("GET", "/v1/models")["data"]]
            models = client.status()["models"]
        unable = {m["name"] for m in models if m["embedding"] or m["rerank"] or m["trouble"]}
        self._names = [name for name in names if name.partition("/")[0] not in unable]

    def _choose(self) -> bool:
        """Show what can be asked, and have one chosen; False if the user leaves instead.

        Errors: SourceError where nothing can be.
        """
        if not self._names:
            raise SourceError(
                "the daemon has no model that could be asked", hint="see `rkcached status`"
            )
        if len(self._names) == 1:
            self._conversation.model = self._names[0]
            return True

        self._show_names()
        for line in self._typed("model or number: "):
            try:
                self._conversation.model = self._check(line)
            except SourceError as error:
                click.secho(printable(f"{error.message} ({error.hint})"), fg="red", err=True)
                continue
            return True
        return False

    def _show_names(self) -> None:
        for number, name in enumerate(self._names, 1):
            click.echo(printable(f"{number:3}  {name}"))

    def _check(self, name: str) -> str:
        """The name, or the one of this number in the list. Errors: SourceError for another."""
        if name.isdecimal() and 0 < int(name) <= len(self._names):
            return self._names[int(name) - 1]
        if name not in self._names:
            self._refresh_names()
        if name not in self._names:
            raise SourceError(f"there is no {name!r}", hint=hint_for(name, self._names))
        return name

    # Commands

    def _obey(self, line: str) -> bool:
        """Carry out a command; False if it ends the conversation. Errors: RkcachedError."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit", "/bye"):
            return False
        if word not in self.COMMANDS:
            raise UsageError(f"there is no command {word!r}", hint="/help lists them")
        self.COMMANDS[word][1](self, rest.strip())
        return True

    def _help(self, _: str) -> None:
        for name, (words, _method) in self.COMMANDS.items():
            click.echo(f"  {name:<10}{words}")
        click.echo(f"  {'/quit':<10}end the conversation")

    def _model(self, name: str) -> None:
        if not name:
            self._refresh_names()
            self._show_names()
            return
        self._conversation.model = self._check(name)
        self._say(f"{self._conversation.model} answers from now on")

    def _prompt(self, name: str) -> None:
        model = self._conversation.model.partition("/")[0]
        if not name:
            self._refresh_names()
            own = [known for known in self._names if known.startswith(f"{model}/")]
            self._say("\n".join(own) if own else f"{model} has no prompt")
            return
        named = name if name.startswith(f"{model}/") else f"{model}/{name}"
        self._conversation.model = self._check(model if name == "-" else named)
        self._say(f"{self._conversation.model} answers from now on")

    def _system(self, text: str) -> None:
        self._conversation.system = text
        self._say("this is the system message now" if text else "your system message is removed")

    def _clear(self, _: str) -> None:
        self._conversation.turns.clear()
        self._say("the conversation begins anew")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("no file is named", hint="/save FILE.md or /save FILE.json")
        path = Path(name).expanduser()
        text = self._as_json() if path.suffix == ".json" else self._as_markdown()
        try:
            disk.write_new(path, text.encode(errors="replace"), _PRIVATE)
        except FileExistsError:
            raise StoreError(
                f"{path} exists already, and is not overwritten", hint="choose another name"
            ) from None
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {error.strerror}", hint="choose another place"
            ) from error
        self._say(f"wrote {path}")

    def _as_json(self) -> str:
        document = {
            "model": self._answering()[-1],
            "messages": self._conversation.messages(),
        }
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"

    def _as_markdown(self) -> str:
        models = self._answering()
        parts = [f"# {', '.join(models)}"]
        for message in self._conversation.messages():
            who = message["role"]
            if "model" in message and len(models) > 1:
                who = f"{who}: {message['model']}"
            parts.append(f"## {who}\n\n{message['content']}")
        return "\n\n".join(parts) + "\n"

    def _answering(self) -> list[str]:
        """The models that gave the answers so far, the last one last; if none did, the one now."""
        answered = [turn["model"] for turn in self._conversation.turns if "model" in turn]
        latest_first = dict.fromkeys(reversed(answered))
        return [*reversed(latest_first)] or [self._conversation.model]

    def _say(self, text: str) -> None:
        for line in text.splitlines():
            click.secho(printable(line), dim=True, err=True)

    COMMANDS: ClassVar[dict[str, tuple[str, Callable[[Terminal, str], None]]]] = {
        "/help": ("this list", _help),
        "/model": ("NAME: have another model or prompt answer; without NAME list them", _model),
        "/prompt": ("NAME: use another prompt of the model; - for none", _prompt),
        "/system": ("TEXT: a system message of your own; without TEXT none", _system),
        "/clear": ("forget the conversation", _clear),
        "/save": ("FILE: write the conversation, as Markdown, or as JSON to a .json file", _save),
    }
    """By name: the words for the list, and the method."""


class _Commands(Completer):
    """Completes commands, and after `/model` and `/prompt` the names."""

    def __init__(self, names: Callable[[], list[str]]) -> None:
        self._names = names

    def get_completions(self, document: Document, complete_event: object) -> Iterator[Completion]:
        del complete_event
        text = document.text_before_cursor
        word, blank, rest = text.partition(" ")
        if not word.startswith("/"):
            return

        options: list[str] = [*Terminal.COMMANDS, "/quit"]
        begun = word
        if blank and word in ("/model", "/prompt"):
            begun = rest
            options = self._names()
            if word == "/prompt":
                options = sorted({name.partition("/")[2] for name in options if "/" in name})
        elif blank:
            return
        for option in options:
            if option.startswith(begun):
                yield Completion(option, start_position=-len(begun))


def _history() -> History:
    """The lines of earlier conversations, which only their user can read."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111
    path = Path(home, "rkcached", "chat_history")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=_PRIVATE)
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
            return InMemoryHistory()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
