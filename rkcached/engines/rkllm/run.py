"""One run of the RKLLM runtime: the results of its callbacks become tokens and figures.

This module knows the library's results, and calls no function of it.
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
    """Collects the results of one run, on whichever thread the callback comes."""

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
        """A run that saves goes to its end: aborted, it would leave the runtime in a state that
        crashes."""
        self.prompt_ids = 0
        """The number of the prompt's tokens, if a tokenizer counted them."""
        self.started = 0.0
        self.finished = threading.Event()
        self.aborted = False
        self.prefill_tokens = 0
        self.new_tokens = 0
        """The number of tokens that the runtime generated, wanted or not."""
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
        # The bytes of a character that is not complete.
        self._held = b""
        self._ids: list[int] = []
        # Whether nothing more is wanted.
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
        if not self._first:
            return 0.0
        return (self._last - self._first) * 1000

    def finish(self, context_tokens: int, prompt_tokens: int = 0) -> FinishReason:
        if self._stops.found:
            return FinishReason.STOP
        if self.aborted:
            return FinishReason.ABORT

        context_full = prompt_tokens + self.new_tokens >= context_tokens
        if context_full or self.wanted_tokens >= self.limit:
            return FinishReason.LENGTH
        return FinishReason.STOP

    def take(self, result: Any, state: int) -> bool:
        """Take the result of one callback; a true answer asks for the run's end."""
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
        """Deliver the text that was held back because it could have begun a stop string."""
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
        """Complete a character that was waited for.

        It comes whole, or as its last bytes: that is not documented.
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
        """Copy the states: the runtime's buffer is its own again once the callback returns."""
        if not layer.hidden_states or layer.num_tokens <= 0:
            return

        import numpy as np  # noqa: PLC0415 - 100 ms that only embeddings need

        shape = (int(layer.num_tokens), int(layer.embd_size))
        states = np.ctypeslib.as_array(layer.hidden_states, shape=shape)
        self.hidden = states.astype(np.float32, copy=True)
