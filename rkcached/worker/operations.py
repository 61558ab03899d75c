"""The operations of a worker: build a prompt cache, answer a request, check a cache.

They use nothing but the engine port, so they run the same in a child process and in a test. A
success that an engine reports counts only with its effect.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rkcached.engines.base import Engine, FinishReason, OnProgress, Token
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.prefix import common_bytes
from rkcached.errors import USE_PROVE, ArtifactLoadError, EngineError, SamplingFixed, VerifyFailed
from rkcached.worker import protocol
from rkcached.worker.building import BOUNDARY_TOKENS, Builder, digest
from rkcached.worker.engine_state import PROBE_TOKENS, Beginning, Emit, EngineState, since
from rkcached.worker.held import NOBODY, UNKNOWN, Held, Step, owner_of, state_for
from rkcached.worker.traces import agree

if TYPE_CHECKING:
    from rkcached.worker.json_answer import JsonAnswer

_BUILD_IT = "let the daemon build it instead"

# An answer may be longer, but most are not: so much room is made for it.
_USUAL_ANSWER_TOKENS = 256

# So many bytes of text are more than one token in any vocabulary.
_SURELY_A_TOKEN_BYTES = 128


class Session:
    """The operations on one engine. Used by one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._state = EngineState(engine)
        self._builder = Builder(self._state)
        # For the states of conversations, in this operation.
        self._places: list[str] = []

    def build(
        self, operation: protocol.Build, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Built:
        """Build a prompt cache and prove it. Errors: as `Builder.build`."""
        self._places = list(operation.keep_at)
        self._state.choose_free()
        self._make_way(operation.id, emit, by_run=True)
        self._make_room(operation.id, operation.probe, PROBE_TOKENS, emit)
        return self._builder.build(operation, emit, stopped)

    def generate(
        self, operation: protocol.Generate, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Done:
        """Answer a request, from its prompt cache where that can be loaded.

        An answer that has a schema is checked as a whole. An engine that cannot keep to a schema
        sends it in one piece, after the check; an answer that was cut short must be the beginning
        of JSON. Errors: EngineError, among them SamplingFixed, SchemaInvalid and SchemaMismatch.
        """
        info = self._state.info
        sampling = operation.sampling
        if sampling.logprobs is not None and not info.gives_logprobs:
            raise SamplingFixed(
                "this engine gives no log-probabilities",
                param="logprobs",
                hint="leave logprobs out",
            )

        answer = _json_answer(sampling.json_schema) if sampling.json_schema else None
        withheld = answer is not None and not info.constrains_json
        if withheld:
            sampling = msgspec.structs.replace(sampling, json_schema="")

        text: list[str] = []
        self._places = list(operation.keep_at)
        taken_back_bytes = self._bring_state(operation, emit)

        def on_token(token: Token) -> bool:
            text.append(token.text)
            if token.text and not withheld:
                emit(protocol.Piece(id=operation.id, text=token.text, logprobs=token.details))
            return stopped()

        self._state.held = Held(owner=owner_of(operation))
        on_progress = _told(operation, emit)
        stats = self.engine.generate(operation.prompt, sampling, on_token, on_progress=on_progress)
        was_read = bool(text) or stats.finish is not FinishReason.ABORT
        if was_read and not operation.cold:
            asked = operation.prompt.encode()
            self._state.held = Held(
                text=asked + "".join(text).encode(),
                owner=owner_of(operation),
                asked_bytes=len(asked),
                cached_bytes=operation.common_bytes,
                goes_on=operation.goes_on,
            )
        if answer is not None and not stopped():
            if withheld:
                emit(protocol.Piece(id=operation.id, text=answer.check("".join(text))))
            elif stats.finish is FinishReason.STOP:
                answer.check("".join(text))
            else:
                answer.check_beginning("".join(text))

        # One of several states may have lost its room to another.
        lost = taken_back_bytes >= _SURELY_A_TOKEN_BYTES and stats.cached_tokens == 0
        if lost and info.states == 1:
            self._state.info = msgspec.structs.replace(self._state.info, rewinds=False)
        return protocol.Done(id=operation.id, stats=stats, rewinds=self._state.info.rewinds)

    def _bring_state(self, operation: protocol.Generate, emit: Emit) -> int:
        """Load the prompt cache of the request, unless the KV state has as much of the prompt.

        Returns the bytes of the prompt in the state, if it is kept and has to be taken back to
        them; else 0.
        """
        self._state.choose(state_for(self._state.in_order(), operation, self._state.info))
        if not self._state.held.is_continued_by(operation):
            self._make_way(operation.id, emit)
        answer_tokens = min(operation.sampling.max_new_tokens, _USUAL_ANSWER_TOKENS)
        known = []
        if operation.cache is not None and operation.cache.tokens:
            known.append(Beginning(operation.common_bytes, operation.cache.tokens))
        self._make_room(operation.id, operation.prompt, answer_tokens, emit, *known)

        held = self._state.held
        step = held.step(operation, self._state.info)
        if step is Step.KEEP:
            shared_bytes = common_bytes(held.text, operation.prompt.encode())
            return shared_bytes if shared_bytes < len(held.text) else 0

        if step is Step.LOAD and operation.cache is not None:
            emit(self._state.load(operation.id, operation.cache, emit))
        else:
            self._state.empty()
        return 0

    def tokenize(self, operation: protocol.Tokenize) -> protocol.Tokenized:
        """Errors: EngineError."""
        tokens = self.engine.tokenize(operation.text)
        return protocol.Tokenized(id=operation.id, tokens=None if tokens is None else tuple(tokens))

    def embed(self, operation: protocol.Embed) -> protocol.Embedded:
        """The vector of a text or of tokens, of length 1. Errors: EngineError."""
        import numpy as np  # noqa: PLC0415 - 100 ms that only embeddings need

        self._state.held = Held()
        embedding = self.engine.embed(operation.tokens or operation.text)
        # A square of what float32 holds may be too large for it.
        vector = embedding.vector.astype(np.float64)

        length = np.linalg.norm(vector)
        if not length or not np.isfinite(length):
            raise EngineError("the model made no usable vector", hint="is it an embedding model?")

        unit = (vector / length).astype("<f4")
        return protocol.Embedded(id=operation.id, vector=unit.tobytes(), tokens=embedding.tokens)

    def rank(self, operation: protocol.Rank) -> protocol.Ranked:
        """The relevance of a document. Errors: EngineError."""
        self._state.held = Held()
        found = self.engine.rank(operation.query, operation.document)
        if not math.isfinite(found.score):
            raise EngineError("the model made no usable score", hint="is it a reranker?")
        return protocol.Ranked(id=operation.id, score=found.score, tokens=found.tokens)

    def check(self, operation: protocol.Check, emit: Emit) -> protocol.Checked:
        """Load a prompt cache, unless the KV state has its text. Errors: ArtifactLoadError."""
        text = operation.text.encode()
        info = self._state.info
        if text and info.keeps_state:
            for held in self._state.in_order().values():
                # Where there are several, one must have it for everybody.
                serves = held.owner == NOBODY or info.states == 1
                if serves and held.text.startswith(text):
                    return protocol.Checked(id=operation.id, tokens=0)

        self._places = list(operation.keep_at)
        self._state.choose_free()
        self._make_way(operation.id, emit, by_run=True)
        self._make_room(operation.id, operation.text, 0, emit)
        loaded = self._state.load(operation.id, operation.cache, emit)
        emit(loaded)
        if loaded.error:
            raise ArtifactLoadError(loaded.error)
        self._state.held = Held(text, cached_bytes=len(text))
        if operation.probe:
            return self._prove(operation, loaded)
        return protocol.Checked(id=operation.id, tokens=loaded.tokens)

    def _prove(self, operation: protocol.Check, loaded: protocol.Loaded) -> protocol.Checked:
        """Answer the probe from the state that was loaded, and compare. Errors: VerifyFailed.

        With the answer that is expected, or else with the answer from no state.
        """
        greedy = self._state.info.greedy
        if operation.expected is None and not greedy:
            raise VerifyFailed("answers of this runtime cannot be compared", hint=_BUILD_IT)
        if operation.expected == "" and greedy:
            raise VerifyFailed(
                "nobody compared its answer where it was built",
                hint=USE_PROVE,
            )

        self._state.held = Held(owner=UNKNOWN)
        stats, answer, after_ms = self._state.probe(operation.probe, _never)
        self._state.empty()
        reused = stats.cached_tokens
        if reused is None and operation.expected is not None:
            raise VerifyFailed("this runtime does not count reused tokens", hint=_BUILD_IT)
        if reused is not None and reused < loaded.tokens - BOUNDARY_TOKENS:
            raise VerifyFailed(
                f"it is the cache of another text: {reused} of {loaded.tokens} tokens were reused"
            )

        cold_ms = 0.0
        if operation.expected is None:
            _, expected, cold_ms = self._state.probe(operation.probe, _never)
            self._state.empty()
            if not agree(expected, answer, moved=True):
                raise VerifyFailed("with this cache the model answers otherwise than with its text")
        elif greedy and digest(answer) != operation.expected:
            raise VerifyFailed(
                "with this cache the model answers otherwise than where it was built",
                hint=USE_PROVE,
            )

        return protocol.Checked(
            id=operation.id,
            tokens=loaded.tokens,
            load_ms=loaded.load_ms,
            warm_ttft_ms=loaded.load_ms + after_ms,
            cold_ttft_ms=cold_ms,
            verified=VerifyMode.EXACT if greedy else VerifyMode.HIT,
            answer=digest(answer) if greedy else "",
        )

    def keep(self, operation: protocol.Keep, emit: Emit) -> protocol.Checked:
        """Save the conversation in a KV state, where it stays. No error: then it is not saved."""
        self._places = list(operation.keep_at)
        self._state.choose_by_age(operation.age)
        self._make_way(operation.id, emit, by_run=True)
        return protocol.Checked(id=operation.id, tokens=0)

    def tidy(self) -> None:
        """Clear what no run can go on from, when an operation has been answered or has failed."""
        with contextlib.suppress(EngineError):  # the next operation meets the same trouble
            self._state.tidy()

    def rest(self) -> None:
        """Prepare for an operation on another KV state, while none waits."""
        with contextlib.suppress(EngineError):  # as above
            self.engine.rest()

    def _make_room(
        self, operation_id: int, text: str, more_tokens: int, emit: Emit, *known: Beginning
    ) -> None:
        """Save and clear what has no room beside a run of `text` in the chosen KV state.

        `known`: beginnings of the text. The engine would clear something of its own choice, and
        nobody could save that any more.
        """
        chosen = self._state.chosen
        for state in self._state.crowding(text, more_tokens, *known):
            self._state.choose(state)
            self._make_way(operation_id, emit, by_run=True)
            self._state.empty()
        if self._state.chosen != chosen:
            self._state.choose(chosen)

    def _make_way(self, operation_id: int, emit: Emit, *, by_run: bool = False) -> None:
        """Save the conversation in the chosen KV state, before something else takes its place.

        `by_run`: also where that takes a run of the engine, which no request waits for. What cannot
        be saved is read again.
        """
        held = self._state.held
        if not self._places or not held.is_worth_keeping:
            return

        path = Path(self._places.pop(0))
        started = time.perf_counter()
        try:
            if self._state.info.aborts_prefill:
                tokens = self.engine.save(path)
            elif by_run and self._state.info.keeps_state:
                tokens = self._save_by_run(held.text.decode(), path)
            else:
                return  # the state is lost
        except EngineError:
            tokens = 0
        if not tokens:
            with contextlib.suppress(OSError):
                path.unlink()
            return

        self._state.held = held._replace(cached_bytes=len(held.text))
        emit(
            protocol.Saved(
                id=operation_id,
                path=str(path),
                text=held.text.decode(),
                asked_bytes=held.asked_bytes,
                owner=held.owner,
                tokens=tokens,
                save_ms=since(started),
            )
        )

    def _save_by_run(self, text: str, path: Path) -> int:
        """Save the state of `text`, which is in memory, in a run; returns its number of tokens.

        Nobody says what a runtime writes of a state that was continued. So once, the answer to a
        probe on the file is compared with the one on memory. Errors: EngineError.
        """
        info = self._state.info
        if self._state.continues:
            return self.engine.prefill(text, save_to=path, keep_state=True).prompt_tokens
        if not info.greedy:
            raise VerifyFailed("answers of this runtime cannot be compared")

        probe = f"{text}\n"  # longer, so that the whole state counts
        _, before, _ = self._state.probe(probe, _never)
        saved = self.engine.prefill(text, save_to=path, keep_state=True)
        self.engine.clear()
        self.engine.load(path)
        _, after, _ = self._state.probe(probe, _never)
        if before != after:
            self.engine.clear()
            self._state.held = Held()
            raise VerifyFailed("the saved state answers otherwise than the one in memory")

        self._state.continues = True
        return saved.prompt_tokens


def _told(operation: protocol.Generate, emit: Emit) -> OnProgress:
    def on_progress(done: int, total: int) -> None:
        emit(protocol.Progress(id=operation.id, done_tokens=done, total_tokens=total))

    return on_progress


def _never() -> bool:
    return False


def _json_answer(schema: str) -> JsonAnswer:
    # Imported here: few workers need its library.
    from rkcached.worker.json_answer import JsonAnswer  # noqa: PLC0415

    return JsonAnswer(schema)
