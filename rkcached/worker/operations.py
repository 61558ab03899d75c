"""The operations of a worker: build a prompt cache and prove it, answer a request, check a cache.

They use nothing but the engine port, so they run the same in a child process and in a test. A
success that an engine reports counts only with its effect.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rkcached.engines.base import Engine, FinishReason, RunStats, Sampling, Token
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.prefix import common_bytes
from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    ContextExceeded,
    EngineError,
    PromptTooShort,
    SamplingFixed,
    Uncacheable,
    VerifyFailed,
)
from rkcached.host.digests import Signature, signature_of
from rkcached.worker import protocol
from rkcached.worker.held import Held, Step
from rkcached.worker.traces import LIKELIEST, agree

if TYPE_CHECKING:
    from rkcached.worker.json_answer import JsonAnswer

PROBE_TOKENS = 8
"""Tokens of the probe's answer: enough that a wrong state shows, few enough to cost little."""

_MIN_FREE_BYTES = 64 << 20
# A prompt cache of a small prompt fits into this. With less free, a missing file is the disk's
# fault, and no proof that the model cannot save its state.

KEEP_MS = 300.0
"""The part that an aborted build has read is kept if reading it took longer than that."""

# So many bytes of text are more than one token in any vocabulary.
_SURELY_A_TOKEN_BYTES = 128

BOUNDARY_TOKENS = 5
"""A hit may lack so many of the prefix's last tokens: the prefix may end inside a token of the
longer text, and a state that cannot be taken back may go on from a checkpoint before its end."""

Emit = Callable[[protocol.FromWorker], None]


