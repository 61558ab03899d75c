"""`rkcached prompts import`: the prompts that recorded requests begin with, as files.

It reads bodies of chat completions, one a line, and groups those that begin alike: with the same
system message and the same tools, for the same model. What came often enough is worth a prompt
cache. No daemon is asked, and no file is overwritten.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import click
import pydantic_core
import yaml

from rkcached.cli import output
from rkcached.errors import SourceError, StoreError, counted, printable
from rkcached.host.settings import Settings
from rkcached.messages.tools import ToolSet, parse_tools
from rkcached.sources.manifest import RESERVED_PROMPT
from rkcached.sources.problems import NAME
from rkcached.sources.text_files import MAX_PROMPT_BYTES

if TYPE_CHECKING:
    from rkcached.cli import forms

MAX_LINE_BYTES: Final = 16 << 20
"""A request beyond this is none that the daemon would take."""

_WORDS_IN_NAME: Final = 5
_SHOWN_SKIPPED: Final = 5


class Beginning(NamedTuple):
    """The part that requests have in common, and that a prompt cache can hold."""

    model: str
    text: str
    tools: ToolSet | None


@dataclass(slots=True)
class Recording:
    """The requests of a file."""

    beginnings: Counter[Beginning] = field(default_factory=Counter)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """The number of each line that is of no use, and the reason."""
    requests: int = 0


class Imported(NamedTuple):
    """A prompt that was written."""

    name: str
    requests: int
    beginning: Beginning
    text_file: Path
    tools_file: Path | None


def run(settings: Settings, file: Path, folder: Path, *, at_least: int, want_json: bool) -> int:
    """Write the prompts that begin at least so many of the file's requests into `folder`."""
    recording = read_requests(file)
    imported: list[Imported] = []
    for beginning, requests in recording.beginnings.most_common():
        if requests >= at_least:
            imported.append(_write(beginning, requests, folder, imported))

    base = Path(os.path.abspath(settings.manifest)).parent  # noqa: PTH100 - resolve() reads links
    manifest = _manifest_part(imported, base)
    if want_json:
        output.print_json(_data(recording, imported, manifest))
    else:
        _print(recording, imported, manifest, at_least=at_least)

    if recording.requests == 0:
        return os.EX_DATAERR
    return os.EX_OK


# Reading


def read_requests(file: Path) -> Recording:
    """The requests of a file that has a JSON object in each line. Errors: SourceError."""
    recording = Recording()
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(_lines(lines), 1):
                if line.isspace() and len(line) <= MAX_LINE_BYTES:
                    continue
                try:
                    beginning = _beginning(line)
                except _Useless as useless:
                    recording.skipped.append((number, str(useless)))
                    recording.requests += useless.is_request
                else:
                    recording.beginnings[beginning] += 1
                    recording.requests += 1
    except OSError as error:
        raise SourceError(
            f"{file} cannot be read: {error.strerror}",
            hint="name a file that has a request in each line",
        ) from error

    return recording


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long only so much that it can be told."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line


class _Useless(Exception):
    """A line that begins with nothing that a prompt cache could hold; the message is the reason."""

    def __init__(self, reason: str, *, is_request: bool = False) -> None:
        super().__init__(reason)
        self.is_request = is_request


