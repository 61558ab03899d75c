"""Failures since the start, and what they mean for the next attempt.

`Failures` remembers verdicts, as the store does: but a full disk may not take them. A failure to
load a model is not its prompts' fault: it is remembered for the model, in memory only. On the event
loop.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace

from rkcached import errors
from rkcached.plan.desired import Desired, DesiredModel
from rkcached.plan.records import (
    MAX_QUARANTINE_S,
    MAX_RETRY_S,
    QUARANTINE_S,
    Verdict,
    VerdictKind,
)
from rkcached.sources.records import Key, Trouble

QUARANTINE_AFTER = 3
"""Worker deaths or failed proofs on one fingerprint before it is left alone."""


def blames_model(error: errors.RkcachedError) -> bool:
    """No prompt of this model can be built now, but perhaps later."""
    return isinstance(
        error,
        errors.ModelLoadError
        | errors.RuntimeLibraryError
        | errors.WorkerUnavailable
        | errors.ModelReplaced,
    )


class Failures:
    def __init__(self) -> None:
        self._by_prompt: dict[Key, Verdict] = {}
        # By name: the identity of the model that failed, and the verdict.
        self._model_failures: dict[str, tuple[str, Verdict]] = {}
        self._first_tries: dict[str, float] = {}
        self._load_faults: dict[str, int] = {}

    def first_try(self, fingerprint: str, now: float) -> float:
        """The loop's time when this build was first started: it may have stepped aside since."""
        return self._first_tries.setdefault(fingerprint, now)

    def failed(
        self,
        key: Key,
        model: DesiredModel,
        fingerprint: str,
        error: errors.RkcachedError,
        stored: Verdict | None,
    ) -> Verdict:
        """A build failed. `stored` is what the store remembers of this prompt."""
        if blames_model(error):
            identity, before = self._model_failures.get(key.model, ("", None))
            attempts = _next_attempt(before, is_same=identity == model.identity)
            verdict = verdict_on(error, fingerprint, attempts)
            self._model_failures[key.model] = (model.identity, verdict)
            return verdict

        before = self._by_prompt.get(key) or stored
        is_same = before is not None and before.fingerprint == fingerprint
        attempts = _next_attempt(before, is_same=is_same)
        verdict = verdict_on(error, fingerprint, attempts, model=model.identity)
        self._by_prompt[key] = verdict
        return verdict

    def needed_bytes(self, key: Key, fingerprint: str) -> int:
        """The least that the artifact takes, as far as earlier attempts show."""
        verdict = self._by_prompt.get(key)
        if verdict is None or verdict.fingerprint != fingerprint:
            return 0
        return verdict.needed_bytes

    def built(self, key: Key) -> None:
        # this load lets builds end; the others are as patient as new ones
        self._first_tries.clear()
        self._model_failures.pop(key.model, None)
        self._by_prompt.pop(key, None)

    def blames(self, name: str) -> bool:
        """Whether this model could not be loaded."""
        return name in self._model_failures

    def forgive_model(self, name: str) -> None:
        """Somebody asks for a build now: try the model again."""
        self._model_failures.pop(name, None)

    def load_fault(self, fingerprint: str) -> int:
        """A request could not load this artifact; returns how often since the last success."""
        faults = self._load_faults[fingerprint] = self._load_faults.get(fingerprint, 0) + 1
        return faults

    def served(self, fingerprint: str) -> None:
        """A request was answered from it: earlier faults had another cause."""
        self._load_faults.pop(fingerprint, None)

    def verdicts(self, desired: Desired) -> dict[Key, Verdict]:
        """The verdicts to consider beside the store's.

        A model that could not be loaded blocks its prompts until it changes or may be tried again.
        """
        verdicts = dict(self._by_prompt)
        failed = {
            name: verdict
            for name, (identity, verdict) in self._model_failures.items()
            if _identity_of(desired, name) == identity
        }
        if not failed:
            return verdicts

        for key, prompt in desired.prompts.items():
            if key.model in failed and prompt.fingerprint is not None:
                digest = prompt.fingerprint.digest
                verdicts[key] = replace(failed[key.model], fingerprint=digest)
        return verdicts


def _identity_of(desired: Desired, name: str) -> str | None:
    """The identity of a model as it is declared now; None if it cannot be used."""
    model = desired.models.get(name)
    return model.identity if isinstance(model, DesiredModel) else None


def _next_attempt(before: Verdict | None, *, is_same: bool) -> int:
    """The number of this attempt, counted from 1. `before` counts if it is on the same thing."""
    if before is None or not is_same:
        return 1
    return before.attempts + 1


def verdict_on(
    error: errors.RkcachedError, fingerprint: str, attempts: int, *, model: str = ""
) -> Verdict:
    """The verdict on a failed build, for the next attempt at the same fingerprint.

    `model` is the identity of its model.
    """
    verdict = functools.partial(Verdict, fingerprint=fingerprint, trouble=Trouble.of(error))
    match error:
        case errors.ContextExceeded():
            return verdict(kind=VerdictKind.TOO_LONG, tokens=error.tokens)
        case errors.PromptTooShort():
            return verdict(kind=VerdictKind.TOO_SHORT, tokens=error.tokens)
        case errors.BudgetExceeded():
            return verdict(kind=VerdictKind.OVER_BUDGET, needed_bytes=error.needed_bytes)
        case errors.Uncacheable():
            return verdict(kind=VerdictKind.UNCACHEABLE, model=model)
        case errors.WorkerDied() | errors.WorkerTimeout() | errors.VerifyFailed() if (
            attempts >= QUARANTINE_AFTER
        ):
            return quarantined(fingerprint, "building it", attempts, error.message)
        case _:
            pause_s = min(2.0 ** min(attempts, 10), MAX_RETRY_S)  # 2.0**1024 is no float
            return verdict(
                kind=VerdictKind.FAILED,
                attempts=attempts,
                retry_at=time.time() + pause_s,
                needed_bytes=error.needed_bytes if isinstance(error, errors.NoRoom) else 0,
            )


def quarantined(fingerprint: str, what: str, times: int, why: str) -> Verdict:
    """It failed so many times to do `what`, and is tried again ever more rarely.

    Nobody may be able to keep a prompt without its cache for good.
    """
    hint = "it is tried again by itself later; to try now, run `rkcached regenerate`"
    rounds = min(times - QUARANTINE_AFTER, 10)  # 2.0**1024 is no float
    pause_s = min(QUARANTINE_S * 2.0**rounds, MAX_QUARANTINE_S)
    return Verdict(
        fingerprint=fingerprint,
        kind=VerdictKind.QUARANTINED,
        trouble=Trouble(message=f"{what} failed {times} times: {why}", hint=hint),
        attempts=times,
        retry_at=time.time() + pause_s,
    )
