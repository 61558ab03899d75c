"""Builds a prompt cache and proves it, with nothing but the engine port. Used by one thread.

A success that an engine reports counts only with its effect.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from rkcached.engines.base import Token
from rkcached.engines.kinds import VerifyMode
from rkcached.errors import (
    Aborted,
    ContextExceeded,
    EngineError,
    PromptTooShort,
    Uncacheable,
    VerifyFailed,
)
from rkcached.worker import protocol
from rkcached.worker.engine_state import Emit, EngineState, since
from rkcached.worker.held import UNKNOWN, Held
from rkcached.worker.traces import agree

KEEP_MS = 300.0
"""The part that an aborted build has read is kept if reading it took longer than that."""

BOUNDARY_TOKENS = 5
"""A hit may lack so many of the prefix's last tokens: the prefix may end inside a token of the
longer text, and a state that cannot be taken back may go on from a checkpoint before its end."""

_MIN_FREE_BYTES = 64 << 20
# A prompt cache of a small prompt fits into this. With less free, a missing file is the disk's
# fault, and no proof that the model cannot save its state.


class Builder:
    """Builds prompt caches on an engine's KV state."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def build(
        self, operation: protocol.Build, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Built:
        """Prefill, save, and prove that the file gives what memory gives.

        Errors: PromptTooShort, ContextExceeded, Uncacheable, VerifyFailed, Aborted; then the file
        is of no use.
        """
        self._state.held = Held(owner=UNKNOWN)  # what is there now, until it was replaced
        try:
            built = self._read(operation, emit, stopped)
            if operation.verify is VerifyMode.OFF:
                return built
            return self._prove_read(operation, built, emit, stopped)
        except VerifyFailed:
            self._state.engine.clear()  # no answer may begin with what was not proven
            raise

    def _read(
        self, operation: protocol.Build, emit: Emit, stopped: Callable[[], bool]
    ) -> protocol.Built:
        """Prefill and save: from the base, or from the beginning.

        Errors: as for `build`. When it is aborted, the partial state is kept.
        """
        engine = self._state.engine
        path = Path(operation.path)
        known = engine.tokenize(operation.prefix)
        tokens = None if known is None else len(known)
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
            self._state.held = Held(owner=operation.owner)
            read_ms = since(started)
            if last_done > (first_done or 0) and read_ms > KEEP_MS:
                self._keep(operation, emit, read_ms + _share(base, first_done or 0))
            raise

        self._state.held = Held(owner=operation.owner)
        reused = prefill.cached_tokens or 0
        prefill_ms = prefill.prefill_ms or since(started)

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
        info = self._state.info
        comparable = operation.verify is VerifyMode.EXACT and info.greedy
        if not info.measures_prefill:
            return "this runtime does not count reused tokens"
        if not info.rewinds and not base.is_beginning:
            return "this model's state cannot be taken back to where the texts part"
        if not self._state.continues and not comparable:
            return "this runtime is not known to continue a prompt cache, and cannot be compared"

        if comparable and base.answer:
            if error := self._load_base(base, operation, emit):
                return error
            _, tokens, _ = self._state.probe(base.probe, stopped)
            if digest(tokens) != base.answer:
                self._state.engine.clear()
                return "its answer is another one than when it was proven"

        return self._load_base(base, operation, emit)

    def _load_base(self, base: protocol.Base, operation: protocol.Build, emit: Emit) -> str:
        """Load the file of a base; returns why that failed, if it did."""
        loaded = self._state.load(operation.id, base.cache, emit)
        self._state.held = Held(owner=operation.owner)
        return loaded.error

    def _keep(self, operation: protocol.Build, emit: Emit, prefill_ms: float) -> None:
        """Save what an aborted prefill has read, if somebody wants it."""
        if not operation.partial or not self._state.info.aborts_prefill:
            return
        path = Path(operation.partial)
        try:
            tokens = self._state.engine.save(path)
        except EngineError:
            with contextlib.suppress(OSError):
                path.unlink()
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
            if built.reused_tokens and not self._state.continues:
                self._compare_with_whole(operation, proven, stopped)
        except Aborted:
            if operation.partial and built.prefill_ms > KEEP_MS:
                Path(operation.path).replace(operation.partial)
                emit(
                    protocol.Kept(id=operation.id, tokens=built.tokens, prefill_ms=built.prefill_ms)
                )
            raise
        return msgspec.structs.replace(proven, proof_ms=since(started))

    def _compare_with_whole(
        self, operation: protocol.Build, proven: protocol.Built, stopped: Callable[[], bool]
    ) -> None:
        """Read the probe as a whole: the state that was continued must answer like that, too.

        Once is enough. Errors: VerifyFailed, Aborted.
        """
        self._state.engine.clear()
        _, tokens, _ = self._state.probe(operation.probe, stopped)
        if digest(tokens) != proven.answer:
            raise VerifyFailed(
                "the probe's answer on a continued prompt cache differs from the answer on one "
                "that was read as a whole",
                hint="prompt caches of this model are built as a whole",
            )
        self._state.continues = True

    def _check_length(self, operation: protocol.Build, tokens: int | None) -> None:
        """Errors: PromptTooShort, ContextExceeded."""
        limit = self._state.info.context_tokens
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
        info = self._state.info
        _, expected, before_ms = self._state.probe(operation.probe, stopped)
        cold_ms = before_ms
        if info.keeps_state:
            cold_ms += built.prefill_ms

        self._state.engine.clear()
        started = time.perf_counter()
        self._state.engine.load(Path(operation.path))
        load_ms = since(started)
        try:
            after, answer, after_ms = self._state.probe(operation.probe, stopped)
        except Aborted:
            self._state.engine.clear()  # no answer may begin with what was not proven
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
        if is_exact and not agree(expected, answer, moved=self._state.moves):
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
            answer=digest(answer) if proved is VerifyMode.EXACT else "",
        )


def _share(base: protocol.Base | None, tokens: int) -> float:
    """How long reading these first tokens of a base took, in milliseconds."""
    if base is None or not base.tokens:
        return 0.0
    return base.prefill_ms * min(tokens, base.tokens) / base.tokens


def digest(tokens: list[Token]) -> str:
    """SHA-256 of a traced answer."""
    answer = [(token.text, token.ids) for token in tokens]
    return hashlib.sha256(msgspec.json.encode(answer)).hexdigest()


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
