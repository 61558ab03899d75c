"""Records of the HTTP API's answers. Pure.

Handlers make their answers of the records that /openapi.json promises. The shapes are OpenAI's;
`rkcached` in an answer reports what was done for it. Figures in milliseconds were measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rkcached.serving.report import CacheReport, Usage


def _is_none(value: object) -> bool:
    return value is None


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class ManifestProblem(Answer):
    file: str
    line: int
    message: str
    hint: str


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str
    problems: list[ManifestProblem] | None = Field(default=None, exclude_if=_is_none)


class ErrorAnswer(Answer):
    """OpenAI's error envelope."""

    error: ErrorDetail


class LikelyToken(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    content: list[ChosenToken]
    refusal: None = None


class CalledFunction(Answer):
    name: str
    arguments: str


class Call(Answer):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = Field(default=None, exclude_if=_is_none)
    tool_calls: list[Call] | None = Field(default=None, exclude_if=_is_none)


FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class ChatChoice(Answer):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    rkcached: CacheReport


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(Answer):
    """The answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    rkcached: CacheReport


class OneEmbedding(Answer):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(
        description="Of length 1; as text, the base64 of little-endian float32."
    )


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    """The answer of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[OneEmbedding]
    model: str
    usage: EmbeddingUsage


class RankedText(Answer):
    text: str


class RankedDocument(Answer):
    index: int = Field(description="Its place in the request, from 0.")
    relevance_score: float = Field(description="Higher is better. Its range is the model's.")
    document: RankedText | None = Field(default=None, exclude_if=_is_none)


class Ranking(Answer):
    """The answer of `POST /v1/rerank`."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument] = Field(description="The best first.")
    usage: EmbeddingUsage


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "rkcached"


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Answer):
    status: Literal["ok"] = "ok"


class Readiness(Answer):
    status: Literal["ready", "starting"]


class ModelStatus(Answer):
    """A model and its worker."""

    name: str
    embedding: bool
    rerank: bool
    worker: str
    runtime: str | None
    measures_reuse: bool | None
    state_s: float | None = Field(description="Seconds in this state.")
    pid: int | None
    memory_bytes: int | None = Field(
        description="Of its worker, with the pages of the model's file that are in memory."
    )
    cpu_s: float | None = Field(description="CPU time of its worker, in seconds.")
    model_load_ms: float | None = Field(
        description="How long loading it took the last time; null if that was not measured."
    )
    restarts: int
    last_failure: str
    trouble: str


class WaitedModel(ModelStatus):
    waiting: int = Field(description="Requests that wait for their turn.")
    preload: list[str] | None = Field(
        description="The prompts that are preloaded with the model; null if it has no preload."
    )
    preload_trouble: str = Field(description="Why it could not be preloaded.")
    notices: list[str] = Field(
        description="Of the notices: those on its prompts_from folders that have no file."
    )


class ModelAction(ModelStatus):
    object: Literal["model.loaded", "model.unloaded"]
    model: str
    took_ms: float


class ModelStatusList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelStatus]


class BuildProgress(Answer):
    done_tokens: int
    total_tokens: int
    elapsed_ms: float


class ImportedFigures(Answer):
    at: float = Field(description="Unix seconds.")
    signed_by: str = Field(
        description="The name of the trusted key; empty where the prompt cache was compared with "
        "a prefill instead."
    )


class ArtifactFigures(Answer):
    tokens: int
    reused_tokens: int = Field(
        description="Of these, so many came from a prompt cache that begins alike."
    )
    size_bytes: int
    built_at: float = Field(description="Unix seconds.")
    build_ms: float
    prefill_ms: float
    load_ms: float
    cold_ttft_ms: float
    warm_ttft_ms: float
    gain: bool
    verified: str
    fingerprint: str
    imported: ImportedFigures | None = Field(
        description="Set where it came in a bundle. Then prefill_ms and cold_ttft_ms are those of "
        "the machine that built it, unless it was compared with a prefill."
    )


class PromptStatus(Answer):
    model: str
    prompt: str
    state: str
    reason: str
    hint: str
    retry_at: float | None = Field(
        description="Unix seconds of the next attempt; null where time alone does not help."
    )
    description: str
    learned: bool = Field(description="The daemon made it of what requests repeat.")
    tools: list[str] = Field(description="The names of the tools that belong to it.")
    hits: int
    misses: int
    last_used: float | None = Field(description="Unix seconds.")
    progress: BuildProgress | None = Field(default=None, exclude_if=_is_none)
    artifact: ArtifactFigures | None = Field(
        default=None,
        exclude_if=_is_none,
        description="Absent where it was made from an older text.",
    )


class CacheEntry(PromptStatus):
    """A prompt and its cache."""

    cache_name: str
    stored: bool = Field(
        description="A client stored it, or the daemon learned it: it can be deleted."
    )


class CacheCreated(CacheEntry):
    object: Literal["cache.created"] = "cache.created"


class CacheList(Answer):
    object: Literal["list"] = "list"
    data: list[CacheEntry]


class CacheAccepted(Answer):
    object: Literal["cache.accepted"] = "cache.accepted"
    model: str
    cache_name: str
    location: str


class CacheDeleted(Answer):
    object: Literal["cache.deleted"] = "cache.deleted"
    model: str
    cache_name: str
    deleted: Literal[True] = True


class BinaryCacheCreated(Answer):
    object: Literal["binary_cache.created"] = "binary_cache.created"
    model: str
    cache_name: str
    size_mb: float
    ttft_ms: float
    timestamp: int = Field(description="Unix seconds.")
    message: str
    tokens: int
    prefill_ms: float
    cold_ttft_ms: float
    build_ms: float
    size_bytes: int


class Collectable(Answer):
    path: str
    size_bytes: int = Field(description="For a folder: all files in it together.")
    reason: str


class Collected(Answer):
    """The files that no prompt uses."""

    object: Literal["cache.collected"] = "cache.collected"
    removed: bool = Field(description="false: it was only asked for.")
    size_bytes: int = Field(description="All items together.")
    items: list[Collectable]
    strangers: list[Collectable] = Field(
        description="Files and folders that are not the store's; they stay."
    )
    failed: list[Collectable] = Field(
        description="Prompt caches that should have gone and could not be removed."
    )


class ImportedPrompt(Answer):
    model: str
    prompt: str
    result: Literal["imported", "skipped", "failed"]
    reason: str = Field(description="Why it was skipped or failed; empty where nothing is to say.")


class BundleImported(Answer):
    """The results for all prompts of a bundle."""

    object: Literal["bundle.imported"] = "bundle.imported"
    prompts: list[ImportedPrompt]


class ManifestReloaded(Answer):
    object: Literal["manifest.reloaded"] = "manifest.reloaded"
    summary: str


class ManifestStatus(Answer):
    file: str
    ok: bool
    problems: list[str]
    skipped_files: list[str] = Field(
        description="Of prompts_from: their names cannot be a prompt's."
    )


class StoreStatus(Answer):
    directory: str
    trouble: str
    used_bytes: int = Field(
        description="What counts against max_bytes: all artifacts and foreign files."
    )
    max_bytes: int | None
    orphan_bytes: int = Field(
        description="Of used_bytes: artifacts that the manifest does not declare."
    )
    retired: int = Field(
        description="Prompt caches that are no longer declared and kept for a while."
    )
    retired_bytes: int = Field(description="Of used_bytes: the retired prompt caches.")
    foreign_bytes: int = Field(description="Of used_bytes: files that are not the store's.")
    quarantine_bytes: int = Field(
        description="Beside used_bytes: kept for inspection while max_bytes leaves room."
    )
    conversations: int = Field(
        description="Saved conversations of your user; on the admin socket of all."
    )
    conversation_bytes: int = Field(description="What these take, beside used_bytes.")
    free_bytes: int | None = Field(
        description="Left on the file system of the store; null where it does not say."
    )


class Starting(Answer):
    """The progress of the first look."""

    file: str = Field(description="The file that is being read; empty between files.")
    done_bytes: int
    total_bytes: int


class ReconcileStatus(Answer):
    looks: int
    last_look_ms: float
    builds: int


class RetiredStatus(Answer):
    """A prompt cache that no prompt uses now.

    It is adopted as soon as its text is declared again.
    """

    model: str = Field(description="The model of the prompt that it was built for.")
    prompt: str
    fingerprint: str
    tokens: int
    size_bytes: int
    retired_at: float = Field(description="Unix seconds.")
    kept_until: float = Field(
        description="Unix seconds of its removal, which comes sooner where room is needed."
    )


class RecentAnswer(Answer):
    time: float = Field(description="Unix seconds.")
    model: str
    prompt: str | None
    state: str
    ttft_ms: float


class SuggestedPrompt(Answer):
    """A beginning that requests repeat, and that would be worth a prompt cache."""

    id: str = Field(description="It is forgotten when the daemon ends.")
    model: str
    uid: int = Field(description="The user whose requests these are.")
    tokens: int = Field(description="An estimate; 0 where nothing counts tokens.")
    size_bytes: int
    requests: int = Field(description="How many began with it.")
    prefilled: int = Field(description="How many of them had to prefill it.")
    prefill_ms: float = Field(description="How long that took, on average.")
    next_step: str
    prompt: str | None = Field(
        description="The prompt that the next request with it is to be stored as; null if nobody "
        "asked for that."
    )
    outcome: str = Field(description='Of that: "waiting", "stored", or why nothing was stored.')


class SuggestionList(Answer):
    object: Literal["list"] = "list"
    data: list[SuggestedPrompt]


class Status(Answer):
    """The state of the daemon, as `rkcached status --json` prints it."""

    format: Literal[1] = Field(
        description="Raised when a field goes, is renamed, or means something else."
    )
    version: str
    pid: int
    started_at: float = Field(description="Unix seconds.")
    uptime_s: float
    ready: bool = Field(description="The first look is over: models and prompts are known.")
    starting: Starting | None = Field(
        description="How far the first look is; null when it is over."
    )
    summary: str
    manifest: ManifestStatus
    engine: str
    cache: StoreStatus
    watching: Literal["polling", "inotify"]
    reconcile: ReconcileStatus
    answers: dict[str, int] = Field(description="By state of the cache, since the start.")
    saved_today_s: int = Field(
        description="Seconds of prefill that prompt caches spared all users since midnight."
    )
    recent: list[RecentAnswer] = Field(
        description="The last 40 answers that your user got, oldest first; on the admin socket "
        "those to all. Older than the last 1,000 of all, they are forgotten."
    )
    running: int
    models: list[WaitedModel]
    notices: list[str] = Field(
        description="What seems wrong with what the manifest declares, in words."
    )
    suggestions: list[SuggestedPrompt] = Field(
        description="The beginnings that cost most, of the user who asks; on the socket for "
        "changes, of all users."
    )
    retired: list[RetiredStatus] = Field(
        description="The last 100 that were retired, the latest first."
    )
    building: PromptStatus | None = Field(
        description="The prompt that is being built, as among all."
    )
    prompts: Iterable[PromptStatus]
    """Made and written one by one, as there may be thousands: to be gone through once. The last
    field."""


class ApiDescription(BaseModel):
    """An OpenAPI document."""

    model_config = ConfigDict(extra="allow")

    openapi: str
    paths: dict[str, Any]