def _beginning(line: bytes) -> Beginning:
    """Errors: _Useless."""
    if len(line) > MAX_LINE_BYTES:
        raise _Useless(f"it has more than {MAX_LINE_BYTES:,} bytes")
    try:
        record = pydantic_core.from_json(line.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise _Useless(f"it is not JSON: {error}") from None

    body = record
    if isinstance(record, dict) and isinstance(record.get("body"), dict):
        body = record["body"]  # OpenAI's batch format
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages:
        raise _Useless("it is no request for a chat completion: it has no messages")

    text = _system_text(messages[0]).rstrip("\r\n")
    if not text.strip():
        raise _Useless("it does not begin with a system message", is_request=True)
    if "\0" in text or text[0] == "\ufeff" or len(_content(text)) > MAX_PROMPT_BYTES:
        raise _Useless(
            "its system message cannot be a prompt: it has a NUL character, begins with a byte "
            f"order mark, or has more than {MAX_PROMPT_BYTES:,} bytes",
            is_request=True,
        )

    return Beginning(model=str(body.get("model", "")), text=text, tools=_tools(body))


def _system_text(message: object) -> str:
    """Empty for a message that is none of the system's, or has no text."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
        return ""
    content = message.get("content")
    if isinstance(content, str):
        return content

    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _tools(body: Mapping[str, Any]) -> ToolSet | None:
    """The tools that the model is shown. Errors: _Useless."""
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return None
    try:
        found = parse_tools(pydantic_core.to_json(tools).decode(), name="tools")
    except SourceError as error:
        raise _Useless(error.message, is_request=True) from error

    if len(_tools_content(found)) > MAX_PROMPT_BYTES:
        reason = f"a file of its tools would have more than {MAX_PROMPT_BYTES:,} bytes"
        raise _Useless(reason, is_request=True)
    return found


# Writing


def _write(beginning: Beginning, requests: int, folder: Path, others: list[Imported]) -> Imported:
    """Write the files of a prompt, under the first name that is free. Errors: StoreError."""
    taken = {RESERVED_PROMPT, *(other.name for other in others)}
    tools = beginning.tools
    for name in _names(beginning.text):
        contents = {folder / f"{name}.md": _content(beginning.text)}
        tools_file = None
        if tools is not None:
            tools_file = folder / f"{name}.tools.json"
            contents[tools_file] = _tools_content(tools)
        if name in taken or not all(_is_free(file, data) for file, data in contents.items()):
            continue

        for file, data in contents.items():
            _create(file, data)
        return Imported(name, requests, beginning, folder / f"{name}.md", tools_file)

    raise AssertionError("there is always another number")


def _content(text: str) -> bytes:
    """The file of a prompt with this text."""
    return f"{text}\n".encode()


def _tools_content(tools: ToolSet) -> bytes:
    """The file of these tools: with line breaks, if it is not too large then."""
    content = tools.for_people().encode()
    return content if len(content) <= MAX_PROMPT_BYTES else f"{tools.text}\n".encode()


def _names(text: str) -> Iterator[str]:
    """Names for a prompt, made of the first words of its text."""
    words = re.findall(r"[a-z0-9]+", text.lower())[:_WORDS_IN_NAME]
    name = "-".join(words)[:48] or "prompt"
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _is_free(file: Path, content: bytes) -> bool:
    """Whether nothing has this name, or a regular file with just this content.

    Nothing else is opened: a device has no end. Errors: StoreError.
    """
    try:
        info = file.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size != len(content):
            return False
        return file.read_bytes() == content
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _not_written(file, error) from error


def _create(file: Path, content: bytes) -> None:
    """Write a file, unless it is there with this content. Errors: StoreError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as opened:
            opened.write(content)
    except OSError as error:
        if not (isinstance(error, FileExistsError) and _is_free(file, content) and file.exists()):
            raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{file} cannot be written: {error.strerror}", hint="name another folder with --to"
    )


# Showing


def _manifest_part(imported: list[Imported], base: Path) -> str:
    """The lines for a manifest in the folder `base`."""
    models: dict[str, dict[str, Any]] = {}
    for prompt in imported:
        entry: dict[str, Any] = {"files": _path(prompt.text_file, base)}
        if prompt.tools_file is not None:
            entry["tools"] = _path(prompt.tools_file, base)
        model = models.setdefault(_model_name(prompt.beginning.model), {"prompts": {}})
        model["prompts"][prompt.name] = entry

    if not models:
        return ""
    return yaml.safe_dump({"models": models}, sort_keys=False, allow_unicode=True, width=100)


def _model_name(named: str) -> str:
    return named if NAME.fullmatch(named) else "MODEL"


def _path(file: Path, base: Path) -> str:
    """As a manifest in `base` names it."""
    whole = Path(os.path.abspath(file))  # noqa: PTH100 - resolve() reads links
    return str(whole.relative_to(base) if whole.is_relative_to(base) else whole)


def _data(recording: Recording, imported: list[Imported], manifest: str) -> forms.Imported:
    prompts: list[forms.ImportedPrompt] = []
    for prompt in imported:
        tools = prompt.beginning.tools
        prompts.append(
            {
                "model": prompt.beginning.model,
                "name": prompt.name,
                "requests": prompt.requests,
                "characters": len(prompt.beginning.text),
                "tools": list(tools.names) if tools is not None else [],
                "text_file": str(prompt.text_file),
                "tools_file": str(prompt.tools_file) if prompt.tools_file is not None else None,
            }
        )

    return {
        "format": 1,
        "requests": recording.requests,
        "served": sum(prompt.requests for prompt in imported),
        "prompts": prompts,
        "skipped": [{"line": line, "reason": reason} for line, reason in recording.skipped],
        "manifest": manifest,
    }


def _print(recording: Recording, imported: list[Imported], manifest: str, *, at_least: int) -> None:
    """The lines for the manifest go to standard output, all else is a comment there."""
    served = sum(prompt.requests for prompt in imported)
    requests = counted(recording.requests, "request")
    if imported:
        click.echo(f"# {served} of {requests} would have been served from these prompts:")
    else:
        click.echo(
            f"# No prompt was made: of {requests}, fewer than {at_least} have the same system "
            "message and tools."
        )

    for prompt in imported:
        tools = prompt.beginning.tools
        shown = "no tools" if tools is None else counted(len(tools.names), "tool")
        line = f"{prompt.name}: {counted(prompt.requests, 'request')}, {shown}"
        click.echo(printable(f"#   {line}"))

    if imported:
        click.echo("# Put this into the manifest, under the model that is to answer them:")
        click.echo(manifest, nl=False)

    for number, reason in recording.skipped[:_SHOWN_SKIPPED]:
        click.echo(printable(f"line {number} is left out: {reason}"), err=True)
    more = len(recording.skipped) - _SHOWN_SKIPPED
    if more > 0:
        click.echo(f"{counted(more, 'more line')} left out; --json names each", err=True)