class Session:
    """One engine and the content of its KV state. Used by one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._held = Held()
        # As the engine says, and as its runs have shown.
        self._info = engine.info
        # A state that was loaded, continued and saved was as good as one that was read as a whole.
        self._continues = self._info.saves_continued

    def build(
        self, operation: protocol.Build, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Built:
        """Prefill, save, and prove that the file gives what memory gives.

        Errors: PromptTooShort, ContextExceeded, Uncacheable, VerifyFailed, Aborted; then the file
        is of no use.
        """
        self._make_way(operation, emit, by_run=True)
        self._held = Held()
        try:
            built = self._read(operation, emit, stopped)
            if operation.verify is VerifyMode.OFF:
                return built
            return self._prove_read(operation, built, emit, stopped)
        except VerifyFailed:
            self.engine.clear()  # no answer may begin with what was not proven
            raise

    def _read(
        self, operation: protocol.Build, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Built:
        """Prefill and save: from the base, or from the beginning.

        Errors: as for `build`. When it is aborted, the partial state is kept.
        """
        engine = self.engine
        path = Path(operation.path)
        tokens = engine.count_tokens(operation.prefix)
        self._check_length(operation, tokens)

        base = operation.base
        base_error = ""
        if base is not None:
            base_error = self._bring_base(base, operation, emit, stopped)
            if base_error:
                base = None

        first_done: int | None = None
        last_done = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal first_done, last_done
            if first_done is None:
                first_done = done
            last_done = done
            emit(protocol.Progress(id=operation.id, done_tokens=done, total_tokens=total))
            if stopped():
                engine.abort()  # again: the first may have come just before this prefill began

        started = time.perf_counter()
        try:
            prefill = engine.prefill(
                operation.prefix,
                save_to=path,
                on_progress=on_progress,
                keep_state=base is not None,
            )
        except Aborted:
            read_ms = _since(started)
            if last_done > (first_done or 0) and read_ms > KEEP_MS:
                self._keep(operation, emit, read_ms + _share(base, first_done or 0))
            raise

        reused = prefill.cached_tokens or 0
        prefill_ms = prefill.prefill_ms or _since(started)

        if not path.is_file() or path.stat().st_size == 0:
            raise _nothing_written(path)
        if tokens is None:
            self._check_length(operation, prefill.prompt_tokens)
        return protocol.Built(
            id=operation.id,
            tokens=prefill.prompt_tokens,
            prefill_ms=prefill_ms + _share(base, reused),
            reused_tokens=reused,
            base_error=base_error,
        )

    def _bring_base(
        self,
        base: protocol.Base,
        operation: protocol.Build,
        emit: Emit,
        stopped: Callable[[], bool],
    ) -> str:
        """Load a base; returns why it is of no use, and then the state is empty.

        One that was proven must answer its probe as it did then. Errors: Aborted.
        """
        info = self._info
        comparable = operation.verify is VerifyMode.EXACT and info.greedy
        if not info.measures_prefill:
            return "this runtime does not count reused tokens"
        if not info.rewinds and not base.is_beginning:
            return "this model's state cannot be taken back to where the texts part"
        if not self._continues and not comparable:
            return "this runtime is not known to continue a prompt cache, and cannot be compared"

        if comparable and base.answer:
            if error := self._load_base(base, operation, emit):
                return error
            _, tokens, _ = self._probe(base.probe, stopped)
            if _digest(tokens) != base.answer:
                self.engine.clear()
                return "its answer is another one than when it was proven"

        return self._load_base(base, operation, emit)

    def _load_base(self, base: protocol.Base, operation: protocol.Build, emit: Emit) -> str:
        """Load the file of a base; returns why that failed, if it did."""
        loaded = self._load(operation.id, base.cache, emit)
        self._held = Held()
        return loaded.error

    def _keep(self, operation: protocol.Build, emit: Emit, prefill_ms: float) -> None:
        """Save what an aborted prefill has read, if somebody wants it."""
        if not operation.partial or not self._info.aborts_prefill:
            return
        path = Path(operation.partial)
        try:
            tokens = self.engine.save(path)
        except EngineError:
            path.unlink(missing_ok=True)
            return
        emit(protocol.Kept(id=operation.id, tokens=tokens, prefill_ms=prefill_ms))

    def _prove_read(
        self,
        operation: protocol.Build,
        built: protocol.Built,
        emit: Emit,
        stopped: Callable[[], bool],
    ) -> protocol.Built:
        """Prove what was read and saved. When it is aborted, the file is kept as partial state.

        Errors: VerifyFailed, Aborted.
        """
        started = time.perf_counter()
        try:
            proven = self._prove(operation, built, stopped)
            if built.reused_tokens and not self._continues:
                self._compare_with_whole(operation, proven, stopped)
        except Aborted:
            if operation.partial and built.prefill_ms > KEEP_MS:
                Path(operation.path).replace(operation.partial)
                emit(
                    protocol.Kept(id=operation.id, tokens=built.tokens, prefill_ms=built.prefill_ms)
                )
            raise
        return msgspec.structs.replace(proven, proof_ms=_since(started))

    def _compare_with_whole(
        self, operation: protocol.Build, proven: protocol.Built, stopped: Callable[[], bool]
    ) -> None:
        """Read the probe as a whole: the state that was continued must answer like that, too.

        Once is enough. Errors: VerifyFailed, Aborted.
        """
        self.engine.clear()
        _, tokens, _ = self._probe(operation.probe, stopped)
        if _digest(tokens) != proven.answer:
            raise VerifyFailed(
                "the probe's answer on a continued prompt cache differs from the answer on one "
                "that was read as a whole",
                hint="prompt caches of this model are built as a whole",
            )
        self._continues = True

    def _check_length(self, operation: protocol.Build, tokens: int | None) -> None:
        """Errors: PromptTooShort, ContextExceeded."""
        limit = self._info.context_tokens
        if tokens is not None and tokens < operation.min_tokens:
            raise PromptTooShort(tokens, operation.min_tokens)
        if tokens is not None and tokens >= limit:
            raise ContextExceeded(tokens, limit)

    def _prove(
        self, operation: protocol.Build, built: protocol.Built, stopped: Callable[[], bool]
    ) -> protocol.Built:
        """Run the probe on the state in memory, and again on the loaded file.

        Where the engine keeps no state, the first run is cold. Errors: VerifyFailed, Aborted.
        """
        info = self._info
        _, expected, before_ms = self._probe(operation.probe, stopped)
        cold_ms = before_ms
        if info.keeps_state:
            cold_ms += built.prefill_ms

        self.engine.clear()
        started = time.perf_counter()
        self.engine.load(Path(operation.path))
        load_ms = _since(started)
        try:
            after, answer, after_ms = self._probe(operation.probe, stopped)
        except Aborted:
            self.engine.clear()  # no answer may begin with what was not proven
            raise
        warm_ms = load_ms + after_ms

        if after.cached_tokens is None:
            if warm_ms >= cold_ms:
                raise VerifyFailed(
                    f"the first token took {warm_ms:.0f} ms with the prompt cache "
                    f"and {cold_ms:.0f} ms without",
                    hint="the cache saves no time, so it is not used; "
                    "raise cache.min_tokens to leave the prompt out",
                )
            proved = VerifyMode.TIME
        elif after.cached_tokens < built.tokens - BOUNDARY_TOKENS:
            raise VerifyFailed(
                f"after loading, {after.cached_tokens} of {built.tokens} tokens were reused",
                hint="the cache does not help, so it is not used; "
                "`rkcached regenerate` builds it again",
            )
        else:
            proved = operation.verify if info.greedy else VerifyMode.HIT

        is_exact = operation.verify is VerifyMode.EXACT and info.greedy
        if is_exact and not agree(expected, answer, moved=not info.rewinds):
            raise VerifyFailed(
                "the probe's answer on the loaded cache differs "
                "from the answer on the state in memory",
                hint="the cache is wrong, so it is not used; `rkcached regenerate` builds it again",
            )
        return msgspec.structs.replace(
            built,
            load_ms=load_ms,
            cold_ttft_ms=cold_ms,
            warm_ttft_ms=warm_ms,
            verified=proved,
            answer=_digest(answer) if proved is VerifyMode.EXACT else "",
        )

    def generate(
        self, operation: protocol.Generate, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Done:
        """Answer a request, from its prompt cache where that can be loaded.

        An answer that has a schema is checked as a whole. An engine that cannot keep to a schema
        sends it in one piece, after the check; an answer that was cut short must be the beginning
        of JSON. Errors: EngineError, among them SamplingFixed, SchemaInvalid and SchemaMismatch.
        """
        info = self._info
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
        taken_back_bytes = self._bring_state(operation, emit)

        def on_token(token: Token) -> bool:
            text.append(token.text)
            if token.text and not withheld:
                emit(protocol.Piece(id=operation.id, text=token.text, logprobs=token.details))
            return stopped()

        self._held = Held(owner=operation.owner)
        stats = self.engine.generate(operation.prompt, sampling, on_token)
        if not operation.cold:
            asked = operation.prompt.encode()
            self._held = Held(
                text=asked + "".join(text).encode(),
                owner=operation.owner,
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

        if taken_back_bytes >= _SURELY_A_TOKEN_BYTES and stats.cached_tokens == 0:
            self._info = msgspec.structs.replace(self._info, rewinds=False)
        return protocol.Done(id=operation.id, stats=stats, rewinds=self._info.rewinds)

    def _bring_state(self, operation: protocol.Generate, emit: Emit) -> int:
        """Load the prompt cache of the request, unless the KV state has as much of the prompt.

        Returns the bytes of the prompt in the state, if it is kept and has to be taken back to
        them; else 0.
        """
        if not self._held.is_continued_by(operation):
            self._make_way(operation, emit)

        held = self._held
        step = held.step(operation, self._info)
        if step is Step.KEEP:
            shared_bytes = common_bytes(held.text, operation.prompt.encode())
            return shared_bytes if shared_bytes < len(held.text) else 0

        if step is Step.LOAD and operation.cache is not None:
            emit(self._load(operation.id, operation.cache, emit))
        else:
            self._held = Held()
            self.engine.clear()
        return 0

    def embed(self, operation: protocol.Embed) -> protocol.Embedded:
        """The vector of a text or of tokens, of length 1. Errors: EngineError."""
        import numpy as np  # noqa: PLC0415 - 100 ms that only embeddings need

        self._held = Held()
        embedding = self.engine.embed(operation.tokens or operation.text)
        # A square of what float32 holds may be too large for it.
        vector = embedding.vector.astype(np.float64)

        length = np.linalg.norm(vector)
        if not length or not np.isfinite(length):
            raise EngineError("the model made no usable vector", hint="is it an embedding model?")

        unit = (vector / length).astype("<f4")
        return protocol.Embedded(id=operation.id, vector=unit.tobytes(), tokens=embedding.tokens)

    def check(self, operation: protocol.Check, emit: Emit) -> protocol.Checked:
        """Load a prompt cache, unless the KV state has its text. Errors: ArtifactLoadError."""
        text = operation.text.encode()
        if text and self.engine.info.keeps_state and self._held.text.startswith(text):
            return protocol.Checked(id=operation.id, tokens=0)

        self._make_way(operation, emit, by_run=True)
        loaded = self._load(operation.id, operation.cache, emit)
        emit(loaded)
        if loaded.error:
            raise ArtifactLoadError(loaded.error)
        self._held = Held(text, cached_bytes=len(text))
        return protocol.Checked(id=operation.id, tokens=loaded.tokens)

    def keep(self, operation: protocol.Keep, emit: Emit) -> protocol.Checked:
        """Save the conversation in memory, which stays there. No error: then it is not saved."""
        self._make_way(operation, emit, by_run=True)
        return protocol.Checked(id=operation.id, tokens=0)

    def _make_way(
        self,
        operation: protocol.Generate | protocol.Build | protocol.Check | protocol.Keep,
        emit: Emit,
        *,
        by_run: bool = False,
    ) -> None:
        """Save the conversation in memory, before something else takes its place.

        `by_run`: also where that takes a run of the engine, which no request waits for. What cannot
        be saved is read again.
        """
        held = self._held
        if not operation.keep_at or not held.is_worth_keeping:
            return

        path = Path(operation.keep_at)
        started = time.perf_counter()
        try:
            if self._info.aborts_prefill:
                tokens = self.engine.save(path)
            elif by_run and self._info.keeps_state:
                tokens = self._save_by_run(held.text.decode(), path)
            else:
                return
        except EngineError:
            path.unlink(missing_ok=True)
            return

        self._held = held._replace(cached_bytes=len(held.text))
        emit(
            protocol.Saved(
                id=operation.id,
                path=str(path),
                text=held.text.decode(),
                asked_bytes=held.asked_bytes,
                owner=held.owner,
                tokens=tokens,
                save_ms=_since(started),
            )
        )

    def _save_by_run(self, text: str, path: Path) -> int:
        """Save the state of `text`, which is in memory, in a run; returns its number of tokens.

        Nobody says what a runtime writes of a state that was continued. So once, the answer to a
        probe on the file is compared with the one on memory. Errors: EngineError.
        """

        def stopped() -> bool:
            return False

        info = self._info
        if self._continues:
            return self.engine.prefill(text, save_to=path, keep_state=True).prompt_tokens
        if not info.greedy:
            raise VerifyFailed("answers of this runtime cannot be compared")

        probe = f"{text}\n"  # longer, so that the whole state counts
        _, before, _ = self._probe(probe, stopped)
        saved = self.engine.prefill(text, save_to=path, keep_state=True)
        self.engine.clear()
        self.engine.load(path)
        _, after, _ = self._probe(probe, stopped)
        if before != after:
            self.engine.clear()
            self._held = Held()
            raise VerifyFailed("the saved state answers otherwise than the one in memory")

        self._continues = True
        return saved.prompt_tokens

    def _load(self, operation_id: int, cache: protocol.CacheFile, emit: Emit) -> protocol.Loaded:
        """Load exactly the file that was verified.

        A failure leaves an empty KV state, so the run goes on cold. Before the library touches the
        file, Loading is emitted: if it crashes or hangs then, the file is to blame.
        """
        started = time.perf_counter()
        path = Path(cache.path)
        self._held = Held()
        if not _is_file(path, cache.signature):
            self.engine.clear()
            return protocol.Loaded(
                id=operation_id, error="the file was replaced since it was checked", replaced=True
            )

        emit(protocol.Loading(id=operation_id))
        try:
            tokens = self.engine.load(path)
        except ArtifactLoadError as error:
            return protocol.Loaded(id=operation_id, error=error.message)
        if not _is_file(path, cache.signature):
            self.engine.clear()
            return protocol.Loaded(
                id=operation_id, error="the file was replaced while it was loaded", replaced=True
            )

        return protocol.Loaded(id=operation_id, tokens=tokens, load_ms=_since(started))

    def _probe(
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
                first_ms.append(_since(started))
            tokens.append(token)
            return stopped()

        info = self._info
        fields = info.run_sampling
        compares = info.gives_logprobs and not info.rewinds
        sampling = Sampling(
            max_new_tokens=PROBE_TOKENS,
            temperature=0.0 if "temperature" in fields else None,
            seed=0 if "seed" in fields else None,
            logprobs=LIKELIEST if compares else None,
        )
        stats = self.engine.generate(prompt, sampling, on_token, trace=True)
        if stopped():
            raise Aborted("the build was stopped")
        time_ms = first_ms[0] if first_ms else _since(started)
        return stats, tokens, time_ms


def _share(base: protocol.Base | None, tokens: int) -> float:
    """How long reading these first tokens of a base took, in milliseconds."""
    if base is None or not base.tokens:
        return 0.0
    return base.prefill_ms * min(tokens, base.tokens) / base.tokens


def _digest(tokens: list[Token]) -> str:
    """SHA-256 of a traced answer."""
    answer = [(token.text, token.ids) for token in tokens]
    return hashlib.sha256(msgspec.json.encode(answer)).hexdigest()


def _json_answer(schema: str) -> JsonAnswer:
    # Imported here: few workers need its library.
    from rkcached.worker.json_answer import JsonAnswer  # noqa: PLC0415

    return JsonAnswer(schema)


def _nothing_written(path: Path) -> EngineError:
    """The error of a save that reported success and wrote nothing.

    The disk is full, or this model has no state to save.
    """
    if shutil.disk_usage(path.parent).free < _MIN_FREE_BYTES:
        return EngineError(
            "the prompt cache could not be written: the disk is full", hint="free some space"
        )
    return Uncacheable(
        "the runtime reported success but wrote no prompt cache",
        hint="this model cannot save its state with this runtime; "
        "requests are answered without a cache",
    )


def _is_file(path: Path, signature: Signature) -> bool:
    try:
        return signature_of(path.stat()) == signature
    except OSError:
        return False


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
