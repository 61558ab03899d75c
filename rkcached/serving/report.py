"""The figures of one answer, measured by the engine and by serving.

The HTTP API sends them as they are: the docstrings of the fields are their descriptions in
/openapi.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rkcached.engines.base import RunStats

NOT_MEASURED = "reuse is not measured by this runtime"
"""The reason in an answer, and in the status, where nobody can say what a prompt cache spared."""

# Pydantic reads this from a dataclass that is a field of one of the API's records.
_AS_RECORD = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokensDetails:
    __pydantic_config__: ClassVar = _AS_RECORD

    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    __pydantic_config__: ClassVar = _AS_RECORD

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None
    """null where the runtime measures nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What rkcached did for this answer. All of it was measured."""

    __pydantic_config__: ClassVar = _AS_RECORD

    cache: str | None
    """The prompt whose cache was loaded."""
    state: str
    """hit, partial (a part of a prompt's text, or of an earlier request, was reused), loaded
    (nobody measured more), miss (loaded, did not help), cold, or why the wanted one was not used:
    stale, missing, building, uncacheable, blocked, quarantined, corrupt, uncached."""
    reason: str = ""
    """Why not more was reused."""
    cached_tokens: int | None
    """null where the runtime measures nothing."""
    ttft_ms: float
    """Request accepted to first token written."""
    queue_ms: float
    model_load_ms: float
    """Loading the model; 0 where it was in memory."""
    load_ms: float
    prefill_ms: float
    decode_tokens_per_s: float
    ignored: tuple[str, ...] = ()
    """Parameters of the request that had no effect, and system messages that were left out."""


def usage_of(stats: RunStats) -> Usage:
    """The token counts of a run, in OpenAI's names."""
    details = None
    if stats.cached_tokens is not None:
        details = PromptTokensDetails(cached_tokens=stats.cached_tokens)

    return Usage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.decode_tokens,
        total_tokens=stats.prompt_tokens + stats.decode_tokens,
        prompt_tokens_details=details,
    )


def decode_rate(stats: RunStats) -> float:
    """Tokens per second; 0 where decoding took less than a millisecond."""
    if stats.decode_ms < 1:
        return 0.0
    return round(stats.decode_tokens / stats.decode_ms * 1000, 1)
