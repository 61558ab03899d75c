"""Messages between daemon and worker, and their framing. Sans-I/O: bytes in, messages out.

A frame is a u32 little-endian length and that many bytes of JSON. The daemon sends one operation at
a time, each with an id of its own, and may send `Abort` while it runs. The worker answers with
events that end in a `Result` or in `Failed`. Anything else on the wire is a `ProtocolError`, after
which the connection is of no use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec

from rkcached import errors
from rkcached.engines.base import EngineInfo, ModelSpec, RunStats, Sampling, TokenLogprob
from rkcached.engines.kinds import VerifyMode
from rkcached.host.digests import Signature
from rkcached.host.integers import Int64
from rkcached.host.landlock import Reach

MAX_FRAME_BYTES = 16 << 20
"""Larger than any prompt; a length beyond it is garbage, not a message."""

_LENGTH_BYTES = 4

_new_id = itertools.count(1).__next__  # 0 is the answer to Start


class ProtocolError(Exception):
    """The other end does not speak this protocol."""


class CacheFile(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt cache to load: not just a path, but the file that its sidecar describes."""

    path: str
    signature: Signature
    fingerprint: str
    tokens: Int64 = 0
    """0: nobody knows."""


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt cache that begins as the prefix of a build does: only the rest is read."""

    cache: CacheFile
    tokens: Int64
    prefill_ms: float
    """Reading its tokens took so long."""
    is_beginning: bool = True
    """Its whole text is a beginning of the prefix: nothing of it has to be taken back."""
    probe: str = ""
    """The whole request that it was proven with; empty if it was not proven."""
    answer: str = ""
    """The digest of the probe's answer at that time."""


# Daemon to worker


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First message: load the model. Answer: Ready or Failed."""

    implementation: str
    spec: ModelSpec
    max_memory_bytes: Int64 | None = None
    confine: bool = True
    """See `host.confine`."""
    reach: Reach | None = None
    """The files that it can open once it is confined; None: all that the user can."""


class Build(msgspec.Struct, frozen=True, kw_only=True, tag="build"):
    """Prefill `prefix`, save it to `path`, prove it with `probe`.

    Answer: Loading?, Progress*, then Built, or Kept? and Failed.
    """

    id: Int64 = msgspec.field(default_factory=_new_id)
    prefix: str
    probe: str
    """A whole rendered request that starts with the prefix."""
    path: str
    verify: VerifyMode
    min_tokens: Int64
    base: Base | None = None
    """Goes on from this one, if it can."""
    owner: Int64 = -1
    """The uid of the only user whom the prompt cache serves."""
    partial: str = ""
    """Where the state goes if the build is aborted. Empty: nowhere."""
    keep_at: tuple[str, ...] = ()
    """See `Generate`."""


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Answer a request. Answer: (Loading, Loaded)?, Piece*, then Done or Failed."""

    id: Int64 = msgspec.field(default_factory=_new_id)
    prompt: str
    sampling: Sampling
    cache: CacheFile | None = None
    common_bytes: Int64 = 0
    """The prompt (UTF-8) begins as the text of `cache` does, for so long."""
    is_whole: bool = True
    """Whether that is all of the text of `cache`."""
    load_bytes: float = 0.0
    """In the time that loading `cache` takes, so many bytes of the prompt are prefilled."""
    owner: Int64 = -1
    """The uid of the client. What one asked and was answered is reused for nobody else."""
    cold: bool = False
    """Forget the KV state first, so that nothing is reused."""
    goes_on: bool = False
    """The prompt has an answer in it: a conversation that goes on, and is likely to again."""
    keep_at: tuple[str, ...] = ()
    """New files for the states of conversations whose places this operation takes. Where there is
    none left, they are lost."""


