"""One run of llama.cpp's server: its chunks become tokens, statistics or an error."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rkcached.engines.base import FinishReason, OnProgress, OnToken, RunStats, Token, TokenLogprob
from rkcached.errors import ContextExceeded, EngineError, SchemaInvalid

_UNCOMPILED = b"failed to compile JSON schema"


class Run:
    """Receives the chunks of one run; a true answer stops it.

    First come chunks with the progress of the prefill (the first before any work), then one for each token whose text
    is complete, then one with the reason for the end and the timings. A run that was stopped has no last chunk.
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
        self.before_first: Callable[[], None] | None = None
        """Called before the first token is delivered; what it raises ends the run."""
        self._error: dict[str, Any] | None = None
        self._raised: BaseException | None = None

    def __call__(self, chunk: dict[str, Any]) -> bool:
        try:
            wants_end = self._take(chunk)
        except BaseException as error:  # noqa: BLE001 - xllamacpp would drop it; raise_failure raises it again
            self._raised = error
            wants_end = True
        self.stopped = wants_end or self._abort.is_set()
        return self.stopped

    def raise_failure(self) -> None:
        if self._raised is not None:
            raise self._raised
        if self._error is not None:
            if self._error.get("type") == "exceed_context_size_error":
                raise ContextExceeded(int(self._error["n_prompt_tokens"]), int(self._error["n_ctx"]))
            raise EngineError(f"llama.cpp refused the request: {self._error.get('message')}")
        if self.finish is FinishReason.ABORT and not self.stopped:
            raise EngineError("llama.cpp ended the run without a result")

    def stats(self, *, count_decoded: bool) -> RunStats:
        return RunStats(
            finish=self.finish,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self._cached_tokens,
            prefill_ms=self._prefill_ms,
            decode_tokens=self._decode_tokens if count_decoded else 0,
            decode_ms=self._decode_ms if count_decoded else 0.0,
        )

    def _take(self, chunk: dict[str, Any]) -> bool:
        if (error := chunk.get("error")) is not None:
            self._error = error
            return False
        if (progress := chunk.get("prompt_progress")) is not None:
            self._take_progress(progress)
            return False
        choice = chunk["choices"][0]
        if choice["finish_reason"] is not None:  # the last chunk; one before it may have timings as well
            timings = chunk["timings"]
            self.finish = FinishReason(choice["finish_reason"])
            self.prompt_tokens = timings["cache_n"] + timings["prompt_n"]
            self._cached_tokens = timings["cache_n"]
            self._prefill_ms = timings["prompt_ms"]
            self._decode_tokens = timings["predicted_n"]
            self._decode_ms = timings["predicted_ms"]
        else:
            if self.before_first is not None:
                self.before_first()
                self.before_first = None
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
        # A token without text may be the beginning of a stop string; its id then goes with the next piece.
        if not text or self._on_token is None:
            return False
        token = Token(text=text, ids=tuple(self._ids), logprobs=tuple(self._logprobs), details=tuple(self._details))
        self._ids.clear()
        self._logprobs.clear()
        self._details.clear()
        return self._on_token(token)


class Grammar:
    """Notices a JSON schema that llama.cpp cannot keep to: it then generates freely, and says so on stderr only.

    Until the first token stderr goes to memory. What llama.cpp said otherwise is passed on; the schema is a client's,
    and stays out of the log.
    """

    def __enter__(self) -> Self:
        self._kept = os.memfd_create("stderr")
        self._stderr = os.dup(2)
        os.dup2(self._kept, 2)
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def check(self) -> None:
        """To be called before the first token counts. Errors: SchemaInvalid."""
        _, found, why = self._release().partition(_UNCOMPILED)
        if found:
            reason = why.partition(b"\n")[0].decode(errors="replace").strip(": ")
            raise SchemaInvalid(f"llama.cpp cannot keep to this schema: {reason}", hint="leave that out of the schema")

    def _release(self) -> bytes:
        """Give stderr back; returns what went to memory."""
        if self._stderr < 0:
            return b""
        os.dup2(self._stderr, 2)
        said = os.pread(self._kept, 1 << 16, 0)
        if said and _UNCOMPILED not in said:
            os.write(2, said)
        os.close(self._stderr)
        os.close(self._kept)
        self._stderr = -1
        return said


def _detail(entry: dict[str, Any], likeliest: int) -> TokenLogprob:
    return TokenLogprob(
        text=entry["token"],
        logprob=entry["logprob"],
        data=tuple(entry["bytes"]),
        likeliest=tuple(_detail(other, 0) for other in entry.get("top_logprobs", ())[:likeliest]),
    )
