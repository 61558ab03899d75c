"""One run of llama.cpp's server: its chunks become tokens, statistics or an error."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rkcached.engines.base import FinishReason, OnProgress, OnToken, RunStats, Token, TokenLogprob
from rkcached.errors import ContextExceeded, EngineError, SchemaInvalid

_READ_BYTES = 1 << 16

# Words in llama.cpp's lines about grammars. Lines about anything else are passed on to the log.
_OF_GRAMMARS = (b"llg", b"grammar", b"lexer", b"schema")

_PREFACE = re.compile(r"^.*? E |llg error: |at \d+\(\d+\): |failed to compile JSON schema: ")


class Run:
    """Receives the chunks of one run; its answer to a chunk is true to stop the run.

    First come chunks with the progress of the prefill (the first before any work), then one for
    each token whose text is complete, then one with the reason for the end and the timings. A run
    that was stopped has no last chunk.
    """

    def __init__(
        self,
        abort: threading.Event,
        *,
        on_token: OnToken | None = None,
        on_progress: OnProgress | None = None,
        likeliest: int | None = None,
    ) -> None:
        self.finish = FinishReason.ABORT
        self.prompt_tokens = 0
        self.stopped = False
        self._abort = abort
        self._on_token = on_token
        self._on_progress = on_progress
        self._cached_tokens = 0
        self._prefill_ms = 0.0
        self._decode_tokens = 0
        self._decode_ms = 0.0
        self._decode_started = time.monotonic()
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._likeliest = likeliest
        self._details: list[TokenLogprob] = []
        self.before_each: Callable[[], None] | None = None
        """Is called before each token is delivered, and before the end. An error ends the run."""
        self.least_cached = 0
        """The run must reuse so many tokens of the KV state, or none: layers with windows lack the
        tokens before. llama.cpp would reuse fewer, and answer from a state with a gap."""
        self.lacks_tokens = False
        """It was stopped because it would have reused fewer. The run can begin again."""
        self._error: dict[str, Any] | None = None
        self._raised: BaseException | None = None

    def __call__(self, chunk: dict[str, Any]) -> bool:
        try:
            wants_end = self._take(chunk)
        except BaseException as error:  # noqa: BLE001 - xllamacpp drops it; raise_failure has it
            self._raised = error
            wants_end = True

        self.stopped = wants_end or self._abort.is_set()
        return self.stopped

    def raise_failure(self) -> None:
        if self._raised is not None:
            raise self._raised
        if self._error is not None:
            if self._error.get("type") == "exceed_context_size_error":
                raise ContextExceeded(
                    int(self._error["n_prompt_tokens"]), int(self._error["n_ctx"])
                )
            raise EngineError(f"llama.cpp refused the request: {self._error.get('message')}")

        if self.finish is FinishReason.ABORT and not self.stopped:
            raise EngineError("llama.cpp ended the run without a result")

    def stats(self, *, count_decoded: bool) -> RunStats:
        """The figures; those of decoding are 0 unless they are to be counted."""
        decode_tokens = 0
        decode_ms = 0.0
        if count_decoded:
            decode_tokens = self._decode_tokens
            decode_ms = self._decode_ms

        return RunStats(
            finish=self.finish,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self._cached_tokens,
            prefill_ms=self._prefill_ms,
            decode_tokens=decode_tokens,
            decode_ms=decode_ms,
        )

    @property
    def state_tokens(self) -> int:
        """The tokens that the run has left in its KV state, if it was not stopped."""
        return self.prompt_tokens + self._decode_tokens

    def _take(self, chunk: dict[str, Any]) -> bool:
        if (error := chunk.get("error")) is not None:
            self._error = error
            return False

        if (progress := chunk.get("prompt_progress")) is not None:
            self._take_progress(progress)
            self.lacks_tokens = 0 < self._cached_tokens < self.least_cached
            return self.lacks_tokens

        if self.before_each is not None:
            self.before_each()

        choice = chunk["choices"][0]
        # The reason marks the last chunk; the one before it may have timings as well.
        if choice["finish_reason"] is not None:
            timings = chunk["timings"]
            self.finish = FinishReason(choice["finish_reason"])
            self.prompt_tokens = timings["cache_n"] + timings["prompt_n"]
            self._cached_tokens = timings["cache_n"]
            self._prefill_ms = timings["prompt_ms"]
            self._decode_tokens = timings["predicted_n"]
            self._decode_ms = timings["predicted_ms"]
        else:
            self._decode_tokens += 1
            self._decode_ms = (time.monotonic() - self._decode_started) * 1000
            for entry in (choice["logprobs"] or {}).get("content", ()):
                self._ids.append(entry["id"])
                self._logprobs.append(entry["logprob"])
                if self._likeliest is not None:
                    self._details.append(_detail(entry, self._likeliest))

        return self._deliver(choice["text"])

    def _take_progress(self, progress: dict[str, Any]) -> None:
        self.prompt_tokens = progress["total"]
        self._cached_tokens = progress["cache"]
        self._prefill_ms = float(progress["time_ms"])
        self._decode_started = time.monotonic()
        if self._on_progress:
            self._on_progress(progress["processed"], progress["total"])

    def _deliver(self, text: str) -> bool:
        # A token without text may begin a stop string; its id then goes with the next piece.
        if not text or self._on_token is None:
            return False

        token = Token(
            text=text,
            ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            details=tuple(self._details),
        )
        self._ids.clear()
        self._logprobs.clear()
        self._details.clear()
        return self._on_token(token)


class Grammar:
    """Proves before each piece of an answer that llama.cpp still enforces the JSON schema.

    llama.cpp goes on without a grammar that it cannot compile, or whose parser gives up or panics
    at any token, and reports that on stderr only, in many different words. At our verbosity it
    prints errors only. So a run with a schema counts as held to it as long as nothing at all has
    been printed. Until its end stderr goes to memory: its text quotes the schema, which is a
    client's and stays out of the log.
    """

    def __enter__(self) -> Self:
        self._kept = os.memfd_create("stderr")
        self._stderr = os.dup(2)
        os.dup2(self._kept, 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)
        printed = os.pread(self._kept, _READ_BYTES, 0)
        if printed and not any(word in printed for word in _OF_GRAMMARS):
            os.write(2, printed)
        os.close(self._stderr)
        os.close(self._kept)

    def check(self) -> None:
        """Errors: SchemaInvalid when llama.cpp has printed anything since the run began."""
        if os.fstat(self._kept).st_size == 0:
            return

        printed = os.pread(self._kept, _READ_BYTES, 0).decode(errors="replace")
        raise SchemaInvalid(
            f"llama.cpp cannot keep to this schema: {_reason(printed)}",
            hint="leave that out of the schema",
        )


def _reason(printed: str) -> str:
    """llama.cpp's message, without its time stamp and its places in the grammar."""
    lines = printed.splitlines() or [""]
    first = next((line for line in lines if " E " in line), lines[0])
    # The details of a pattern that is wrong.
    details = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([_PREFACE.sub("", first).strip(), *details[:1]])[:200]


def _detail(entry: dict[str, Any], likeliest: int) -> TokenLogprob:
    return TokenLogprob(
        text=entry["token"],
        logprob=entry["logprob"],
        data=tuple(entry["bytes"]),
        likeliest=tuple(_detail(other, 0) for other in entry.get("top_logprobs", ())[:likeliest]),
    )