class Check(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Load a prompt cache, to see that it can be or to have it ready for the next request.

    Answer: (Loading, Loaded)?, then Checked or Failed.
    """

    id: Int64 = msgspec.field(default_factory=_new_id)
    cache: CacheFile
    text: str = ""
    """The text of `cache`. A KV state that begins with it already is kept; empty: none is."""
    probe: str = ""
    """A whole request that begins with the text of `cache`: it is answered with the cache, and
    again without. The answers must agree, else VerifyFailed."""
    expected: str | None = None
    """The digest of the probe's answer, as `Built` has it: then the probe is answered with the
    cache only, and must give this. Empty: nobody compared it, and only the reuse counts."""
    keep_at: tuple[str, ...] = ()
    """See `Generate`."""


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag="keep"):
    """Save the conversation in one of the KV states, if it is one. Answer: Saved?, then Checked."""

    id: Int64 = msgspec.field(default_factory=_new_id)
    keep_at: tuple[str, ...]
    age: Int64 = 0
    """0 is the KV state that was used last; at most `EngineInfo.states` less 1."""


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize"):
    """Tell the tokens of a text. Answer: Tokenized or Failed."""

    id: Int64 = msgspec.field(default_factory=_new_id)
    text: str


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """Make a vector of a text, or of tokens. Answer: Embedded or Failed."""

    id: Int64 = msgspec.field(default_factory=_new_id)
    text: str = ""
    tokens: tuple[int, ...] = ()
    """Instead of `text`."""


class Rank(msgspec.Struct, frozen=True, kw_only=True, tag="rank"):
    """Score how well a document answers a query. Answer: Ranked or Failed."""

    id: Int64 = msgspec.field(default_factory=_new_id)
    query: str
    document: str


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """End the operation with this id soon. It still gets its answer."""

    id: Int64


# Worker to daemon


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    info: EngineInfo
    load_ms: float
    unconfined: str = ""
    """Why the kernel did not confine the worker, if so."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    id: Int64
    done_tokens: Int64
    total_tokens: Int64

    @property
    def is_last(self) -> bool:
        return self.done_tokens == self.total_tokens


class Kept(msgspec.Struct, frozen=True, kw_only=True, tag="kept"):
    """A build is aborted; what it has read of its prefix is in its `partial` file."""

    id: Int64
    tokens: Int64
    prefill_ms: float
    """Reading these tokens took so long."""


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """The prompt cache is about to be loaded.

    A death between this and Loaded is the cache's fault; no other death is.
    """

    id: Int64


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The prompt cache is in the KV state, or could not be used and the run goes on without."""

    id: Int64
    tokens: Int64 = 0
    load_ms: float = 0.0
    error: str = ""
    """Why it could not be loaded; then the KV state is empty."""
    replaced: bool = False
    """The path leads to another file now; the content of the right one is not at fault."""


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag="saved"):
    """The state of a conversation is in a file: something else takes its place in memory."""

    id: Int64
    path: str
    text: str
    """All that was asked and answered."""
    asked_bytes: Int64
    """The length of what was asked (UTF-8)."""
    owner: Int64
    tokens: Int64
    save_ms: float


class Piece(msgspec.Struct, frozen=True, kw_only=True, tag="piece"):
    id: Int64
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    id: Int64
    stats: RunStats
    rewinds: bool = True
    """See `EngineInfo.rewinds`: as the engine says, or as a run has shown."""


class Built(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    id: Int64
    tokens: Int64
    prefill_ms: float
    """Reading the prefix into an empty state; what came from a base counts as it took then."""
    load_ms: float = 0.0
    cold_ttft_ms: float = 0.0
    warm_ttft_ms: float = 0.0
    verified: VerifyMode = VerifyMode.OFF
    reused_tokens: Int64 = 0
    """Of `tokens`, those that came from the base."""
    base_error: str = ""
    """Why the base was not used, without any fault of the engine's."""
    answer: str = ""
    """The digest of the probe's answer, if it was compared; see `Base.answer`."""
    proof_ms: float = 0.0
    """The build took so long after its prefill."""


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag="checked"):
    id: Int64
    tokens: Int64
    """0 if it was not loaded, as the KV state begins with its text already."""
    load_ms: float = 0.0
    warm_ttft_ms: float = 0.0
    """The first token of the probe with the cache, with loading it; 0 without a probe."""
    cold_ttft_ms: float = 0.0
    """The same without the cache; 0 if that was not tried."""
    verified: VerifyMode = VerifyMode.OFF
    answer: str = ""
    """See `Built`."""


