"""`rkcached inspect`: what a prompt cache file is, and whether the sidecar beside it matches.

Reads files from anywhere and believes nothing in them: each count is compared with the file's size
before it is used, and nothing that could block is opened. `engines.cache_headers` has the formats.
Of llama.cpp's values, the ids are all, or in its newer server: -1, 1, n_tokens, ids, and what is
not text.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec
from rich.console import Console
from rich.text import Text

from rkcached.api import words
from rkcached.cli import output
from rkcached.engines.cache_headers import (
    MEMORY,
    MEMORY_MAGIC,
    RKLLM_VERSION,
    SEQUENCE_MAGIC,
    SESSION_MAGIC,
    WORDS,
)
from rkcached.errors import FormatError, SourceError
from rkcached.sources.problems import NAME
from rkcached.sources.records import Key
from rkcached.store.sidecar import Sidecar, names_artifact, parse_sidecar

if TYPE_CHECKING:
    from rkcached.cli import forms

UNKNOWN = "not a prompt cache that rkcached knows"

# Beyond the context of any model, so that a damaged count is not read.
_MAX_TOKENS: Final = 1 << 22
_MAX_ID: Final = 1 << 24
_MAX_SIDECAR_BYTES: Final = 1 << 20
_SHOWN_IDS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """The content of a prompt cache's header."""

    engine: str
    form: str
    tokens: array[int] | None
    """None where they are packed in a way that is not known."""


def run(file: Path, *, want_json: bool) -> int:
    data = inspect(file)
    if want_json:
        output.print_json(data)
    else:
        print_inspection(output.console(), data)

    if data["problem"]:
        return os.EX_DATAERR
    return os.EX_OK


def inspect(path: Path) -> forms.Inspected:
    """Inspect `path`, or the artifact that it is the sidecar or the text of.

    Blocking; hashes the file.

    `problem` is empty unless the file or its sidecar is damaged, or they do not belong together.
    Errors: SourceError when it cannot be read; FormatError when it is no prompt cache, or one that
    was cut off.
    """
    fd, _ = _open(path)
    os.close(fd)
    record = _record_beside(path)
    artifact = path

    if isinstance(record, Sidecar) and path.name in {
        f"{record.prompt}.json",
        f"{record.prompt}.bin",
    }:
        artifact = path.with_name(record.artifact)
        if artifact != path and not os.path.lexists(artifact):
            raise FormatError(
                f"{path} belongs to {record.model}/{record.prompt}, whose prompt cache "
                f"{record.artifact} is missing",
                hint="copy the prompt cache, too, or let the daemon build it again",
            )
    elif path.suffix == ".json" and isinstance(record, str):
        raise FormatError(f"{path} is {UNKNOWN}, nor the sidecar of one: {record}")

    fd, size = _open(artifact)
    try:
        content = _read_content(artifact, fd, size)
        ids = content.tokens
        count = None
        data = None
        if ids is not None:
            count = len(ids)
            data = _tokens_data(ids)

        sidecar, problem = _compare(artifact, fd, size, count, record)
        return {
            "format": 1,
            "file": _shown(artifact),
            "given": _shown(path),
            "engine": content.engine,
            "file_format": content.form,
            "size_bytes": size,
            "tokens": data,
            "sidecar": sidecar,
            "problem": problem,
        }
    finally:
        os.close(fd)


def _tokens_data(ids: array[int]) -> forms.Tokens:
    return {"count": len(ids), "first": list(ids[:_SHOWN_IDS]), "last": list(ids[-_SHOWN_IDS:])}


def print_inspection(console: Console, inspected: forms.Inspected) -> None:
    data: dict[str, Any] = words.printable_all(inspected)
    tokens = data["tokens"]
    sidecar = data["sidecar"]
    console.print(Text(f"{data['file']}: a prompt cache of {data['file_format']}", style="bold"))
    count = "an unknown number of tokens"
    if tokens:
        count = f"{tokens['count']:,} tokens"

    console.print(
        Text(f"  {count}, {words.size(data['size_bytes'])} ({data['size_bytes']:,} bytes)")
    )
    if tokens:
        rest = tokens["count"] - len(tokens["first"])
        if rest > _SHOWN_IDS:
            shown = [*tokens["first"], "...", *tokens["last"]]
        else:  # the first and the last ids overlap
            shown = [*tokens["first"], *tokens["last"][_SHOWN_IDS - rest :]]
        ids = " ".join(map(str, shown))
        console.print(Text(f"  token ids {ids}", style="dim"))

    if sidecar:
        built = words.when(sidecar["built_at"])
        console.print(Text(f"  artifact of {sidecar['model']}/{sidecar['prompt']}, built {built}"))
        console.print(Text(f"  fingerprint {sidecar['fingerprint']}", style="dim"))

    if data["problem"]:
        console.print(Text(f"  {data['problem']}", style="red"))
    elif sidecar:
        console.print(Text("  matches its sidecar: size, SHA-256, number of tokens", style="green"))
    else:
        console.print(Text("  no sidecar beside it: it belongs to no artifact"))


