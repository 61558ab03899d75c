"""The engine port: what the rest of the program asks of an inference library.

An engine holds one loaded model and one KV state. It is synchronous and used by one thread at a time; only `abort`
may be called from another thread. It lives in a worker process, so it may crash without taking the daemon along.

The KV state is a sequence of token positions. A run reuses the longest common prefix of its prompt's tokens with the
state and prefills only the rest; this makes a wrong or foreign state slow, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine needs to load a model."""

    path: str
    context_tokens: int
    """KV positions to allocate; 0 takes what the model was trained for."""
    threads: int = 0
    """CPU threads; 0 takes one per core that this process may use."""
    library: str = ""
    """The runtime's shared library, for engines that load one."""
    scratch_dir: str
    """A private directory (mode 0700) for sockets and links; removed by the owner of the worker."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that hold while the model stays loaded."""

    runtime_version: str
    context_tokens: int
    measures_prefill: bool
    """`RunStats.cached_tokens` comes from the library's own count."""
    aborts_prefill: bool
    """`abort` ends a run within about a second even during prefill, and the engine stays usable."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. None leaves the engine's own default."""

    max_new_tokens: int = 128
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings; it is not part of the text."""


class FinishReason(StrEnum):
    STOP = "stop"
    """End-of-sequence token or a stop string."""
    LENGTH = "length"
    """`max_new_tokens` reached, or the context is full."""
    ABORT = "abort"
    """`abort` was called, or the receiver asked for it."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of generated text. Always whole UTF-8 characters: a piece may stand for several tokens."""

    text: str
    ids: tuple[int, ...] = ()
    """Token ids, only where the run was asked for them (`trace=True`)."""
    logprobs: tuple[float, ...] = ()
    """Natural log-probabilities beside `ids`, where the engine has them."""


class RunStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one run did, as measured by the engine."""

    finish: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Of `prompt_tokens`, those that were taken from the KV state; the others were prefilled."""
    prefill_ms: float
    decode_tokens: int
    decode_ms: float

    @property
    def prefill_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


OnToken = Callable[[Token], bool]
"""Receives each piece of text; a true answer ends the run (`FinishReason.ABORT`)."""

OnProgress = Callable[[int, int], None]
"""Receives (tokens done, tokens in total) during a prefill."""


class Engine(Protocol):
    """One loaded model with one KV state. Errors are `EngineError`s; after any of them the engine stays usable."""

    @property
    def info(self) -> EngineInfo: ...

    def count_tokens(self, text: str) -> int:
        """How many KV positions a prompt occupies, a BOS token that the model adds included."""

    def prefill(self, prompt: str, *, save_to: Path, on_progress: OnProgress | None = None) -> RunStats:
        """Read `prompt` into a cleared KV state and write that state to `save_to` (created or replaced).

        Nothing is sampled into the state: it holds exactly the prompt's tokens, and stays in memory afterwards.
        Errors: ContextExceeded; Uncacheable when the library cannot save; Aborted, then no file is promised.
        """

    def load(self, path: Path) -> int:
        """Replace the KV state by the one in `path`; returns its number of tokens.

        Errors: ArtifactLoadError (the state is then empty). A damaged file may kill the process in some libraries.
        """

    def clear(self) -> None:
        """Forget the KV state: the next run is cold."""

    def generate(self, prompt: str, sampling: Sampling, on_token: OnToken, *, trace: bool = False) -> RunStats:
        """Prefill what `prompt` has beyond the KV state, then decode; the state afterwards begins with the prompt.

        At least one token of the prompt is always prefilled. With `trace`, tokens carry their ids.
        Errors: ContextExceeded; EngineError for sampling values the engine cannot honour.
        """

    def abort(self) -> None:
        """From any thread: end the current run soon. Without a run, it does nothing."""

    def close(self) -> None:
        """Free the model. Idempotent."""