class Tokenized(msgspec.Struct, frozen=True, kw_only=True, tag="tokenized"):
    id: Int64
    tokens: tuple[Int64, ...] | None
    """None: nothing tells them."""


class Embedded(msgspec.Struct, frozen=True, kw_only=True, tag="embedded"):
    id: Int64
    vector: bytes
    """Little-endian float32, of length 1."""
    tokens: Int64


class Ranked(msgspec.Struct, frozen=True, kw_only=True, tag="ranked"):
    id: Int64
    score: float
    tokens: Int64


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """An engine error by the name of its class. `id` 0 answers Start."""

    id: Int64
    error: str
    message: str
    hint: str = ""
    tokens: Int64 = 0
    limit: Int64 = 0
    param: str = ""
    text: str = ""


Operation = Build | Generate | Check | Keep | Embed | Rank | Tokenize
ToWorker = Start | Build | Generate | Check | Keep | Embed | Rank | Tokenize | Abort
FromWorker = (
    Ready
    | Progress
    | Kept
    | Loading
    | Loaded
    | Saved
    | Piece
    | Done
    | Built
    | Checked
    | Embedded
    | Ranked
    | Tokenized
    | Failed
)
Result = Done | Built | Checked | Embedded | Ranked | Tokenized

_to_worker = msgspec.json.Decoder(ToWorker)
_from_worker = msgspec.json.Decoder(FromWorker)
_encode = msgspec.json.Encoder().encode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def frame(message: ToWorker | FromWorker) -> bytes:
    body = _encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class FrameReader:
    """Cuts a byte stream into frames. Feed it what arrives; it yields each complete body."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Errors: ProtocolError for a length that no message has."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "little")
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length:,} bytes")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            yield body


def decode_to_worker(body: bytes) -> ToWorker:
    try:
        message: ToWorker = _to_worker.decode(body)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a message to a worker: {error}") from error
    return message


def decode_from_worker(body: bytes) -> FromWorker:
    try:
        message: FromWorker = _from_worker.decode(body)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a message from a worker: {error}") from error
    return message


def failed(operation_id: int, error: errors.EngineError) -> Failed:
    """An engine error as a message.

    An engine's own subclass goes as the error of this program that it is.
    """
    tokens = limit = 0
    if isinstance(error, errors.ContextExceeded | errors.PromptTooShort):
        tokens = error.tokens
        limit = error.limit

    ours = (cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    return Failed(
        id=operation_id,
        error=next(ours).__name__,
        message=error.message,
        hint=error.hint,
        tokens=tokens,
        limit=limit,
        param=error.param if isinstance(error, errors.SamplingFixed) else "",
        text=error.text if isinstance(error, errors.SchemaMismatch) else "",
    )


_PLAIN = {
    cls.__name__: cls
    for cls in (
        errors.EngineError,
        errors.ModelLoadError,
        errors.RuntimeLibraryError,
        errors.ArtifactLoadError,
        errors.Uncacheable,
        errors.InputInvalid,
        errors.SchemaInvalid,
        errors.VerifyFailed,
        errors.Aborted,
    )
}


def engine_error(message: Failed, trained_tokens: int | None = None) -> errors.EngineError:
    """The error that a `Failed` stands for; the inverse of `failed`.

    `trained_tokens` is the model's own context, which the daemon may know and an engine does not.
    """
    match message.error:
        case "ContextExceeded":
            return errors.ContextExceeded(message.tokens, message.limit, trained_tokens)
        case "PromptTooShort":
            return errors.PromptTooShort(message.tokens, message.limit)
        case "SamplingFixed":
            return errors.SamplingFixed(message.message, param=message.param, hint=message.hint)
        case "SchemaMismatch":
            return errors.SchemaMismatch(message.message, text=message.text, hint=message.hint)
        case name:
            return _PLAIN.get(name, errors.EngineError)(message.message, hint=message.hint)
