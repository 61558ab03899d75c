"""Bundles: proven prompt caches in one file, for other machines. The format, its reader and writer.

A bundle is a tar archive (ustar) of regular files, in this order:

    bundle.json               the list of all that follows, with sizes and SHA-256
    bundle.json.minisig       its signature, if there is one
    MODEL/PROMPT.bin          of each prompt: the text, the sidecar and the prompt cache,
    MODEL/PROMPT.json         as the store has them
    MODEL/PROMPT.llama_cache

The reader takes nothing from the archive that it did not expect: the next member has the name and
the size that the list gives it, or reading ends. No name of the archive becomes a path. Nothing is
compressed, because that saves less than a tenth of a prompt cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Final, NamedTuple

import msgspec

from rkcached.errors import FormatError, StoreError
from rkcached.host import disk
from rkcached.host.integers import Int64
from rkcached.host.regular import open_regular, read_regular
from rkcached.plan.fingerprint import fingerprint
from rkcached.sources.problems import NAME
from rkcached.store.result_file import place_for
from rkcached.store.scan import CACHE_SUFFIXES, MAX_RECORD_BYTES, MAX_TEXT_BYTES
from rkcached.store.sidecar import Figures, StoredArtifact

FORMAT_VERSION: Final = 1
LIST: Final = "bundle.json"
SIGNATURE: Final = "bundle.json.minisig"

MAX_LIST_BYTES: Final = 8 << 20
MAX_SIGNATURE_BYTES: Final = 4096
MAX_CACHE_BYTES: Final = (8 << 30) - 1
"""A header of ustar has room for no larger size."""

PIECE_BYTES: Final = 1 << 20
"""The reader gives the content of a file in pieces of at most this size."""

MAX_MS: Final = 86_400_000.0
"""No measured time is longer than a day."""

_BLOCK_BYTES: Final = 512
_MAX_LETTERS: Final = 64 << 10
_MAX_END_BYTES: Final = 64 << 10  # tar fills its last record with zeros
_FILE_MODE: Final = 0o600  # a prompt can be read back from its cache
_AGAIN: Final = "copy the bundle again, or export it again"

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class BundledFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    size_bytes: Count
    sha256: Sha256


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """How the prompt cache was proven where it was built."""

    question: str
    verified: str
    """As in the sidecar: exact, or hit."""
    answer_sha256: str = ""
    """Of the tokens of the answer; empty where they were not compared."""


class BundledPrompt(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    prompt: str
    fingerprint: Sha256
    components: dict[str, str]
    tokens: Count
    figures: Figures
    """As measured where it was built."""
    proof: Proof
    text: BundledFile
    sidecar: BundledFile
    cache: BundledFile

    @property
    def files(self) -> tuple[BundledFile, ...]:
        """In their order in the archive."""
        return (self.text, self.sidecar, self.cache)

    def __str__(self) -> str:
        return f"{self.model}/{self.prompt}"


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `bundle.json`."""

    format: Int64 = FORMAT_VERSION
    made_by: str
    made_at: float
    """Unix seconds."""
    prompts: Annotated[list[BundledPrompt], msgspec.Meta(max_length=10_000)]


def parse_contents(data: bytes) -> Contents:
    """Errors: FormatError."""
    try:
        contents = msgspec.json.decode(data, type=Contents)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{LIST} is damaged: {error}", hint=_AGAIN) from error
    if contents.format != FORMAT_VERSION:
        raise FormatError(
            f"the bundle has format {contents.format}, this program reads {FORMAT_VERSION}",
            hint="export and import with the same version",
        )

    seen = set()
    for prompt in contents.prompts:
        if trouble := _trouble(prompt):
            raise FormatError(f"{LIST} is damaged: {trouble}", hint=_AGAIN)
        if prompt.fingerprint in seen:
            raise FormatError(f"{LIST} lists {prompt} twice", hint=_AGAIN)
        seen.add(prompt.fingerprint)
    return contents


