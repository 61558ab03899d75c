"""One run of the RKLLM runtime, as its callback tells it.

Knows the library's results, calls nothing of it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from rkcached.engines.base import FinishReason, OnToken, Sampling, Token
from rkcached.engines.rkllm.abi import CallState
from rkcached.engines.stops import StopStrings
from rkcached.errors import EngineError

if TYPE_CHECKING:
    import numpy as np


class Run:
    """One run: what the callback collects, on whichever thread it comes."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        limit: int,
        on_token: OnToken | None = None,
        trace: bool = False,
        saves: bool = False,
        wants_hidden: bool = False,
        ends_itself: bool = False,
    ) -> None:
        self.sampling = sampling
        self.saves = saves
        """An aborted run that saves leaves the runtime in a state that crashes: it goes to its end.
        """
        self.prompt_ids = 0
        """Tokens of the prompt, where a tokenizer counted them."""
        self.started = 0.0
        self.finished = threading.Event()
        self.aborted = False
        self.prefill_tokens = 0
        self.new_tokens = 0
        """Tokens that the runtime generated, whether we wanted them or not."""
        self.wanted_tokens = 0
        self.hidden: np.ndarray[Any, Any] | None = None
        self._wants_hidden = wants_hidden
        # The library ends the run at `max_new_tokens`; an abort would race with that and could hit
        # the next run.
        self._ends_itself = ends_itself
        self._on_token = on_token
        self._trace = trace
        self.limit = limit
        self._stops = StopStrings(sampling.stop)
        # Bytes of a character that is not complete.
        self._held = b""
        self._ids: list[int] = []
        # Nothing more is wanted.
        self._over = False
        self._first = 0.0
        self._last = 0.0
        self._perf_prefill_ms = 0.0
        self._failed = False
        self._raised: BaseException | None = None

    @property
    def prefill_ms(self) -> float:
        return self._perf_prefill_ms or (((self._first or self._last) - self.started) * 1000)

    @property
    def decode_ms(self) -> float:
        return (self._last - self._first) * 1000 if self._first else 0.0

    def finish(self, context_tokens: int, prompt_tokens: int = 0) -> FinishReason:
        if self._stops.found:
            return FinishReason.STOP
        if self.aborted:
            return FinishReason.ABORT

        full = self.wanted_tokens >= self.limit or prompt_tokens + self.new_tokens >= context_tokens
        return FinishReason.LENGTH if full else FinishReason.STOP

    def take(self, result: Any, state: int) -> bool:
        """One callback; a true answer asks for the run's end."""
        self._last = time.perf_counter()
        if result is None and state in (CallState.NORMAL, CallState.WAITING):
            return False

        match state:
            case CallState.FINISH:
                if hasattr(result, "perf"):
                    self.prefill_tokens = int(result.perf.prefill_tokens)
                    self._perf_prefill_ms = float(result.perf.prefill_time_ms)
                self.finished.set()
                return False
            case CallState.ERROR:
                self._failed = True
                self.finished.set()
                return False
            case CallState.NORMAL | CallState.WAITING | CallState.GET_LAST_HIDDEN_LAYER:
                if self._wants_hidden:
                    self._take_hidden(result.last_hidden_layer)
                    return False
                return self._take_token(
                    result.text, int(result.token_id), waiting=state == CallState.WAITING
                )
            case _:
                return False

    def stop_because(self, error: BaseException) -> None:
        self._raised = error
        self._over = True

    def deliver_rest(self) -> None:
        """Text that was held back because a stop string could have begun with it."""
        rest = self._stops.rest()
        if rest and not self._over:
            self._deliver(rest)

    def raise_failure(self) -> None:
        if self._raised is not None:
            raise self._raised
        if self._failed:
            raise EngineError(
                f"RKLLM reported an error after {self.new_tokens} tokens",
                hint="the runtime's own lines in the log say why",
            )
        if not self.finished.is_set() and self._last:
            raise EngineError("RKLLM ended the run without saying so")

    def _take_token(self, text: bytes | None, token_id: int, *, waiting: bool) -> bool:
        self._first = self._first or self._last
        self.new_tokens += 1
        if self._over or self._on_token is None:
            return False

        if self.limit == 0:
            self._over = True
            return True
        self.wanted_tokens += 1
        if self._trace:
            self._ids.append(token_id)

        if waiting:
            self._held += text or b""
        elif text:
            self._deliver(self._stops.feed(self._whole(text)))

        full = self.wanted_tokens >= self.limit
        self._over = self._stops.found or self.aborted or full
        return self._over and not (full and self._ends_itself)

    def _whole(self, text: bytes) -> str:
        """A character that was waited for comes whole, or as its last bytes.

        Nobody documents which.
        """
        held = self._held
        self._held = b""
        for candidate in (text, held + text):
            with contextlib.suppress(UnicodeDecodeError):
                return candidate.decode()
        return (held + text).decode(errors="replace")

    def _deliver(self, text: str) -> None:
        if not text or self._on_token is None:
            return

        ids = tuple(self._ids)
        self._ids = []
        if self._on_token(Token(text=text, ids=ids)):
            self.aborted = True

    def _take_hidden(self, layer: Any) -> None:
        """Copies: the runtime's buffer is its own again once the callback returns."""
        if not layer.hidden_states or layer.num_tokens <= 0:
            return

        import numpy as np  # noqa: PLC0415 - 100 ms that only embeddings need

        shape = (int(layer.num_tokens), int(layer.embd_size))
        self.hidden = np.ctypeslib.as_array(layer.hidden_states, shape=shape).astype(
            np.float32, copy=True
        )
