"""What a worker does with its engine: build a prompt cache and prove it, answer a request, check a cache.

Plain functions over the engine port, so that they run the same in a child process and in a test. No success of the
engine is believed without its effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rkcached.digests import Signature
from rkcached.engines.base import Engine, RunStats, Sampling, Token
from rkcached.errors import Aborted, ArtifactLoadError, ContextExceeded, PromptTooShort, Uncacheable, VerifyFailed
from rkcached.worker import protocol
from rkcached.worker.protocol import VerifyMode

PROBE_TOKENS = 8
"""Tokens of the probe's answer: enough that a wrong state shows, few enough to cost little."""

BOUNDARY_TOKENS = 4
"""A prefix may end inside a token of the longer text, so a hit may lack a few of the prefix's last tokens."""

Emit = Callable[[protocol.FromWorker], None]


class Session:
    """One engine and what is known of its KV state. Used by one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._resident = ""
        """Fingerprint of the prompt cache that the KV state was loaded from and still begins with."""

    def build(self, operation: protocol.Build, emit: Emit, stopped: Callable[[], bool]) -> protocol.Built:
        """Prefill, save, and prove that the file gives what memory gives.

        Errors: PromptTooShort, ContextExceeded, Uncacheable, VerifyFailed, Aborted; then the file is of no use.
        """
        engine, path = self.engine, Path(operation.path)
        self._resident = ""
        tokens = engine.count_tokens(operation.prefix)
        if tokens < operation.min_tokens:
            raise PromptTooShort(tokens, operation.min_tokens)
        if tokens >= engine.info.context_tokens:
            raise ContextExceeded(tokens, engine.info.context_tokens)

        def on_progress(done: int, total: int) -> None:
            emit(protocol.Progress(id=operation.id, done_tokens=done, total_tokens=total))
            if stopped():
                engine.abort()  # again: the first may have come just before this prefill began

        started = time.perf_counter()
        prefill = engine.prefill(operation.prefix, save_to=path, on_progress=on_progress)
        prefill_ms = prefill.prefill_ms or _since(started)
        if not path.is_file() or path.stat().st_size == 0:
            raise Uncacheable(
                "the runtime reported success but wrote no prompt cache",
                hint="this model cannot save its state with this runtime; requests are answered without a cache",
            )
        if operation.verify is VerifyMode.OFF:
            return protocol.Built(
                id=operation.id,
                tokens=prefill.prompt_tokens,
                prefill_ms=prefill_ms,
                load_ms=0.0,
                cold_ttft_ms=0.0,
                warm_ttft_ms=0.0,
                verified=operation.verify,
            )
        in_memory, memory_tokens, memory_ttft_ms = self._probe(operation.probe, stopped)
        engine.clear()
        started = time.perf_counter()
        engine.load(path)
        load_ms = _since(started)
        restored, restored_tokens, restored_ttft_ms = self._probe(operation.probe, stopped)
        if restored.cached_tokens < prefill.prompt_tokens - BOUNDARY_TOKENS:
            raise VerifyFailed(
                f"after loading, {restored.cached_tokens} of {prefill.prompt_tokens} tokens were reused",
                hint="the prompt cache does not help; it is not published",
            )
        if operation.verify is VerifyMode.EXACT and (
            memory_tokens != restored_tokens or in_memory.prefill_tokens != restored.prefill_tokens
        ):
            raise VerifyFailed(
                "the probe's answer on the loaded cache differs from the answer on the state in memory",
                hint="the prompt cache is not what was prefilled; it is not published",
            )
        return protocol.Built(
            id=operation.id,
            tokens=prefill.prompt_tokens,
            prefill_ms=prefill_ms,
            load_ms=load_ms,
            cold_ttft_ms=prefill_ms + memory_ttft_ms,
            warm_ttft_ms=load_ms + restored_ttft_ms,
            verified=operation.verify,
        )

    def generate(self, operation: protocol.Generate, emit: Emit, stopped: Callable[[], bool]) -> protocol.Done:
        """Answer a request, from its prompt cache where that can be loaded. Errors: EngineError."""
        if operation.cold:
            self.engine.clear()
        if operation.cache is None:
            self._resident = ""
        elif operation.cache.fingerprint != self._resident:
            emit(self._load(operation.id, operation.cache))

        def on_token(token: Token) -> bool:
            if token.text:
                emit(protocol.Piece(id=operation.id, text=token.text))
            return stopped()

        return protocol.Done(
            id=operation.id, stats=self.engine.generate(operation.prompt, operation.sampling, on_token)
        )

    def check(self, operation: protocol.Check) -> protocol.Checked:
        """Load a prompt cache. Errors: ArtifactLoadError."""
        self._resident = ""
        loaded = self._load(operation.id, operation.cache)
        if loaded.error:
            raise ArtifactLoadError(loaded.error)
        return protocol.Checked(id=operation.id, tokens=loaded.tokens)

    def _load(self, operation_id: int, cache: protocol.CacheFile) -> protocol.Loaded:
        """Load exactly the file that was verified. A failure leaves an empty KV state, so the run goes on cold."""
        started = time.perf_counter()
        self._resident = ""
        path = Path(cache.path)
        if not _is_file(path, cache.signature):
            return protocol.Loaded(id=operation_id, error="the file was replaced since it was checked", replaced=True)
        try:
            tokens = self.engine.load(path)
        except ArtifactLoadError as error:
            return protocol.Loaded(id=operation_id, error=error.message)
        if not _is_file(path, cache.signature):
            self.engine.clear()
            return protocol.Loaded(id=operation_id, error="the file was replaced while it was loaded", replaced=True)
        self._resident = cache.fingerprint
        return protocol.Loaded(id=operation_id, tokens=tokens, load_ms=_since(started))

    def _probe(self, prompt: str, stopped: Callable[[], bool]) -> tuple[RunStats, list[Token], float]:
        """Run the probe greedily; returns its figures, its traced tokens, and the time to the first in ms."""
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

        sampling = Sampling(max_new_tokens=PROBE_TOKENS, temperature=0.0, seed=0)
        stats = self.engine.generate(prompt, sampling, on_token, trace=True)
        if stopped():
            raise Aborted("the build was stopped")
        return stats, tokens, first_ms[0] if first_ms else _since(started)


def _is_file(path: Path, signature: Signature) -> bool:
    try:
        return Signature.of(path.stat()) == signature
    except OSError:
        return False


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
