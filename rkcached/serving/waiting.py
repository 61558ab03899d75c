"""Whether a request for a prompt that is being built lets the build come to its end. Pure.

A request makes a build step aside, and goes on from what the build has read, where the engine keeps
its state; so nothing of that is read twice. Then waiting is sooner only if what is left of the
proof takes less time than making room: the batch that is under way, and saving what was read. Where
nothing is kept, the request would have to read everything.
"""

from __future__ import annotations

from rkcached.reconcile.snapshot import BuildProgress


def sooner_to_wait(progress: BuildProgress, now: float) -> bool:
    """Whether the answer comes sooner if the build is not interrupted; False if nobody knows.

    `now` is in monotonic seconds.
    """
    read_tokens = progress.done_tokens - progress.read_from
    read_s = progress.read_at - progress.read_since
    if progress.proof_s is None or progress.aside_s is None or read_tokens <= 0 or read_s <= 0:
        return False

    token_s = read_s / read_tokens
    rest_s = (progress.total_tokens - progress.done_tokens) * token_s
    silent_s = now - progress.read_at
    wait_s = max(0.0, rest_s + progress.proof_s - silent_s)

    missing_tokens = progress.total_tokens
    if progress.keeps_state:
        missing_tokens -= progress.done_tokens
    return wait_s < progress.aside_s + missing_tokens * token_s