def _open(path: Path) -> tuple[int, int]:
    """Descriptor and size of a regular file. Errors: SourceError."""
    try:
        if not stat.S_ISREG(
            kind := path.stat().st_mode
        ):  # opening a pipe would wait for its writer
            what = "not a regular file"
            if stat.S_ISDIR(kind):
                what = "a directory"
            raise SourceError(
                f"{path} is {what}", hint="name a prompt cache, its sidecar or its text"
            )

        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return fd, os.fstat(fd).st_size
    except FileNotFoundError as error:
        raise SourceError(
            f"there is no file {path}", hint="`rkcached plan` lists what is declared"
        ) from error
    except (OSError, ValueError) as error:
        reason: str | None = "no file can have this name"
        if isinstance(error, OSError):
            reason = error.strerror
        hint = ""
        if _is_refusal(error):
            hint = "prompt caches are private: use sudo"
        raise SourceError(f"{path} cannot be read: {reason}", hint=hint) from error


def _shown(path: Path) -> str:
    """The path as text that any terminal and JSON can take: a name need not be UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM}


def _read(fd: int, length: int, offset: int = 0) -> bytes:
    """Up to `length` bytes; fewer where the file ends.

    Errors: SourceError when the disk refuses.
    """
    data = b""
    try:
        while len(data) < length and (
            piece := os.pread(fd, length - len(data), offset + len(data))
        ):
            data += piece
    except OSError as error:
        raise SourceError(
            f"reading failed: {error.strerror}", hint="see the kernel's log for the disk"
        ) from error

    return data


# The prompt cache


def _read_content(path: Path, fd: int, size: int) -> _Content:
    """Errors: FormatError, with what the file is instead."""
    head = _read(fd, MEMORY.size)
    if not head:
        raise FormatError(f"{path} is empty", hint="a prompt cache that was not written to its end")
    if head.startswith(MEMORY_MAGIC):
        return _memory_content(path, fd, size, head)
    return _llama_content(path, fd, size, head)


def _llama_content(path: Path, fd: int, size: int, head: bytes) -> _Content:
    """Files of llama.cpp, and those of RKLLM, which descends from it."""
    if len(head) < WORDS.size:
        begins = head[:4] in {
            word.to_bytes(4, "little") for word in (SEQUENCE_MAGIC, SESSION_MAGIC)
        }
        if begins or MEMORY_MAGIC.startswith(head):
            _truncated(path, size, "it ends within its header")
        raise FormatError(f"{path} is {UNKNOWN}: it has {size} bytes, fewer than a header")

    magic, version, count = WORDS.unpack_from(head)
    fits = count <= _MAX_TOKENS and WORDS.size + 4 * count <= size
    if magic == SEQUENCE_MAGIC:
        if not fits:
            _truncated(path, size, f"its header says {count:,} tokens")
        return _Content(
            engine="llamacpp",
            form=f"llama.cpp (sequence state, version {version})",
            tokens=_unpacked(_ids(path, fd, size, count)),
        )

    if magic == SESSION_MAGIC and version != RKLLM_VERSION:
        raise FormatError(
            f"{path} is {UNKNOWN}: it is a session of llama.cpp, version {version}",
            hint="rkcached keeps the state of single sequences, which begin with ggsq",
        )

    if magic == SESSION_MAGIC and not fits:
        _truncated(path, size, f"its header says {count:,} tokens")

    if version == RKLLM_VERSION and fits:
        tokens = _ids(path, fd, size, count)
        if count and all(0 <= token < _MAX_ID for token in tokens):
            which = "1.1"
            if magic != SESSION_MAGIC:
                which = f"with the architecture number {magic}"
            return _Content(
                engine="rkllm", form=f"RKLLM {which}, as far as its header tells", tokens=tokens
            )

    raise FormatError(
        f"{path} is {UNKNOWN}",
        hint="known are the files of llama.cpp, of RKLLM, and of the memory engine",
    )


def _memory_content(path: Path, fd: int, size: int, head: bytes) -> _Content:
    if len(head) < MEMORY.size:
        _truncated(path, size, "it ends within its header")

    _, version, count = MEMORY.unpack(head)
    wanted = MEMORY.size + 9 * count
    if count > _MAX_TOKENS or size < wanted:
        _truncated(path, size, f"its header says {count:,} tokens")

    if size > wanted:
        raise FormatError(
            f"{path} is damaged: {count:,} tokens take {wanted:,} bytes, it has {size:,}"
        )

    tokens = array("i", list(_read(fd, count, MEMORY.size)))
    return _Content(engine="memory", form=f"the memory engine (version {version})", tokens=tokens)


def _ids(path: Path, fd: int, size: int, count: int) -> array[int]:
    data = _read(fd, 4 * count, WORDS.size)
    if len(data) != 4 * count:
        _truncated(path, size, "it ended while it was read")
    return array("i", [token for (token,) in struct.iter_unpack("<i", data)])


def _unpacked(values: array[int]) -> array[int] | None:
    """The ids among the values that llama.cpp's server saves (seen in xllamacpp 2026.10)."""
    if not values or values[0] != -1:
        return values
    if len(values) > 2 and values[1] == 1 and 0 <= values[2] <= len(values) - 3:
        return values[3 : 3 + values[2]]
    return None


