"""The document of `rkcached bench --json`: every run, and what the runs depend on."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

import msgspec

from rkcached.cli.bench.samples import median, p95
from rkcached.errors import FormatError, SourceError, StoreError, UsageError
from rkcached.host import disk

FORMAT: Final = 1
PROGRAM = "rkcached bench"

_MAX_BYTES = 256 << 20


class State(StrEnum):
    """The origin of an answer's prompt."""

    COLD = "cold"
    """Computed: nothing is taken from anywhere."""
    FILE = "file"
    """Loaded from the prompt cache's file, which the kernel may have in its memory."""
    MEMORY = "memory"
    """Still in the engine's memory, from the answer before."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One answer through the socket.

    Times in milliseconds; the first one is the sum of the others.
    """

    ttft_ms: float
    """By this client's clock: request sent to first text received."""
    queue_ms: float
    load_ms: float
    prefill_ms: float
    first_decode_ms: float
    """The rest of the daemon's own time to first token: decoding that token, and what the daemon
    does around it."""
    socket_ms: float
    """The rest of this client's time."""
    prompt_tokens: int
    cached_tokens: int | None
    """None where the runtime measures nothing."""
    decode_tokens_per_s: float
    model_load_ms: float = 0.0
    """Of the first answer after the model was loaded; else 0."""


