"""An engine and the content of its KV state: loading a file into it, and asking it a probe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rkcached.engines.base import Engine, RunStats, Sampling, Token
from rkcached.engines.prefix import common_bytes
from rkcached.errors import Aborted, ArtifactLoadError
from rkcached.host.digests import Signature, signature_of
from rkcached.worker import protocol
from rkcached.worker.held import UNKNOWN, Held, free
from rkcached.worker.traces import LIKELIEST

PROBE_TOKENS = 8
"""Tokens of the probe's answer: enough that a wrong state shows, few enough to cost little."""

_SEAM_TOKENS = 4
"""A text may have so many more tokens than its two parts have on their own."""

Emit = Callable[[protocol.FromWorker], None]


class Beginning(NamedTuple):
    """The first bytes of a text, and the number of tokens that they have at most."""

    size_bytes: int
    tokens: int


class EngineState:
    """One engine and the content of its KV state. Used by one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info = engine.info
        """As the engine says, and as its runs have shown."""
        self.continues = self.info.saves_continued
        """A state that was loaded, continued and saved was as good as one that was read as a
        whole."""
        self._helds = [Held()] * self.info.states
        # The KV states in the order in which they were chosen; the last one is the chosen one.
        self._order = list(range(self.info.states))
        if self.info.states > 1:
            engine.choose(self._order[-1])

    @property
    def moves(self) -> bool:
        """Whether a loaded state may lie elsewhere in memory than the one that was saved.

        Where several share their room, a state lies in what the others have left.
        """
        return not self.info.rewinds or self.info.states > 1

    @property
    def chosen(self) -> int:
        return self._order[-1]

    @property
    def held(self) -> Held:
        """The content of the chosen KV state."""
        return self._helds[self._order[-1]]

    @held.setter
    def held(self, held: Held) -> None:
        self._helds[self._order[-1]] = held

    def in_order(self) -> dict[int, Held]:
        """The content of each KV state, the least recently chosen first."""
        for state, held in enumerate(self._helds):
            if held.text and self.info.states > 1 and not self.engine.state_tokens(state):
                self._helds[state] = Held()
        return {state: self._helds[state] for state in self._order}

    def choose(self, state: int) -> None:
        """Let what follows act on this KV state."""
        self._order.remove(state)
        self._order.append(state)
        self.engine.choose(state)

    def choose_free(self) -> None:
        """Choose an empty KV state, or else the one that was not chosen for the longest time."""
        self.choose(free(self.in_order()))

    def choose_by_age(self, age: int) -> None:
        """Choose the KV state after which so many others were chosen."""
        self.choose(list(self.in_order())[-1 - age])

    def crowding(self, text: str, more_tokens: int, *known: Beginning) -> list[int]:
        """The KV states that have no room beside a run: those chosen longest ago first.

        `more_tokens`: so many come after the text of the run. `known`: beginnings of that.
        """
        if self.info.states == 1:
            return []
        *others, _ = self.in_order()
        sizes = {state: self.engine.state_tokens(state) for state in others}
        room = self.info.context_tokens - sum(sizes.values()) - more_tokens
        if not any(sizes.values()) or room >= self._most_tokens(text, known):
            return []

        room -= len(self.engine.tokenize(text) or ())
        crowding = []
        for state, tokens in sizes.items():
            if room >= 0:
                break
            if tokens:
                crowding.append(state)
                room += tokens
        return crowding

    def _most_tokens(self, text: str, known: Sequence[Beginning]) -> int:
        """So many tokens a run of this text has at most. To count them would take much longer."""
        data = text.encode()
        held = Beginning(common_bytes(self.held.text, data), self.engine.state_tokens(self.chosen))
        # A token has a byte at least, and one more may stand before the first.
        return min(
            len(data) - beginning.size_bytes + beginning.tokens + _SEAM_TOKENS
            for beginning in (Beginning(0, 0), held, *known)
        )

    def tidy(self) -> None:
        """Clear the KV states that no run can go on from.

        They take memory, and room from those that a run can go on from.
        """
        if self.info.states == 1:
            return

        try:
            for state, held in enumerate(self._helds):
                if not held.text and self.engine.state_tokens(state):
                    self.engine.choose(state)
                    self.engine.clear()
                    self._helds[state] = Held()
        finally:
            self.engine.choose(self.chosen)

    def empty(self) -> None:
        """Clear the chosen KV state."""
        self.held = Held(owner=UNKNOWN)  # should that fail, its content is nobody's
        self.engine.clear()
        self.held = Held()

    def load(self, operation_id: int, cache: protocol.CacheFile, emit: Emit) -> protocol.Loaded:
        """Load exactly the file that was verified.

        A failure leaves an empty KV state, so the run goes on cold. Before the library touches the
        file, Loading is emitted: if it crashes or hangs then, the file is to blame.
        """
        started = time.perf_counter()
        path = Path(cache.path)
        self.held = Held(owner=UNKNOWN)  # until it is known what is in it
        if not _is_file(path, cache.signature):
            self.empty()
            return protocol.Loaded(
                id=operation_id, error="the file was replaced since it was checked", replaced=True
            )

        emit(protocol.Loading(id=operation_id))
        try:
            tokens = self.engine.load(path)
        except ArtifactLoadError as error:
            self.held = Held()
            return protocol.Loaded(id=operation_id, error=error.message)
        if not _is_file(path, cache.signature):
            self.empty()
            return protocol.Loaded(
                id=operation_id, error="the file was replaced while it was loaded", replaced=True
            )

        self.held = Held()
        return protocol.Loaded(id=operation_id, tokens=tokens, load_ms=since(started))

    def probe(
        self, prompt: str, stopped: Callable[[], bool]
    ) -> tuple[RunStats, list[Token], float]:
        """Run the probe greedily.

        Returns its figures, its traced tokens, and the time to the first one in ms.
        """
        if stopped():
            raise Aborted("the build was stopped")

        tokens: list[Token] = []
        first_ms: list[float] = []
        started = time.perf_counter()

        def on_token(token: Token) -> bool:
            if not first_ms:
                first_ms.append(since(started))
            tokens.append(token)
            return stopped()

        info = self.info
        fields = info.run_sampling
        compares = info.gives_logprobs and self.moves
        sampling = Sampling(
            max_new_tokens=PROBE_TOKENS,
            temperature=0.0 if "temperature" in fields else None,
            seed=0 if "seed" in fields else None,
            logprobs=LIKELIEST if compares else None,
        )
        stats = self.engine.generate(prompt, sampling, on_token, trace=True)
        if stopped():
            raise Aborted("the build was stopped")
        time_ms = first_ms[0] if first_ms else since(started)
        return stats, tokens, time_ms


def _is_file(path: Path, signature: Signature) -> bool:
    try:
        return signature_of(path.stat()) == signature
    except OSError:
        return False


def since(started: float) -> float:
    """Milliseconds since `started`, a value of `time.perf_counter`."""
    return (time.perf_counter() - started) * 1000
