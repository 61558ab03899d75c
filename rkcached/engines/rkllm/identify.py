"""Identifies a runtime library file without loading it.

Owns the reading of shared libraries (ELF64, by the generic ABI's tables) and the choice of the
binary interface that goes with one. Only reads, with bounds on everything: whatever the file, the
outcome is facts or a RuntimeLibraryError. It reads in pieces and maps nothing, because a file that
shrinks while mapped kills the process. The daemon (fingerprint), `doctor` and, before it loads
anything, the binding use it.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from rkcached.engines.rkllm.abi import ABIS, Abi
from rkcached.errors import RuntimeLibraryError
from rkcached.host.access import refusal

SYMBOL_PREFIX: Final = "rkllm_"
LOAD_PROMPT_CACHE: Final = "rkllm_load_prompt_cache"

# Functions that only some versions have, and the first ABI that has each (vendor headers).
_SINCE: Final = {"rkllm_set_chat_template": "1.2.0", "rkllm_get_kv_cache_size": "1.2.1"}

_VERSION: Final = re.compile(rb"RKLLM SDK \(version: ([0-9][0-9A-Za-z.]{0,31})")
_OLDER: Final = re.compile(r"(0|1\.0)\.")

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_GNU_HASH: Final = struct.Struct("<IIII")

_PT_LOAD = 1
_PT_DYNAMIC = 2
_DT_NULL = 0
_DT_HASH = 4
_DT_STRTAB = 5
_DT_SYMTAB = 6
_DT_STRSZ = 10
_DT_GNU_HASH = 0x6FFFFEF5
_MACHINES: Final = {62: "x86_64", 183: "aarch64"}
_FILE_TYPES: Final = {1: "an object file (.o)", 2: "a program", 4: "a core dump"}

_PIECE: Final = 1 << 20
# No table of a real library comes near; a damaged size must not become a huge read.
_MAX_READ: Final = 16 << 20
_MAX_SCAN: Final = 512 << 20
_MAX_CHAIN: Final = 1 << 16
_MAX_NAME: Final = 1024

_GET_ONE = (
    "install librkllmrt.so for aarch64 Linux from Rockchip's rknn-llm, or name it with "
    "`engine.library`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryFacts:
    """Facts about a library, from its file."""

    path: Path
    version: str | None
    """The version that the file states, letters included (1.2.1b1); None if it states none."""
    symbols: frozenset[str]
    """The functions it exports whose names begin with `rkllm_`."""
    machine: str
    """The processor, as platform.machine() names it."""


def identify(path: Path) -> LibraryFacts:
    """Identify the library at `path`. Blocking; reads the file once.

    Errors: RuntimeLibraryError if it is anything else than an RKLLM runtime for this machine.
    """
    try:
        return _identify(path)
    except OSError as error:
        refused = refusal(path, error)
        if refused is None and isinstance(error, FileNotFoundError):
            raise RuntimeLibraryError(
                f"there is no runtime library at {path}", hint=_GET_ONE
            ) from error

        reason = error.strerror
        hint = "check its permissions, and those of the directories above it"
        if refused is not None:
            reason, hint = refused
        raise RuntimeLibraryError(
            f"the runtime library {path} cannot be read: {reason}", hint=hint
        ) from error
    except ValueError as error:  # a path with a NUL
        raise RuntimeLibraryError(f"no file can be called {str(path)!r}", hint=_GET_ONE) from error


def choose_abi(facts: LibraryFacts, override: str | None = None) -> Abi:
    """The binary interface of a library: by its version, cross-checked by its functions.

    `override` is the manifest's engine.abi, any known version: it is taken instead, if the
    functions that it needs are there. Errors: RuntimeLibraryError if version and functions
    contradict each other. A wrong guess would be a crash at run time.
    """
    if LOAD_PROMPT_CACHE not in facts.symbols:
        _refuse_old(facts, f"{facts.path} has no function {LOAD_PROMPT_CACHE}")

    known = {version: abi for abi in ABIS for version in abi.versions}
    if override is not None:
        if override not in known:
            raise RuntimeLibraryError(
                f"engine.abi is {override!r}, which is no known RKLLM version",
                hint=f"known are {', '.join(known)}",
            )

        abi = known[override]
        if missing := abi.functions.keys() - facts.symbols:
            raise RuntimeLibraryError(
                f"{facts.path} cannot be used with engine.abi {override}: it lacks "
                f"{', '.join(sorted(missing))}",
                hint=f"it says it is version {facts.version or 'unknown'}; its functions suggest "
                f"{_suggested(facts)}",
            )
        return abi

    names = ", ".join(abi.name for abi in ABIS)
    name_it = (
        f"known are {', '.join(known)}; if you know its ABI, set `engine.abi` in the manifest to "
        f"one of {names}"
    )
    if facts.version is None:
        raise RuntimeLibraryError(
            f"{facts.path} does not say which RKLLM version it is; its functions suggest "
            f"{_suggested(facts)}",
            hint=name_it,
        )

    if _OLDER.match(f"{facts.version}."):
        _refuse_old(facts, f"{facts.path} is RKLLM {facts.version}")
    if facts.version not in known:
        raise RuntimeLibraryError(
            f"{facts.path} is RKLLM {facts.version}, a version that this program does not know",
            hint=name_it,
        )

    abi = known[facts.version]
    if contradictions := _contradictions(facts, abi):
        raise RuntimeLibraryError(
            f"{facts.path} says it is RKLLM {facts.version}, but {'; '.join(contradictions)}",
            hint=name_it,
        )
    return abi


def _contradictions(facts: LibraryFacts, abi: Abi) -> list[str]:
    """The functions that the library lacks or has against its version."""
    order = [each.name for each in ABIS]
    missing = sorted(abi.functions.keys() - facts.symbols)
    contradictions = [f"it does not have {name}" for name in missing]

    for name, since in _SINCE.items():
        if name in facts.symbols and order.index(abi.name) < order.index(since):
            contradictions.append(f"it has {name}, which came with {since}")
    return contradictions


def _refuse_old(facts: LibraryFacts, finding: str) -> NoReturn:
    stated = ""
    if facts.version and facts.version not in finding:
        stated = f" (it says {facts.version})"
    raise RuntimeLibraryError(
        f"{finding}{stated}: RKLLM 1.0.x cannot save prompt caches",
        hint="install RKLLM 1.1.0 or newer",
    )


def _suggested(facts: LibraryFacts) -> str:
    """The version that the functions suggest.

    1.2.1 and 1.3.0 have the same functions, though their layouts differ.
    """
    for name, words in (
        ("rkllm_get_kv_cache_size", "1.2.1 or newer"),
        ("rkllm_set_chat_template", "1.2.0 or 1.2.1b1"),
        (LOAD_PROMPT_CACHE, "1.1.x"),
    ):
        if name in facts.symbols:
            return words
    return "1.0.x"


def _identify(path: Path) -> LibraryFacts:
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind):  # opening a pipe would wait for its writer
        what = "a directory" if stat.S_ISDIR(kind) else "not a regular file"
        raise RuntimeLibraryError(f"{path} is {what}, not a runtime library", hint=_GET_ONE)

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        image = _Image(path, fd, os.fstat(fd).st_size)
        machine = image.machine
        symbols = frozenset(image.exported())
        if not symbols:
            raise RuntimeLibraryError(
                f"{path} is not an RKLLM runtime: it exports no function whose name begins with "
                f"{SYMBOL_PREFIX}",
                hint="librkllmrt.so is meant; librknnrt.so, for example, is Rockchip's library for "
                "other networks",
            )

        return LibraryFacts(path=path, version=image.version(), symbols=symbols, machine=machine)
    finally:
        os.close(fd)


class _Image:
    """Reads a shared library.

    Every read is checked against the file's size; addresses go through PT_LOAD.
    """

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self._size = size
        self.machine = ""
        self._segments: list[tuple[int, int, int, int, int]] = []

        head = os.pread(fd, 512, 0)
        if not head:
            raise RuntimeLibraryError(f"{path} is empty", hint=_GET_ONE)
        if not head.startswith(b"\x7fELF"):
            raise RuntimeLibraryError(
                f"{path} is {_looks_like(head)}, not a shared library", hint=_GET_ONE
            )
        self._read_header(head)

    def _read_header(self, head: bytes) -> None:
        if len(head) > 4 and head[4] == 1:
            raise RuntimeLibraryError(
                f"{self._path} is a 32-bit library; RKLLM needs a 64-bit one", hint=_GET_ONE
            )

        if len(head) < _HEADER.size:
            self.damaged("it ends within the ELF header")

        ident, kind, machine, _, _, at, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(head)
        if ident[4] != 2 or ident[5] not in {1, 2}:
            self.damaged("its ELF header makes no sense")
        if ident[5] == 2:
            raise RuntimeLibraryError(
                f"{self._path} is a library for a big-endian machine", hint=_GET_ONE
            )

        self.machine = _MACHINES.get(machine, f"ELF machine {machine}")
        if self.machine != platform.machine():
            self._refuse_machine()

        if kind != 3:
            what = _FILE_TYPES.get(kind, f"of ELF type {kind}")
            raise RuntimeLibraryError(
                f"{self._path} is {what}, not a shared library", hint=_GET_ONE
            )

        if entry_size != _PROGRAM_HEADER.size:
            self.damaged(f"its program headers have {entry_size} bytes each")

        table = self.read(at, count * entry_size)
        for entry in _PROGRAM_HEADER.iter_unpack(table):
            segment, _, offset, address, _, file_size, memory_size, _ = entry
            if segment in {_PT_LOAD, _PT_DYNAMIC}:
                self._segments.append((segment, offset, address, file_size, memory_size))

    def _refuse_machine(self) -> NoReturn:
        hint = _GET_ONE
        if self.machine == "aarch64":
            hint = (
                "RKLLM runs on boards with a Rockchip NPU; elsewhere use `engine: {kind: llamacpp}`"
            )
        raise RuntimeLibraryError(
            f"{self._path} is a library for {self.machine}, this machine is {platform.machine()}",
            hint=hint,
        )

    def damaged(self, why: str) -> NoReturn:
        raise RuntimeLibraryError(
            f"{self._path} is truncated or damaged: {why}",
            hint="copy it again, and compare its size with the original",
        )

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:
            self.damaged(f"it has {self._size:,} bytes, but refers to byte {offset + length:,}")
        if length > _MAX_READ:
            self.damaged(f"a table of {length:,} bytes is not believed")

        data = b""
        while len(data) < length:  # a read may stop short; at nothing, the file shrank under us
            piece = os.pread(self._fd, length - len(data), offset + len(data))
            if not piece:
                self.damaged("it ended while it was read")
            data += piece

        return data

    def offset_of(self, address: int) -> tuple[int, int]:
        """The place of an address in the file, and how many bytes of its segment follow."""
        for segment, offset, start, file_size, _ in self._segments:
            if segment == _PT_LOAD and start <= address < start + file_size:
                return offset + address - start, file_size - (address - start)
        return self.damaged(f"the address {address:#x} is in no segment")

    def at_address(self, address: int, length: int) -> bytes:
        offset, room = self.offset_of(address)
        if length > room:
            self.damaged(f"a table at {address:#x} leaves its segment")
        return self.read(offset, length)

    def _dynamic(self) -> dict[int, int]:
        """The entries of the dynamic section, by tag."""
        where = next(
            ((offset, size) for kind, offset, _, size, _ in self._segments if kind == _PT_DYNAMIC),
            None,
        )
        if where is None:
            self.damaged("it has no dynamic section")

        offset, size = where
        entries: dict[int, int] = {}
        for tag, value in _DYNAMIC.iter_unpack(self.read(offset, size - size % _DYNAMIC.size)):
            if tag == _DT_NULL:
                break
            entries[tag] = value

        if not {_DT_STRTAB, _DT_STRSZ, _DT_SYMTAB} <= entries.keys():
            self.damaged("its dynamic section names no strings or symbols")
        return entries

    def _name(self, strings: bytes, offset: int) -> str:
        end = strings.find(b"\0", offset, offset + _MAX_NAME)
        if end < 0:
            self.damaged("a name leaves the string table")
        return strings[offset:end].decode(errors="replace")

    def exported(self) -> Iterator[str]:
        """The rkllm_* names that dlsym would find: those of symbols that the library defines."""
        entries = self._dynamic()
        strings = self.at_address(entries[_DT_STRTAB], entries[_DT_STRSZ])
        count = self._count_symbols(entries)
        if not count:
            return

        table = self.at_address(entries[_DT_SYMTAB], count * _SYMBOL.size)
        for at, info, _, section, *_ in _SYMBOL.iter_unpack(table):
            if section and info >> 4 and strings.startswith(SYMBOL_PREFIX.encode(), at):
                yield self._name(strings, at)

    def _count_symbols(self, entries: dict[int, int]) -> int:
        """Count the symbols up to the last one in the hash tables: no field states their number."""
        if (address := entries.get(_DT_HASH)) is not None:
            _, chains = struct.unpack("<II", self.at_address(address, 8))
            return int(chains)

        if (address := entries.get(_DT_GNU_HASH)) is None:
            return 0

        buckets, first, filters, _ = _GNU_HASH.unpack(self.at_address(address, _GNU_HASH.size))
        address += _GNU_HASH.size + 8 * filters
        table = self.at_address(address, 4 * buckets)
        last = max((index for (index,) in struct.iter_unpack("<I", table)), default=0)
        if last < first:
            return int(first)

        address += 4 * buckets + 4 * (last - first)
        _, room = self.offset_of(address)
        chain = self.at_address(address, min(room - room % 4, 4 * _MAX_CHAIN))
        for index, (value,) in enumerate(struct.iter_unpack("<I", chain), start=last):
            if value & 1:  # ends the chain of the last bucket
                return int(index) + 1

        return self.damaged("its table of names has no end")

    def version(self) -> str | None:
        """The version that the library prints when it starts (reported for 1.2.0 to 1.3.1)."""
        tail = b""
        for offset in range(0, min(self._size, _MAX_SCAN), _PIECE):
            data = tail + os.pread(self._fd, _PIECE, offset)
            # A match at the very end may go on in the next piece, which begins with this tail.
            match = _VERSION.search(data)
            if match and (match.end() < len(data) or offset + _PIECE >= self._size):
                return match[1].decode().rstrip(".")

            tail = data[-128:]

        return None


def _looks_like(head: bytes) -> str:
    """Guess the kind of a file that is no ELF file, by its first bytes."""
    for magic, what in (
        (
            b"version https://git-lfs",
            "a git-lfs pointer (a few lines that stand for the file: run `git lfs pull`)",
        ),
        (b"!<arch>", "a static library (.a)"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"PK\x03\x04", "a zip archive"),
        (b"GGUF", "a model file"),
    ):
        if head.startswith(magic):
            return what

    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "a web page (the download went wrong)"
    if b"gnu ld script" in text or re.search(rb"\b(?:input|group)\s*\(", text):
        return "a GNU ld script"

    printable = all((byte >= 32 and byte != 127) or byte in b"\t\n\f\r" for byte in head)
    if printable and _is_utf8(head):
        return "a text file"
    return "a file of another kind"


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # The text may be cut within a character.
        return error.end >= len(head) and error.reason == "unexpected end of data"
    return True
