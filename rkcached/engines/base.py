"""The engine port: the calls and records that every inference library is wrapped into.

An engine holds one loaded model and one KV state. It is synchronous and used by one thread at a
time; only `abort` may be called from another thread. It lives in a worker process, so it may crash
without taking the daemon along.

The KV state is a sequence of token positions. A run reuses the longest common prefix of its
prompt's tokens with the state, as far as the state can be taken back to it (`EngineInfo.rewinds`),
and prefills only the rest; this makes a wrong or foreign state slow, never wrong.

A prompt is text in which control tokens are written as the model's template writes them. An engine
whose tokens a vocabulary states also takes the marks of `messages.special_tokens` in it: what
stands between them is read without control tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec

from rkcached.host.integers import Int64

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLING_PARAMETERS = (
    "temperature",
    "top_k",
    "top_p",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
)
"""The fields of `Sampling` that llama.cpp and RKLLM know by the same names."""

SAMPLING_FIELDS = (*SAMPLING_PARAMETERS, "min_p", "seed")
"""The fields of `Sampling` that decide about the next token."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters that choose the next token. None leaves the engine's own default."""

    max_new_tokens: int = 128
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    min_p: float | None = None
    """Leave out tokens that are less likely than this share of the likeliest one; 0 is off."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; it is not part of the text."""
    json_schema: str = ""
    """A JSON schema as text: only such JSON may be generated. For engines whose info has
    `constrains_json`."""
    shown_tokens: tuple[str, ...] = ()
    """Control tokens that are printed nevertheless. What is no token of the model is ignored, and
    so is all of it by engines that cannot (`EngineEntry.prints_control_tokens`)."""
    logprobs: int | None = None
    """Give each token's log-probability, and those of so many likeliest ones. For engines whose
    info has `gives_logprobs`."""


class NpuOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of RKLLM for the board. None leaves the runtime's own default."""

    enabled_cpus: tuple[int, ...] = ()
    """CPU numbers, 0 to 31."""
    embed_flash: bool | None = None
    """Read the embedding table from flash instead of keeping it in memory."""
    base_domain_id: int = 0
    """NPU address domain, 0 to 15."""
    n_keep: int | None = None
    """KV positions to keep when the context is full."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine needs to load a model."""

    path: str
    context_tokens: int
    """KV positions to allocate; 0 takes what the model was trained for."""
    threads: int = 0
    """CPU threads; 0 takes one per core that this process may use."""
    scratch_dir: str = ""
    """A private directory (mode 0700) for sockets and links; removed by the owner of the worker."""
    library: str = ""
    """The runtime's shared library, for engines that load one."""
    abi: str = ""
    """The library's ABI by the name of a version; empty finds it."""
    sampling: Sampling | None = None
    """The default of runs. Engines that fix it when the model is loaded can do nothing else."""
    tokenizer: str = ""
    """A `tokenizer.json`, for engines that take tokens instead of text."""
    lora: str = ""
    lora_scale: float = 1.0
    thinking: bool = False
    window_tokens: int = 0
    """The tokens that a layer with a sliding window attends to; 0 if no layer is known to have one.
    """
    recurrent: bool = False
    """Some layers are known to be recurrent: their state has one size, however much was read."""
    pooling: str = ""
    """Not empty for a model that answers nothing: `mean` or `last`, how the states of all tokens
    become one vector, or `rank` for relevance scores."""
    npu: NpuOptions = NpuOptions()


MAX_STATES = 64


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that hold while the model stays loaded."""

    runtime_version: str
    context_tokens: Int64
    measures_prefill: bool
    """Whether `RunStats.cached_tokens` comes from the library's own count."""
    aborts_prefill: bool
    """Whether `abort` ends a prefill that is to be saved within about a second, and the engine
    stays usable."""
    keeps_state: bool = True
    """Whether the KV state outlives a run; else a prompt cache serves the one run after its load.
    """
    rewinds: bool = True
    """Whether a run can reuse any beginning of the KV state.

    If not, it reuses the whole state, or all but its last few tokens, or nothing: a recurrent state
    cannot be taken back, and a saved sliding window lacks the tokens before it."""
    run_sampling: tuple[str, ...] = SAMPLING_FIELDS
    """Fields of `Sampling` that a run may set; the others stay as they were when the model was
    loaded."""
    greedy: bool = True
    """Whether a run can be made to repeat itself exactly: temperature 0, per run or since the model
    was loaded."""
    constrains_json: bool = False
    """Whether `Sampling.json_schema` works."""
    gives_logprobs: bool = False
    """Whether `Sampling.logprobs` works."""
    states: Annotated[int, msgspec.Meta(ge=1, le=MAX_STATES)] = 1
    """How many KV states are in memory at a time. Together they have at most a context's tokens."""
    saves_continued: bool = True
    """Whether a state that was loaded and then continued is known to be saved right. Where nobody
    says so, it is compared with one that was read as a whole."""


