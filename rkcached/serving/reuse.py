"""Which prompt cache a request is answered from, and the reason why not more was reused. Pure.

The prompt cache is chosen by the beginning that its text shares with the rendered request, in
bytes, and by the figures of its build. How much was reused is what the engine counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rkcached.engines.base import RunStats
from rkcached.reconcile.index import ArtifactIndex, Match
from rkcached.serving.conversations import Resumed
from rkcached.serving.job import Job, Part
from rkcached.serving.report import NOT_MEASURED
from rkcached.store.sidecar import StoredArtifact
from rkcached.worker import protocol
from rkcached.worker.building import BOUNDARY_TOKENS

LEAST_TOKENS = 16
"""Fewer are not worth a word, beyond the beginning that a chat template gives to every request."""

_TIMES = re.compile(
    rb"\d{4}-\d\d|\d\d?:\d\d|\d\d?[./]\d\d?[./]\d\d|\b(mon|tues|wednes|thurs|fri|satur|sun)day\b"
    rb"|\b(january|february|march|april|june|july|august|september|october|november|december)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The prompt caches that were found for a request when its turn came."""

    chosen: Match | None = None
    """The prompt cache to load."""
    whole: Match | None = None
    """The longest prompt cache whose text the request begins with."""
    nearest: Match | None = None
    """The prompt cache that begins most like the request, whether or not it is worth its load."""
    resumed: Resumed | None = None
    """A saved conversation to load instead: the request shares more with it."""
    unready: tuple[str, str] | None = None
    """The state of the prompt that the request names, and why, if that is not fresh."""
    rewinds: bool = True
    """See `EngineInfo.rewinds`."""
    death: str = ""
    """How the worker died when it loaded a prompt cache: this try goes without."""

    def without(self, death: str) -> Found:
        """The same, for a try that loads nothing after this death."""
        return replace(self, chosen=None, death=death)

    def on(self, *, rewinds: bool) -> Found:
        """The same, for a model that may only be able to reuse a prompt cache as a whole."""
        chosen = self.chosen
        if chosen is not None and not chosen.is_whole and not rewinds:
            chosen = self.whole
        return replace(self, chosen=chosen, rewinds=rewinds)


def find(index: ArtifactIndex, job: Job) -> Found:
    """The prompt cache to load for a request, if that is worth it.

    One whose text the request begins with is always worth it.
    """
    model = job.model.name
    rendered = job.prompt.encode()
    whole = index.longest(model, rendered, job.owner)
    nearest = index.closest(model, rendered, job.owner)
    if nearest is None or (whole is not None and nearest.common_bytes <= whole.common_bytes):
        return Found(chosen=whole, whole=whole, nearest=whole)

    least_ms = 0.0 if whole is None else _gain_ms(whole)
    head_bytes = _head_bytes(rendered, job.parts)
    shares_enough = _tokens(nearest, but_bytes=head_bytes) >= LEAST_TOKENS
    is_worth_it = shares_enough and _gain_ms(nearest) > least_ms
    return Found(chosen=nearest if is_worth_it else whole, whole=whole, nearest=nearest)


def cache_file(artifact: StoredArtifact) -> protocol.CacheFile | None:
    """The file of a prompt cache, for the worker; None if nobody knows which file it is."""
    if artifact.signature is None:
        return None
    return protocol.CacheFile(
        path=str(artifact.path),
        signature=artifact.signature,
        fingerprint=artifact.sidecar.fingerprint,
        tokens=artifact.tokens,
    )


def load_bytes(match: Match) -> float:
    """In the time that loading this prompt cache takes, so many bytes of text are prefilled.

    None for a whole match: how it helped is measured by its count of tokens.
    """
    figures = match.artifact.sidecar.figures
    if match.is_whole or figures.prefill_ms <= 0:
        return 0.0
    return figures.load_ms / figures.prefill_ms * len(match.artifact.text)


def _gain_ms(match: Match) -> float:
    """The prefill that it spares, less the time to load it, as measured when it was built."""
    figures = match.artifact.sidecar.figures
    return figures.prefill_ms * _share(match) - figures.load_ms


def _tokens(match: Match, but_bytes: int = 0) -> int:
    """About so many tokens are shared, without those of the first `but_bytes`."""
    return int(match.artifact.tokens * _share(match, but_bytes))


def _share(match: Match, but_bytes: int = 0) -> float:
    return (match.common_bytes - but_bytes) / max(1, len(match.artifact.text))


