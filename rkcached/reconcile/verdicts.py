"""What a failed attempt means for the next one. Pure, but for the clock of a retry."""

from __future__ import annotations

import time

from rkcached import errors
from rkcached.plan.planner import MAX_RETRY_S, Verdict, VerdictKind
from rkcached.sources.records import Trouble

QUARANTINE_AFTER = 3
"""Worker deaths or failed proofs on one fingerprint before it is left alone."""


def verdict_on(
    error: errors.RkcachedError, fingerprint: str, attempts: int, *, model: str = ""
) -> Verdict:
    """What a failed build means for the next attempt at the same fingerprint; `model` is the identity of its model."""
    trouble = Trouble.of(error)
    match error:
        case errors.ContextExceeded():
            return Verdict(
                fingerprint=fingerprint,
                kind=VerdictKind.TOO_LONG,
                trouble=trouble,
                tokens=error.tokens,
            )
        case errors.PromptTooShort():
            return Verdict(
                fingerprint=fingerprint,
                kind=VerdictKind.TOO_SHORT,
                trouble=trouble,
                tokens=error.tokens,
            )
        case errors.BudgetExceeded():
            return Verdict(
                fingerprint=fingerprint,
                kind=VerdictKind.OVER_BUDGET,
                trouble=trouble,
                needed_bytes=error.needed_bytes,
            )
        case errors.Uncacheable():
            return Verdict(
                fingerprint=fingerprint, kind=VerdictKind.UNCACHEABLE, trouble=trouble, model=model
            )
        case errors.WorkerDied() | errors.WorkerTimeout() | errors.VerifyFailed() if (
            attempts >= QUARANTINE_AFTER
        ):
            return quarantined(fingerprint, f"building it failed {attempts} times: {error.message}")
        case _:
            retry_at = time.time() + min(
                2.0 ** min(attempts, 10), MAX_RETRY_S
            )  # 2.0**1024 is too large for a float
            return Verdict(
                fingerprint=fingerprint,
                kind=VerdictKind.FAILED,
                trouble=trouble,
                attempts=attempts,
                retry_at=retry_at,
                needed_bytes=error.needed_bytes if isinstance(error, errors.NoRoom) else 0,
            )


def quarantined(fingerprint: str, why: str) -> Verdict:
    hint = "change the prompt, its parameters or the model, or run `rkcached regenerate`"
    return Verdict(
        fingerprint=fingerprint,
        kind=VerdictKind.QUARANTINED,
        trouble=Trouble(message=why, hint=hint),
        attempts=QUARANTINE_AFTER,
    )