def _trouble(prompt: BundledPrompt) -> str:
    """Why this is no prompt of a bundle."""
    if not NAME.fullmatch(prompt.model) or not NAME.fullmatch(prompt.prompt):
        return "a name that no prompt can have"
    if fingerprint(prompt.components).digest != prompt.fingerprint:
        return f"the components of {prompt} do not have its fingerprint"

    stem = str(prompt)
    names = [file.name for file in prompt.files]
    if names[:2] != [f"{stem}.bin", f"{stem}.json"]:
        return f"the files of {prompt} have other names"
    if names[2].removeprefix(stem) not in CACHE_SUFFIXES:
        return f"{prompt} has no prompt cache"

    most = (MAX_TEXT_BYTES, MAX_RECORD_BYTES, MAX_CACHE_BYTES)
    if any(file.size_bytes > limit for file, limit in zip(prompt.files, most, strict=True)):
        return f"a file of {prompt} is too large"
    if prompt.text.sha256 != prompt.components.get("prefix.digest"):
        return f"the text of {prompt} is another one"
    measured = (prompt.figures.prefill_ms, prompt.figures.cold_ttft_ms)
    if not all(0 <= figure <= MAX_MS for figure in measured):
        return f"the figures of {prompt} are no times"
    if sum(len(name) + len(value) for name, value in prompt.components.items()) > _MAX_LETTERS:
        return f"the components of {prompt} are too long"
    return ""


# Reading

Read = Callable[[int], Awaitable[bytes]]
"""Gives some bytes, at most so many; none at the end."""


