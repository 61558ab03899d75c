"""Reads a file that holds text, and explains in a sentence why one cannot be used."""

from __future__ import annotations

import codecs
import errno
import shlex
import stat
from pathlib import Path

from rkcached.errors import SourceError
from rkcached.host.access import refusal
from rkcached.host.regular import LeadsOut, read_regular

MAX_PROMPT_BYTES = 1 << 20
"""A prompt beyond this is a mistake: it is some 250,000 tokens."""

PROMPT = "prompt"
TOOLS = "file of tools"
"""Nouns for what a file is."""


def read_text(path: Path, noun: str = PROMPT, *, within: Path | None = None) -> str:
    """The text of a file. Errors: SourceError, with what is wrong and what to do.

    `noun` says what the file is. `within`: no link may lead out of this folder.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            hint = "name a file"
            if noun == PROMPT:
                hint += ", or use prompts_from with a pattern"
            raise SourceError(f"{path} is a directory", hint=hint)

        if not stat.S_ISREG(info.st_mode):
            raise SourceError(f"{path} is not a regular file", hint="name a text file")
        if info.st_size > MAX_PROMPT_BYTES:
            raise SourceError(
                f"{path} has {info.st_size:,} bytes, the limit is {MAX_PROMPT_BYTES:,}",
                hint=f"shorten the {noun}",
            )

        return _decode(path, read_regular(path, MAX_PROMPT_BYTES, within=within), noun)
    except LeadsOut as error:
        raise SourceError(
            f"{path} is a link that leads out of {within}",
            hint="copy the file into the folder, or set sources.follow_links: true in the manifest",
        ) from error
    except OSError as error:
        raise unusable(path, error, "file") from error


def _decode(path: Path, data: bytes, noun: str) -> str:
    """UTF-8 text without its byte order mark, and nothing that no text has. Errors: SourceError."""
    if b"\0" in data and not _other_encoding(data):
        raise SourceError(
            f"{path} contains a NUL byte at offset {data.index(0)}",
            hint=f"a {noun} is a UTF-8 text file, not a binary",
        )
    return utf8(path, data)


def utf8(path: Path, data: bytes) -> str:
    """The text in the file's data, without its byte order mark.

    Errors: SourceError, with what the file is instead.
    """
    if encoding := _other_encoding(data):
        file = shlex.quote(str(path))
        raise SourceError(
            f"{path} is {encoding}, not UTF-8",
            hint=f"convert it: `iconv -f {encoding} -t UTF-8 {file} > {file}.new "
            f"&& mv {file}.new {file}`",
        )

    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="save it as UTF-8 in the editor that wrote it, "
            "or convert it with iconv from the encoding it has",
        ) from error


def _other_encoding(data: bytes) -> str:
    """The encoding by a text's byte order mark, if it is not UTF-8; empty if there is no mark."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "UTF-32"),  # begins as UTF-16's does
        (codecs.BOM_UTF32_BE, "UTF-32"),
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
    ):
        if data.startswith(mark):
            return name

    return ""


def unusable(path: Path, error: OSError, noun: str) -> SourceError:
    """The error of a file that cannot be read. `noun` says what it is."""
    if (refused := refusal(path, error)) is not None:
        return SourceError(f"{path} cannot be read: {refused.reason}", hint=refused.hint)
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return SourceError(
                f"source missing: {path}", hint=f"put the {noun} there, or correct its path"
            )
        case _ if error.errno == errno.ELOOP:
            return SourceError(
                f"{path} cannot be read: it is a link that leads back to itself",
                hint="remove the link, or let it lead to a file",
            )
        case _:
            return SourceError(
                f"{path} cannot be read: {error.strerror or error}", hint="see the system's log"
            )