def _truncated(path: Path, size: int, why: str) -> NoReturn:
    raise FormatError(
        f"{path} is a truncated prompt cache of {size:,} bytes: {why}",
        hint="copy it again, or let the daemon build it",
    )


# The sidecar


def _record_beside(path: Path) -> Sidecar | str | None:
    """The sidecar of a file's artifact, why it is none, or None when nothing lies there."""
    place = path.with_suffix(".json") if path.suffix else path.with_name(f"{path.name}.json")
    if not os.path.lexists(place):
        return None

    try:
        fd, size = _open(place)
    except SourceError as error:
        return f"the sidecar cannot be used: {error.message}"

    try:
        if size > _MAX_SIDECAR_BYTES:
            return f"{place.name} is too large to be a sidecar"
        data = _read(fd, size)
    finally:
        os.close(fd)

    try:
        claimed = msgspec.json.decode(data, type=Sidecar)
    except (ValueError, RecursionError):
        return f"{place.name} is no sidecar, or a damaged one"

    # Away from the store, the folder's name is not the model's: it is checked against itself.
    parsed = parse_sidecar(data, Key(claimed.model, claimed.prompt))
    if isinstance(parsed, Sidecar) and not (
        NAME.fullmatch(parsed.prompt) and parsed.prompt == place.stem
    ):
        return f"{place.name} belongs to {parsed.model}/{parsed.prompt}, under another name"

    return parsed


def _compare(
    artifact: Path, fd: int, size: int, tokens: int | None, record: Sidecar | str | None
) -> tuple[forms.InspectedSidecar | None, str]:
    """The sidecar, and the reasons why the file does not match it."""
    if not isinstance(record, Sidecar):
        return None, record or ""

    if artifact.name != record.artifact:
        why = f"the sidecar beside it is that of {record.artifact}"
        if names_artifact(artifact.name, record.prompt):
            why += ", so it is a leftover"
        return None, why

    sha256 = ""
    if size == record.size_bytes:
        sha256 = _sha256(fd)

    problems = []
    if size != record.size_bytes:
        problems.append(f"it has {size:,} bytes, its sidecar says {record.size_bytes:,}")
    elif sha256 != record.sha256:
        problems.append("it does not have the SHA-256 of its sidecar")

    if tokens is not None and tokens != record.tokens:
        problems.append(f"it has {tokens:,} tokens, its sidecar says {record.tokens:,}")

    text = artifact.with_name(f"{record.prompt}.bin")
    text_matches = None
    if os.path.lexists(text):
        text_matches = _has_digest(text, record.text_sha256)
    if text_matches is False:
        problems.append(f"{text.name} does not have the SHA-256 of its sidecar")

    sidecar: forms.InspectedSidecar = {
        "file": _shown(artifact.with_name(f"{record.prompt}.json")),
        "model": record.model,
        "prompt": record.prompt,
        "fingerprint": record.fingerprint,
        "built_at": record.built_at,
        "matches": {
            "size": size == record.size_bytes,
            "sha256": sha256 == record.sha256,
            "tokens": None if tokens is None else tokens == record.tokens,
            "text": text_matches,
        },
    }
    return sidecar, "; ".join(problems)


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        fd, _ = _open(path)
    except SourceError:
        return False

    try:
        return _sha256(fd) == sha256
    finally:
        os.close(fd)


def _sha256(fd: int) -> str:
    hasher = hashlib.sha256()
    offset = 0
    while piece := _read(fd, 1 << 20, offset):
        hasher.update(piece)
        offset += len(piece)
    return hasher.hexdigest()