class BundleReader:
    """Reads a bundle once, from its beginning to its end.

    Errors of every call: FormatError, and those of `read`.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        # Of the member that was begun last: its content that was not read yet, and what fills its
        # last block.
        self._left_bytes = 0
        self._fill_bytes = 0
        # A header that was read ahead.
        self._ahead: tuple[str, int] | None = None

    async def begin(self) -> tuple[bytes, bytes | None]:
        """The list, for `parse_contents`, and its signature if there is one."""
        data = await self._whole(LIST, MAX_LIST_BYTES)
        self._ahead = await self._header()
        if self._ahead[0] != SIGNATURE:
            return data, None
        return data, await self._whole(SIGNATURE, MAX_SIGNATURE_BYTES)

    async def expect(self, file: BundledFile) -> None:
        """Go on to this file, which must be the next one. Its content may be left unread."""
        if await self._header() != (file.name, file.size_bytes):
            raise FormatError(f"the bundle does not go on with {file.name}", hint=_AGAIN)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The content of this file, as far as it was not read yet."""
        while self._left_bytes:
            piece = await self._some(self._left_bytes)
            self._left_bytes -= len(piece)
            yield piece

    async def end(self) -> None:
        """See that nothing follows."""
        if await self._header() != ("", 0):
            raise FormatError(f"the bundle has more files than {LIST} lists", hint=_AGAIN)

        more_bytes = 0
        while piece := await self._read(PIECE_BYTES):
            more_bytes += len(piece)
            if more_bytes > _MAX_END_BYTES or piece.strip(b"\0"):
                raise FormatError("something follows the end of the bundle", hint=_AGAIN)

    async def _whole(self, name: str, max_bytes: int) -> bytes:
        """The next file, which must have this name."""
        found, size_bytes = await self._header()
        if found != name:
            raise FormatError("this is no bundle", hint="`rkcached export` makes bundles")
        if size_bytes > max_bytes:
            raise FormatError(f"{name} is longer than {max_bytes:,} bytes", hint=_AGAIN)
        return b"".join([piece async for piece in self.pieces()])

    async def _header(self) -> tuple[str, int]:
        """The name and size of the next regular file; ("", 0) at the end."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead

        async for _ in self.pieces():
            pass
        await self._exactly(self._fill_bytes)
        name, size_bytes = parse_header(await self._exactly(_BLOCK_BYTES))
        self._left_bytes = size_bytes
        self._fill_bytes = -size_bytes % _BLOCK_BYTES
        return name, size_bytes

    async def _exactly(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            data += await self._some(size_bytes - len(data))
        return data

    async def _some(self, most_bytes: int) -> bytes:
        data = await self._read(min(most_bytes, PIECE_BYTES))
        if not data:
            raise FormatError("the bundle ends too early", hint="was it copied as a whole?")
        return data


def parse_header(block: bytes) -> tuple[str, int]:
    """The name and size of the regular file that a header of tar begins; ("", 0) at the end.

    Errors: FormatError, also for a link, a device and all else that is no regular file.
    """
    if not any(block):
        return "", 0
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise FormatError(f"the bundle is damaged: {error}", hint=_AGAIN) from error
    if header.type != tarfile.REGTYPE or header.size < 0 or not header.name:
        raise FormatError(
            f"the bundle has something else than files in it: {header.name[:200]!r}",
            hint="`rkcached export` makes bundles",
        )
    return header.name, header.size


# Writing


class Packed(NamedTuple):
    """A prompt cache that goes into a bundle, and where its three files are."""

    prompt: BundledPrompt
    text: bytes
    sidecar: bytes
    cache: Path


def pack(artifact: StoredArtifact, question: str) -> Packed:
    """Prepare a good artifact, which was proven by this question. Errors: OSError."""
    record = artifact.sidecar
    stem = f"{record.model}/{record.prompt}"
    sidecar = read_regular(artifact.folder / f"{record.prompt}.json", MAX_RECORD_BYTES)
    prompt = BundledPrompt(
        model=record.model,
        prompt=record.prompt,
        fingerprint=record.fingerprint,
        components=dict(record.components),
        tokens=record.tokens,
        figures=record.figures,
        proof=Proof(
            question=question,
            verified=record.figures.verified,
            answer_sha256=record.answer_sha256,
        ),
        text=_file(f"{stem}.bin", artifact.text),
        sidecar=_file(f"{stem}.json", sidecar),
        cache=BundledFile(
            name=f"{record.model}/{record.artifact}",
            size_bytes=record.size_bytes,
            sha256=record.sha256,
        ),
    )
    return Packed(prompt=prompt, text=artifact.text, sidecar=sidecar, cache=artifact.path)


def _file(name: str, data: bytes) -> BundledFile:
    return BundledFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_bundle(
    path: Path,
    packed: Sequence[Packed],
    *,
    made_by: str,
    made_at: float,
    sign: Callable[[bytes], bytes] | None = None,
    replace: bool = False,
    on_cache: Callable[[BundledPrompt], None] = lambda _: None,
) -> int:
    """Write a bundle, whole or not at all; returns its size in bytes.

    `sign` makes the signature of the list. `replace`: the file may exist. `on_cache` hears which
    prompt cache is written next. Errors: StoreError; FormatError for a prompt cache that changes
    meanwhile.
    """
    contents = Contents(
        made_by=made_by, made_at=made_at, prompts=[package.prompt for package in packed]
    )
    data = msgspec.json.format(msgspec.json.encode(contents))
    members = {LIST: data}
    if sign is not None:
        members[SIGNATURE] = sign(data)

    remedy = "name another file, or replace it with --force"
    place = place_for(path, replace=replace, remedy=remedy)
    if os.path.lexists(place) and not _is_bundle(place):
        raise StoreError(f"{path} is not a bundle, so it is not replaced", hint="name another file")
    temporary = place.with_name(f".{place.name[:64]}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            os.fchmod(stream.fileno(), _FILE_MODE)
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for name, content in members.items():
                    _add(archive, name, io.BytesIO(content), len(content), made_at)
                for package in packed:
                    on_cache(package.prompt)
                    _add_files(archive, package, made_at)
            stream.flush()
            os.fsync(stream.fileno())
            size_bytes = stream.tell()
        _put(temporary, place, replace=replace)
    except FileExistsError as error:
        raise StoreError(f"{path} exists", hint=remedy) from error
    except OSError as error:
        why, hint = disk.refusal(error, place)
        raise StoreError(f"{path} cannot be written: {why}", hint=hint) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return size_bytes


def _is_bundle(place: Path) -> bool:
    """Whether a bundle was begun there: another file may be the key, or the prompt itself."""
    try:
        with place.open("rb") as stream:
            return parse_header(stream.read(_BLOCK_BYTES))[0] == LIST
    except (OSError, FormatError):
        return False


def _put(temporary: Path, path: Path, *, replace: bool) -> None:
    """Give the file its name. Errors: OSError, FileExistsError."""
    if replace:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # FAT has no links
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        temporary.replace(path)


def _add_files(archive: tarfile.TarFile, package: Packed, made_at: float) -> None:
    """Errors: OSError, FormatError."""
    text, sidecar, cache = package.prompt.files
    _add(archive, text.name, io.BytesIO(package.text), text.size_bytes, made_at)
    _add(archive, sidecar.name, io.BytesIO(package.sidecar), sidecar.size_bytes, made_at)

    changed = FormatError(
        f"the prompt cache of {package.prompt} was replaced meanwhile", hint=_AGAIN
    )
    try:
        stream = open_regular(package.cache, follow=False)
    except OSError as error:
        raise changed from error
    with stream:
        hashing = _Hashing(stream)
        if os.fstat(stream.fileno()).st_size != cache.size_bytes:
            raise changed
        _add(archive, cache.name, hashing, cache.size_bytes, made_at)
    if hashing.digest.hexdigest() != cache.sha256:
        raise changed


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def _add(
    archive: tarfile.TarFile, name: str, stream: io.IOBase, size_bytes: int, made_at: float
) -> None:
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    header.mode = _FILE_MODE
    header.mtime = int(made_at)
    archive.addfile(header, stream)