def outcome(found: Found, job: Job, stats: RunStats) -> tuple[str, str]:
    """The state that the answer reports, and why not more was reused."""
    chosen = found.chosen
    cached_tokens = stats.cached_tokens
    if found.death:
        return "miss", found.death
    if job.cold:
        return "cold", "the request asks for no cache"

    if chosen is not None and chosen.is_whole:
        return _of_whole(chosen, cached_tokens, rewinds=found.rewinds)
    if found.unready is not None:
        return found.unready
    if cached_tokens is None and (chosen is not None or found.resumed is not None):
        return "loaded", NOT_MEASURED

    cached_tokens = cached_tokens or 0  # a new run on a runtime that counts none
    rendered = job.prompt.encode()
    head_tokens = _head_bytes(rendered, job.parts) / len(rendered) * stats.prompt_tokens
    is_partial = cached_tokens >= head_tokens + LEAST_TOKENS
    reason = _why_not_more(found, job, rendered, cached_tokens, is_partial=is_partial)
    return ("partial" if is_partial else "cold"), reason


def _of_whole(chosen: Match, cached_tokens: int | None, *, rewinds: bool) -> tuple[str, str]:
    if cached_tokens is None:
        return "loaded", NOT_MEASURED
    if cached_tokens >= chosen.artifact.tokens - BOUNDARY_TOKENS:
        return "hit", ""
    if not rewinds:
        return "miss", "this model's state cannot be taken back to the prompt's end"
    return "miss", "the prompt cache was loaded but not reused"


def _why_not_more(
    found: Found, job: Job, rendered: bytes, cached_tokens: int, *, is_partial: bool
) -> str:
    """In words, with the next step where there is one."""
    nearest = found.nearest
    head_bytes = _head_bytes(rendered, job.parts)
    if nearest is None or nearest.common_bytes <= head_bytes:
        if is_partial:
            return "no prompt begins like this request; it goes on from an earlier one"
        if job.named is not None and (cause := _cause(job)):
            return f"the request begins otherwise than {job.named}: {cause}"
        return "no prompt begins like this request"
    if cached_tokens > _tokens(nearest) + LEAST_TOKENS:
        return f"the request goes on from an earlier one, beyond what it shares with {nearest.key}"

    reason = _difference(nearest, job, rendered)
    if not found.rewinds:
        return f"{reason}; this model's state cannot be taken back to there"
    if is_partial:
        return reason
    if found.chosen is not None:
        return f"{reason}; it was loaded but not reused"
    return f"{reason}; that is too little to be worth loading"


def _difference(nearest: Match, job: Job, rendered: bytes) -> str:
    """The place where the request and the nearest prompt part, and why they may."""
    at = nearest.common_bytes
    where = _place(rendered, at, job.parts)
    reason = f"differs from {nearest.key} after {_tokens(nearest):,} tokens, {where}"
    if where.startswith("in "):
        is_time = _TIMES.search(_line(rendered, at))
        return f"{reason}: a date or a time?" if is_time else reason
    cause = _cause(job)
    return f"{reason}: {cause}" if cause else reason


def _cause(job: Job) -> str:
    """The parameters of a request that change the text beside its messages."""
    if job.with_tools:
        return "the request's tools; declare them with the prompt (tools: FILE)"
    if job.variables:
        names = ", ".join(job.variables)
        return f"the request's variables ({names}); declare them with the prompt"
    return ""


def _head_bytes(rendered: bytes, parts: Sequence[Part]) -> int:
    """The length of what the chat template writes before the first message."""
    for part in parts:
        text = part.text.strip().encode(errors="ignore")
        begin = rendered.find(text) if text else -1
        if begin >= 0:
            return begin
    return 0


def _place(rendered: bytes, at: int, parts: Sequence[Part]) -> str:
    """The part of the request that the byte `at` is in or after."""
    end = 0
    before = ""
    for part in parts:
        text = part.text.strip().encode(errors="ignore")
        begin = rendered.find(text, end) if text else -1
        if begin < 0:
            continue  # the template has changed it
        if at < begin:
            break
        end = begin + len(text)
        if at < end:
            return f"in {part.name}"
        before = part.name

    return f"after {before}" if before else "before the first message"


def _line(text: bytes, at: int) -> bytes:
    """The line around the byte `at`, or the next one that has a word."""
    begin = text.rfind(b"\n", 0, at) + 1
    rest = text[at:]
    blank = len(rest) - len(rest.lstrip())
    end = text.find(b"\n", at + blank)
    return text[begin:] if end < 0 else text[begin:end]