class DirectRun(msgspec.Struct, frozen=True, kw_only=True):
    """The same on the engine alone."""

    ttft_ms: float
    load_ms: float
    prefill_ms: float
    cached_tokens: int | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    median: float
    p95: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        return cls(median=round(median(samples), 3), p95=round(p95(samples), 3))


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a prompt in one state; `missing` is the reason why there are none."""

    runs: tuple[Run, ...] = ()
    direct: tuple[DirectRun, ...] = ()
    missing: str = ""
    summary: dict[str, Summary] = {}
    """Of each figure of the runs, of `direct_ttft_ms`, and of `daemon_share_ms`."""

    def samples(self, figure: str) -> list[float]:
        """One figure of every run; empty where it was not measured."""
        if figure == "direct_ttft_ms":
            return [run.ttft_ms for run in self.direct]

        if figure == "daemon_share_ms":
            return [
                _around(run) - _around(alone)
                for run, alone in zip(self.runs, self.direct, strict=False)
            ]

        values = [getattr(run, figure) for run in self.runs]
        return [value for value in values if value is not None]

    def median(self, figure: str) -> float | None:
        samples = self.samples(figure)
        if samples:
            return median(samples)
        return None

    def summarised(self) -> Measured:
        figures = (*Run.__struct_fields__, "direct_ttft_ms", "daemon_share_ms")
        known = {}
        for figure in figures:
            if samples := self.samples(figure):
                known[figure] = Summary.of(samples)

        return msgspec.structs.replace(self, summary=known)


def _around(run: Run | DirectRun) -> float:
    """All but loading and prefill, which vary by more than the daemon adds."""
    around_ms = run.ttft_ms - run.load_ms - run.prefill_ms
    if isinstance(run, Run):
        around_ms -= run.model_load_ms
    return around_ms


class PromptResult(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, and its runs in each state."""

    model: str
    prompt: str
    tokens: int | None
    """Of the prompt cache; None where there is none."""
    size_bytes: int | None
    build_ms: float | None
    states: dict[State, Measured]
    length: int | None = None
    """Tokens that a sweep chose for it; None for a prompt that was there."""
    text_digest: str = ""
    """SHA-256 of its text in UTF-8; empty where it is not known, and of a sweep, which makes texts.
    """
    no_gain: str = ""
    """The reason why its cache does not help; empty if it does."""
    reduction: dict[State, float] = {}
    """By how much the warm states shorten the time to first token: 0.9 is to a tenth."""
    build_saw_no_gain: bool = False
    """As `rkcached status` shows, of the one sample that a build takes."""

    @property
    def name(self) -> str:
        """As one calls it.

        A prompt of a sweep goes by its length, for its name is of one session.
        """
        if self.length is None:
            return f"{self.model}/{self.prompt}"
        return f"{self.model}, {self.length:,} tokens"


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    board: str
    """Empty where the machine does not say."""
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    clocks: dict[str, str]
    """Governor and frequency of each clock."""
    clocks_fixed: bool | None
    """None where no governor can be seen."""
    load_average: float
    """Of one minute, before anything was measured."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """All that an answer of the model depends on; None where the manifest could not be read."""

    engine: str
    runtime: str | None
    file: str | None = None
    digest: str | None = None
    """SHA-256."""
    params: dict[str, float | int | None] | None = None
    threads: int | None = None


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    rkcached: str
    """Of this command."""
    daemon: str
    python: str


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    runs: int
    answer_tokens: int
    question: str
    sweep: tuple[int, ...] = ()


class Ended(StrEnum):
    WELL = ""
    INTERRUPTED = "interrupted"
    DAEMON_GONE = "the daemon went away"


class Results(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal[1]
    program: str = PROGRAM
    date: str
    machine: MachineFacts
    versions: Versions
    parameters: Parameters
    models: dict[str, ModelFacts]
    prompts: tuple[PromptResult, ...]
    first_answers: dict[str, Run] = {}
    """By model: the answer that the model was loaded for; it is no run of a prompt. Not of a model
    that was in memory already."""
    direct: str = ""
    """The reason why the engine was not measured alone; empty if it was."""
    steal_percent: float = 0.0
    """Time that the hypervisor gave to others while it was measured."""
    warnings: tuple[str, ...] = ()
    """Reasons not to trust the figures."""
    refused: tuple[str, ...] = ()
    """Parts that could not be measured at all, with the reason: prompts, and lengths of a sweep."""
    ended: Ended = Ended.WELL
    """The event that ended it early, so that prompts are missing."""


def to_json(data: msgspec.Struct) -> str:
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode()


def check_writable(file: Path) -> None:
    """Before minutes of measuring. Errors: UsageError, StoreError."""
    if str(file) == "-":
        raise UsageError(
            "- is no file's name here", hint="say --json to have the results on standard output"
        )

    if file.is_dir():
        raise _not_written(file, IsADirectoryError(errno.EISDIR, "it is a directory"))

    # A file is replaced, which takes its folder, too; a pipe or a device is written itself.
    needed = []
    if file.exists():
        needed = [file]
    if not needed or file.is_file():
        needed.append(file.resolve().parent)
    if not all(os.access(place, os.W_OK) for place in needed):
        raise _not_written(file, PermissionError(errno.EACCES, "the place cannot be written"))


def write(results: Results, file: Path) -> None:
    """Afterwards `file` has the results, or on any error what it had. Errors: StoreError."""
    data = (to_json(results) + "\n").encode()
    put(file, lambda place: place.write_bytes(data))


def put(file: Path, fill: Callable[[Path], object]) -> None:
    """`fill` writes a new file, which then takes the place of `file`. Errors: StoreError."""
    try:
        if file.exists() and not file.is_file():
            fill(file)
            return

        place = file.resolve()  # a link stays one
        temporary = place.with_name(f".{place.stem[:64]}-{secrets.token_hex(4)}{place.suffix}")
        try:
            fill(temporary)
            if place.exists():
                shutil.copymode(place, temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(place)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

        disk.sync_directory(place.parent)
    except OSError as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> StoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "name a file in a folder that you may write to"
    if full:
        hint = "free some space, or name a file elsewhere"
    return StoreError(f"cannot write {file}: {error.strerror or error}", hint=hint)


def read(path: Path) -> Results:
    """Errors: SourceError; FormatError for a file that is none of these."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}", hint="name a file of `rkcached bench -o`"
        ) from error

    hint = "write one with `rkcached bench -o FILE`"
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a result of rkcached bench", hint=hint) from error

    if head.program != PROGRAM:
        raise FormatError(f"{path} is not a result of rkcached bench", hint=hint)

    if head.format != FORMAT:
        message = f"{path} has format {head.format}, this program reads {FORMAT}"
        raise FormatError(
            message, hint="measure again with this version, or compare with the one that wrote it"
        )

    try:
        return msgspec.json.decode(data, type=Results)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is a damaged result: {error}", hint=hint) from error


class _Head(msgspec.Struct):
    program: str
    format: int
