"""Builds that somebody asked for and waits for. On the event loop, beside the reconciler.

An answer must come from a look that began after the question: an older one has not seen the text
that was just written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rkcached.errors import RkcachedError, SourceError
from rkcached.plan.records import Adopt, Assessment, Build, State
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact

ALL = "*"
"""Stands for every prompt; no model has that name."""


@dataclass(slots=True, kw_only=True)
class _Waiting:
    future: asyncio.Future[StoredArtifact]
    # Build it even if it is fresh.
    anew: bool
    # A look has begun and ended since.
    seen: bool = False


class Hurried:
    """Prompts that somebody waits to become fresh, in whatever way: by name, by model, or all."""

    def __init__(self) -> None:
        self._names: Counter[str] = Counter()

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, Key):
            return False
        return any(self._names[name] for name in (ALL, key.model, str(key)))

    @contextlib.contextmanager
    def waiting(self, names: Sequence[str]) -> Iterator[None]:
        """Somebody waits for these while the context lasts: MODEL/PROMPT, MODEL, or ALL."""
        self._names.update(names)
        try:
            yield
        finally:
            self._names -= Counter(names)


class Waiters:
    def __init__(self) -> None:
        self.hurried = Hurried()
        """Their builds are not held back."""
        self._waiting: dict[Key, _Waiting] = {}

    def ask(self, key: Key, *, anew: bool) -> asyncio.Future[StoredArtifact]:
        """The artifact, once it is there; or the error that says why not."""
        waiting = self._waiting.get(key)
        if waiting is None:
            future = asyncio.get_running_loop().create_future()
            waiting = self._waiting[key] = _Waiting(future=future, anew=anew)
        elif not anew or not waiting.anew:
            waiting.anew, waiting.seen = waiting.anew or anew, False
        return waiting.future

    def asked(self) -> tuple[Key, ...]:
        """The prompts that a look that begins now will answer for."""
        return tuple(self._waiting)

    def observed(
        self,
        asked: Iterable[Key],
        assessments: Mapping[Key, Assessment],
        artifacts: Mapping[Key, StoredArtifact],
    ) -> list[Key]:
        """A look has ended: answer what it answers. Returns what is to be built anew."""
        anew = []
        for key in asked:
            waiting = self._waiting.get(key)
            if waiting is None:
                continue
            waiting.seen = True
            assessment = assessments.get(key)
            if assessment is None:
                hint = "`rkcached status` lists what is declared"
                self.answer(key, SourceError(f"{key} is not declared", hint=hint))
            elif waiting.anew:
                anew.append(key)
            elif assessment.state is State.FRESH:
                self.answer(key, artifacts[key])
            elif not isinstance(assessment.action, Build | Adopt):
                reason = f"{key} is {assessment.state.value}: {assessment.reason}"
                self.answer(key, SourceError(reason, hint=assessment.hint))
        return anew

    def answer(self, key: Key, result: StoredArtifact | RkcachedError) -> None:
        """A build has ended."""
        waiting = self._waiting.get(key)
        if waiting is None or not waiting.seen:
            return
        del self._waiting[key]
        if waiting.future.done():
            return
        if isinstance(result, StoredArtifact):
            waiting.future.set_result(result)
        else:
            waiting.future.set_exception(result)
            waiting.future.exception()  # its caller may be gone

    def cancel(self) -> None:
        for waiting in self._waiting.values():
            waiting.future.cancel()