class FinishReason(StrEnum):
    STOP = "stop"
    """End-of-sequence token or a stop string."""
    LENGTH = "length"
    """`max_new_tokens` was reached, or the context is full."""
    ABORT = "abort"
    """`abort` was called, or the receiver asked for it."""


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token and its natural log-probability, before temperature and the like."""

    text: str
    logprob: float
    data: tuple[int, ...] = ()
    """Its bytes: a token may be a part of a character."""
    likeliest: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens at this place, as many as the run asked for."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of generated text.

    Always whole UTF-8 characters: a piece may stand for several tokens.
    """

    text: str
    ids: tuple[int, ...] = ()
    """The token ids, only if the run was asked for them (`trace=True`)."""
    logprobs: tuple[float, ...] = ()
    """Natural log-probabilities beside `ids`, where the engine has them."""
    details: tuple[TokenLogprob, ...] = ()
    """The log-probabilities that `Sampling.logprobs` asked for."""


class RunStats(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run, as measured by the engine."""

    finish: FinishReason
    prompt_tokens: Int64
    """0 if neither the library nor a tokenizer counts them."""
    cached_tokens: Int64 | None
    """The part of `prompt_tokens` that was taken from the KV state; None if the library does not
    measure it."""
    prefill_ms: float
    decode_tokens: Int64
    decode_ms: float

    @property
    def prefill_tokens(self) -> int | None:
        if self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens


class Embedding(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The vector that an embedding model makes of a text."""

    vector: NDArray[np.float32]
    """Its shape is (width of the model's hidden layer,); it is not normalised."""
    tokens: int
    """0 if nothing counts them."""


class Relevance(msgspec.Struct, frozen=True, kw_only=True):
    """How well a document answers a query, by a model that was made for that."""

    score: float
    """Higher is better. Its range is the model's."""
    tokens: int
    """Of both texts, with what the model's form puts around them."""


OnToken = Callable[[Token], bool]
"""Receives each piece of text; a true answer ends the run (`FinishReason.ABORT`)."""

OnProgress = Callable[[int, int], None]
"""Receives (tokens done, tokens in total) during a prefill."""


class Engine(Protocol):
    """One loaded model with a KV state, or some of them: `choose` says which one is meant.

    Errors are `EngineError`s; after any of them the engine stays usable.
    """

    @property
    def info(self) -> EngineInfo: ...

    def choose(self, state: int, /) -> None:
        """Let the calls that follow act on this KV state, from 0 to `EngineInfo.states` less 1."""

    def state_tokens(self, state: int, /) -> int:
        """The tokens of this KV state; 0 if it is empty, or another one that grew took its room.

        Only engines with several states are asked. These share the context.
        """

    def tokenize(self, text: str) -> Sequence[int] | None:
        """The tokens of a prompt, an added BOS token included; None if nothing tells them."""

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        """Read `prompt` into a cleared KV state and write that state to `save_to`.

        With `keep_state` the state is not cleared: the prompt's beginning that is in it is reused,
        and only the rest is read. `save_to` is created or replaced. The file's state begins with
        exactly the prompt's tokens, and stays in memory if the engine keeps its state. Errors:
        ContextExceeded; Uncacheable when the library cannot save; Aborted, then no file is
        promised.
        """

    def save(self, path: Path) -> int:
        """Write the KV state to `path`; returns its number of tokens.

        After a prefill that was aborted, that is what it has read. For engines whose info has
        `aborts_prefill`. Errors: EngineError; then no file is promised.
        """

    def load(self, path: Path) -> int:
        """Replace the KV state by the one in `path`; returns its number of tokens.

        Errors: ArtifactLoadError (the state is then empty). A damaged file may kill the process in
        some libraries.
        """

    def rest(self) -> None:
        """Do now what a run on another KV state would have to do first. Errors: EngineError."""

    def clear(self) -> None:
        """Drop the KV state: the next run is cold."""

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        """Prefill what `prompt` has beyond the KV state, then decode.

        The state afterwards begins with the prompt.

        At least one token of the prompt is always prefilled. With `trace`, tokens carry their ids.
        `on_progress` hears of the prefill where the library tells of it, the last time when all is
        read.
        Errors: ContextExceeded; SamplingFixed for a value that this engine cannot change in a run;
        EngineError.
        """

    def embed(self, content: str | tuple[int, ...]) -> Embedding:
        """The vector of a text, or of its tokens. The KV state is undefined afterwards.

        Errors: ContextExceeded; EngineError, also for a model that was not loaded with `pooling`.
        """

    def rank(self, query: str, document: str) -> Relevance:
        """The relevance of a document. The KV state is undefined afterwards.

        Errors: ContextExceeded; EngineError, also for a model that was not loaded to rank.
        """

    def abort(self) -> None:
        """End the current run soon, from any thread. Without a run, it does nothing."""

    def close(self) -> None:
        """Free the model. Idempotent."""
