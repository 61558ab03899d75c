"""The manifest: what should exist, as its owner wrote it.

Frozen models say which keys there are, which values each takes, and which values go together.
`values` has the kinds of values, and `parser` makes a manifest of text. The same models make the
JSON schema; `etc/rkcached/manifest.example.yaml` explains each key, and a test holds the two
together. Pure.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from rkcached.engines.kinds import RANK, EngineKind, Pooling, VerifyMode
from rkcached.messages.builtin import FORMATS
from rkcached.sources import values
from rkcached.sources.problems import all_wrong, nearest, wrong
from rkcached.sources.values import (
    Abi,
    FilePath,
    Hosts,
    Name,
    Origins,
    Paths,
    Patterns,
    Preload,
    Size,
    Template,
    TemplateDate,
    TemplateVariables,
    TrustedKeys,
    Window,
)
from rkcached.sources.yaml_reader import Steps, nearest_line, show

RESERVED_MODELS: Final = ("available", "load", "loaded", "unload")
RESERVED_PROMPT: Final = "generate-binary"
"""The HTTP API has another meaning for these."""

RKLLM_MAX_CONTEXT: Final = 16_384

THINKING: Final = "enable_thinking"
"""The variable of a chat template that `thinking` is the short form of."""


class FingerprintMode(StrEnum):
    """Whether sampling parameters belong to a prompt cache's identity."""

    FULL = "full"
    KV = "kv"


class ReadyWhen(StrEnum):
    """When the daemon tells systemd that it is ready."""

    PLANNED = "planned"
    LOADED = "loaded"


class Unsupported(StrEnum):
    """The treatment of parameters that would change the answer and are not supported."""

    REFUSE = "refuse"
    IGNORE = "ignore"


class SystemConflict(StrEnum):
    """The treatment of a request that names a prompt and has another system message."""

    REFUSE = "refuse"
    PROMPT = "prompt"
    CLIENT = "client"
    APPEND = "append"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Section):
    """The inference engine."""

    kind: EngineKind = Field(
        default=EngineKind.LLAMACPP,
        description="Inference library: rkllm, llamacpp, or memory for tests.",
    )
    threads: int = values.whole(
        default=0, ge=0, le=256, description="CPU threads of llamacpp; 0 is one for each fast core."
    )
    library: FilePath = Field(
        default=Path("/usr/lib/librkllmrt.so"),
        description="RKLLM's runtime library.",
        validate_default=True,
    )
    abi: Abi = Field(
        default=None, description="RKLLM's binary interface, by version; None finds it."
    )
    timeout_s: float = values.number(
        default=300.0,
        ge=5,
        le=3600,
        description="Kill a worker whose library says nothing for so long.",
    )
    concurrent: bool = Field(
        default=False, strict=True, description="Let several models work at the same time."
    )
    max_loaded: int | None = values.whole(
        default=None,
        ge=1,
        le=64,
        description="Models in memory at once. None: 1 with rkllm (unless concurrent), "
        "else what fits in memory.",
    )
    ready: ReadyWhen = Field(
        default=ReadyWhen.PLANNED,
        description="Tell systemd that the daemon is ready when it answers and has a plan, or when "
        "it also has loaded the models that have preload.",
    )
    max_memory_bytes: Size | None = Field(
        default=None,
        description="What a worker may take, besides mapped model files and NPU buffers. "
        "None: more than any model of that size needs.",
    )
    confine: bool = Field(
        default=True,
        description="Take from a worker what no engine needs: files that are not its own, "
        "programs, other processes, network sockets.",
    )


class BuildConfig(_Section):
    """When builds may begin. One that somebody waits for begins at once."""

    idle_s: float = values.number(
        default=0.0,
        ge=0,
        le=86_400,
        description="Begin a build only when no request has run or waited for this many seconds.",
    )
    window: Window = Field(
        default=None,
        description="Begin builds at this local time only: 02:00-05:00. None: at any time.",
    )


class ConversationsConfig(_Section):
    """The states of conversations that are kept, to go on where they were."""

    max_bytes: Size | None = Field(
        default=None,
        description="Budget of saved conversations, beside that of the prompt caches. "
        "None: 512 MiB with llamacpp; with rkllm none is saved, as the model has to run for it.",
    )
    keep_s: float = values.number(
        default=86_400.0,
        ge=0,
        le=31_536_000,
        description="Delete a saved conversation that nobody went on with for this many seconds. "
        "0: save none.",
    )


class LearnConfig(_Section):
    """Prompts that the daemon makes of what requests repeat."""

    max_bytes: Size = Field(
        default="256MiB",
        description="What their prompt caches may take together; the least recently used go.",
        validate_default=True,
    )
    after: int = values.whole(
        default=3, ge=2, le=1000, description="So many requests with it make a prompt of a text."
    )
    share: bool = Field(
        default=False,
        strict=True,
        description="Let them serve all users, not only the one whose requests had the text.",
    )


class CacheConfig(_Section):
    """The store of prompt caches."""

    max_bytes: Size | None = Field(
        default=None,
        description="Budget of the prompt caches: bytes, or with a unit. None is no limit.",
    )
    verify: Literal[VerifyMode.OFF, VerifyMode.HIT, VerifyMode.EXACT] = Field(
        default=VerifyMode.EXACT,
        description="Proof required of a new prompt cache before it is used.",
    )
    fingerprint: FingerprintMode = Field(
        default=FingerprintMode.FULL,
        description="full: sampling parameters invalidate a prompt cache too; kv: they do not.",
    )
    min_tokens: int = values.whole(
        default=0, ge=0, le=1_048_576, description="Shorter prompts are not cached."
    )
    conversations: ConversationsConfig = Field(
        default_factory=ConversationsConfig,
        description="Saved states of conversations, each reused for its own user only.",
    )
    keep_retired_s: float = values.number(
        default=604_800.0,
        ge=0,
        le=315_360_000,
        description="How long to keep prompt caches that are no longer declared: "
        "they may come back. 0: not at all.",
    )
    build: BuildConfig = Field(default_factory=BuildConfig, description="When builds may begin.")
    learn: LearnConfig | None = Field(
        default=None, description="Learn prompts from what requests repeat. None: do not."
    )
    trust: TrustedKeys = Field(
        default=(),
        description="Public keys: prompt caches in bundles that they signed are imported. "
        "A name may follow the key.",
    )


class ServingConfig(_Section):
    """How requests are treated."""

    queue: int = values.whole(
        default=32,
        ge=1,
        le=10_000,
        description="Requests of one user that may wait for a model; others get 503. "
        "Of all users together, four times as many may wait.",
    )
    request_timeout_s: float | None = values.number(
        default=None,
        gt=0,
        le=86_400,
        description="Stop a request that takes longer. None is no limit.",
    )
    share_state: bool = Field(
        default=False,
        description="Let every user's requests go on from what another one asked. "
        "Then users can find out, by the time and the reused tokens, what others ask.",
    )
    hosts: Hosts = Field(
        default=(),
        description="Other names by which browsers and proxies may call this machine.",
    )
    unsupported: Unsupported = Field(
        default=Unsupported.REFUSE,
        description="Refuse a request whose parameters cannot be met, or ignore these parameters.",
    )
    system_conflict: SystemConflict = Field(
        default=SystemConflict.REFUSE,
        description="A request names a prompt and has another system message: refuse it, take the "
        "prompt's text, the client's, or the client's after the prompt's.",
    )
    cors: Origins = Field(
        default=(),
        description="The origins of web pages of other sites that may send requests.",
    )
    shutdown_grace_s: float = values.number(
        default=3.0,
        ge=0,
        le=3600,
        description="Running answers may end for so long when the daemon is stopped.",
    )


class SamplingParams(_Section):
    """The changes of one prompt to its model's parameters."""

    max_new_tokens: int | None = values.max_new_tokens(default=None)
    temperature: float | None = values.temperature(default=None)
    top_k: int | None = values.top_k(default=None)
    top_p: float | None = values.top_p(default=None)
    repeat_penalty: float | None = values.repeat_penalty(default=None)
    frequency_penalty: float | None = values.frequency_penalty(default=None)
    presence_penalty: float | None = values.presence_penalty(default=None)


class ModelParams(_Section):
    """Context and sampling of a model."""

    max_context_len: int = values.whole(
        default=4096,
        ge=32,
        le=1_048_576,
        description="Tokens the context holds: prompt and answer together.",
    )
    max_new_tokens: int = values.max_new_tokens(default=512, validate_default=True)
    temperature: float = values.temperature(default=0.8)
    top_k: int = values.top_k(default=40)
    top_p: float = values.top_p(default=0.9)
    repeat_penalty: float = values.repeat_penalty(default=1.1)
    frequency_penalty: float = values.frequency_penalty(default=0.0)
    presence_penalty: float = values.presence_penalty(default=0.0)

    @field_validator("max_new_tokens")
    @classmethod
    def _fits(cls, value: int, info: ValidationInfo) -> int:
        if value >= (limit := info.data.get("max_context_len", value + 1)):
            raise wrong(*_too_long(value, limit))
        return value


def _too_long(value: int, limit: int) -> tuple[str, str]:
    message = (
        f"max_new_tokens is {value}, but must be less than the model's max_context_len, {limit}"
    )
    return message, "lower max_new_tokens or raise max_context_len"


class PromptConfig(_Section):
    """A prompt that is kept as a prompt cache: its files, joined.

    A path alone is the short form.
    """

    files: Paths = Field(
        min_length=1, max_length=64, description="The prompt's files, joined in this order."
    )
    tools: FilePath | None = Field(
        default=None,
        description="A JSON file with the tools that belong to the prompt, as OpenAI's API has "
        "them.",
    )
    params: SamplingParams = Field(
        default_factory=SamplingParams, description="Changes to the model's parameters."
    )
    description: str = Field(
        default="", max_length=1000, description="Shown wherever caches are listed."
    )
    chat_template_kwargs: TemplateVariables = Field(
        default_factory=dict, description="Changes to the model's chat_template_kwargs."
    )
    system_conflict: SystemConflict | None = Field(
        default=None, description="serving.system_conflict for this prompt. None: the same."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"files": [value]} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}


class NpuConfig(_Section):
    """How RKLLM uses the board for a model."""

    enabled_cpus: tuple[Annotated[int, Field(strict=True, ge=0, le=31)], ...] = Field(
        default=(),
        max_length=32,
        description="CPU numbers that help the NPU; empty leaves it to the runtime.",
    )
    embed_flash: bool | None = Field(
        default=None,
        strict=True,
        description="Read the embedding table from flash, not from memory.",
    )
    base_domain_id: int = values.whole(default=0, ge=0, le=15, description="NPU address domain.")
    n_keep: int | None = values.whole(
        default=None,
        ge=-1,
        le=RKLLM_MAX_CONTEXT,
        description="KV positions to keep when the context is full.",
    )
    ignore_eos: bool = Field(
        default=False, strict=True, description="Go on after an end-of-sequence token."
    )


def _mapping_or_nothing(schema: dict[str, Any]) -> None:
    """Have the JSON schema of a mapping allow that nothing stands behind its key."""
    mapping = {"additionalProperties": False}
    for key in ("type", "patternProperties"):
        mapping[key] = schema.pop(key)
    schema["anyOf"] = [mapping, {"type": "null"}]


class ModelConfig(_Section):
    """A model and the prompts that are kept ready for it."""

    path: FilePath = Field(description="The model file; of a split GGUF model, the first one.")
    chat_template: Template | None = Field(
        default=None,
        description=f"{', '.join(FORMATS)}, or a .jinja file. None: the model's own.",
    )
    bos_token: str | None = Field(
        default=None,
        max_length=64,
        description="What a template gets as bos_token. None: the model's own.",
    )
    eos_token: str | None = Field(
        default=None,
        max_length=64,
        description="What a template gets as eos_token. None: the model's own.",
    )
    template_date: TemplateDate = Field(
        default=None,
        description="The date for templates that ask for it: YYYY-MM-DD, or today.",
    )
    thinking: bool | None = Field(
        default=None, strict=True, description="enable_thinking, for templates that know it."
    )
    chat_template_kwargs: TemplateVariables = Field(
        default_factory=dict, description="Variables of the chat template, by name."
    )
    tokenizer: FilePath | None = Field(
        default=None,
        description="Files of the model's tokenizer: a folder, tokenizer.json or "
        "tokenizer_config.json. With a tokenizer.json, RKLLM gets tokens, not text.",
    )
    lora: FilePath | None = Field(
        default=None, description="A LoRA adapter for RKLLM, converted for the model."
    )
    lora_scale: float = values.number(
        default=1.0, ge=0, le=10, description="Strength of the LoRA adapter."
    )
    npu: NpuConfig = Field(
        default_factory=NpuConfig, description="How RKLLM uses the board for this model."
    )
    embedding: bool = Field(
        default=False, strict=True, description="A model for /v1/embeddings; it has no prompts."
    )
    rerank: bool = Field(
        default=False, strict=True, description="A model for /v1/rerank; it has no prompts."
    )
    pooling: Pooling = Field(
        default=Pooling.LAST, description="last or mean: which states make an embedding."
    )
    params: ModelParams = Field(
        default_factory=ModelParams, description="Context and sampling parameters."
    )
    prompts: dict[Name, PromptConfig] = Field(
        default_factory=dict,
        description="Prompts by name.",
        json_schema_extra=_mapping_or_nothing,
    )
    prompts_from: Patterns = Field(
        default=(),
        max_length=64,
        description="Patterns such as prompts/*.md; each file is a prompt named by its stem.",
    )
    preload: Preload = Field(
        default=False,
        validate_default=True,
        description="Load the model at the start: true, or prompts whose caches are loaded, too.",
    )
    idle_unload_s: float | None = values.number(
        default=None,
        ge=1,
        le=31_536_000,
        description="Unload the model after so many idle seconds. None is never.",
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _may_have_comments_only(cls, prompts: object) -> object:
        return {} if prompts is None else prompts

    @field_validator("prompts")
    @classmethod
    def _no_endpoint(cls, prompts: dict[str, PromptConfig]) -> dict[str, PromptConfig]:
        if RESERVED_PROMPT in prompts:
            message = (
                f"a prompt cannot be named {RESERVED_PROMPT!r}: "
                f"/v1/cache/MODEL/{RESERVED_PROMPT} means something else"
            )
            raise wrong(message, "choose another name")
        return prompts

    @field_validator("prompts")
    @classmethod
    def _answers_fit(
        cls, prompts: dict[str, PromptConfig], info: ValidationInfo
    ) -> dict[str, PromptConfig]:
        if params := info.data.get("params"):
            limit = params.max_context_len
            wanted = {name: prompt.params.max_new_tokens or 0 for name, prompt in prompts.items()}
            if long := {name: tokens for name, tokens in wanted.items() if tokens >= limit}:
                raise all_wrong(
                    [
                        ((n, "params", "max_new_tokens"), *_too_long(t, limit))
                        for n, t in long.items()
                    ]
                )

        return prompts

    @model_validator(mode="after")
    def _reads_or_writes(self) -> ModelConfig:
        if self.embedding and self.rerank:
            raise wrong(
                "a model makes embeddings or relevance scores, not both",
                "remove `embedding: true` or `rerank: true`",
            )
        for name, reads in {"embedding": self.embedding, "rerank": self.rerank}.items():
            if reads and (self.prompts or self.prompts_from):
                raise wrong(
                    f"a model with {name}: true has no prompts", f"remove them, or `{name}: true`"
                )
        if "pooling" in self.model_fields_set and not self.embedding:
            raise wrong(
                "pooling is for embedding models only", "remove it, or add `embedding: true`"
            )
        return self

    @model_validator(mode="after")
    def _preloads_what_is_declared(self) -> ModelConfig:
        """The files that a pattern finds are known to a look only."""
        problems: list[tuple[Steps, str, str]] = []
        for name in self.preload or ():
            if name in self.prompts or self.prompts_from:
                continue
            hint = "write `preload: true` for the model alone"
            if self.prompts:
                hint = nearest(name, self.prompts)
            problems.append((("preload",), f"preload: there is no prompt {name!r}", hint))

        if problems:
            raise all_wrong(problems)
        return self

    @model_validator(mode="after")
    def _thinks_or_not(self) -> ModelConfig:
        by_name = self.chat_template_kwargs.get(THINKING, self.thinking)
        if self.thinking is not None and by_name != self.thinking:
            stated = str(self.thinking).lower()
            raise wrong(
                f"thinking is {stated}, but chat_template_kwargs has {THINKING}: {show(by_name)}",
                "keep one of them",
            )
        return self

    def template_variables(self, prompt: str | None = None) -> dict[str, Any]:
        """The variables of the chat template: the model's, changed by the prompt's."""
        variables = dict(self.chat_template_kwargs)
        if self.thinking is not None:
            variables[THINKING] = self.thinking
        declared = self.prompts.get(prompt) if prompt is not None else None
        if declared is not None:
            variables |= declared.chat_template_kwargs
        return variables

    @property
    def pools(self) -> str:
        """How the model reads a text: `mean` or `last` for a vector, `rank` for a score.

        Empty for a model that answers it.
        """
        if self.embedding:
            return self.pooling.value
        return RANK if self.rerank else ""

    @property
    def thinks(self) -> bool | None:
        """Whether the model reasons before it answers. None: that is left to the template."""
        value = self.template_variables().get(THINKING)
        return value if isinstance(value, bool) else None

    def sampling(self, prompt: str | None) -> dict[str, int | float]:
        """The effective sampling parameters, sorted: the model's, changed by the prompt's.

        A prompt that the manifest does not name (one found by prompts_from) has the model's
        parameters.
        """
        values: dict[str, int | float] = self.params.model_dump(exclude={"max_context_len"})
        return dict(sorted((values | self.own_sampling(prompt)).items()))

    def own_sampling(self, prompt: str | None) -> dict[str, int | float]:
        """The changes of this prompt to the model's parameters, by the manifest."""
        declared = self.prompts.get(prompt) if prompt is not None else None
        if declared is None or not declared.params.model_fields_set:
            return {}
        return declared.params.model_dump(exclude_none=True)


EXTENSION: Final = "x-"
"""A key at the top that begins so is for the administrator's own use, as a place for YAML anchors.
"""


class SourcesConfig(_Section):
    """How files are found."""

    follow_links: bool = Field(
        default=True,
        description="Whether links in prompts_from folders may lead out of these.",
    )


class Manifest(_Section):
    """What should exist: models, and the prompts that are kept ready for them."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {f"^{EXTENSION}": {}}})

    version: Literal[1] = Field(description="Version of the manifest's format.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="The inference engine.")
    cache: CacheConfig = Field(
        default_factory=CacheConfig, description="The store of prompt caches."
    )
    serving: ServingConfig = Field(
        default_factory=ServingConfig, description="How requests are treated."
    )
    sources: SourcesConfig = Field(
        default_factory=SourcesConfig, description="How files are found."
    )
    models: dict[Name, ModelConfig] = Field(
        min_length=1,
        description="Models by name.",
        json_schema_extra={"additionalProperties": False},
    )

    _file: Path = PrivateAttr(default=Path())
    _lines: dict[Steps, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_extensions(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: below for key, below in value.items() if not str(key).startswith(EXTENSION)}

    @field_validator("version", mode="before")
    @classmethod
    def _known_version(cls, value: object) -> object:
        if type(value) is not int or value != 1:
            raise wrong(
                f"version: expected 1, got {show(value)}", "write `version: 1`, without quotes"
            )
        return value

    @field_validator("models")
    @classmethod
    def _suits_the_engine(
        cls, models: dict[str, ModelConfig], info: ValidationInfo
    ) -> dict[str, ModelConfig]:
        engine: EngineConfig | None = info.data.get("engine")
        if engine is None:
            return models
        problems: list[tuple[Steps, str, str]] = []

        for name, model in models.items():
            if name in RESERVED_MODELS:
                problems.append(
                    (
                        (name,),
                        f"a model cannot be named {name!r}: /v1/models/{name} means something else",
                        f"choose another name, such as {name}-model",
                    )
                )

            if engine.kind is EngineKind.RKLLM:
                tokens = model.params.max_context_len
                if tokens % 32 or tokens > RKLLM_MAX_CONTEXT:
                    message = "max_context_len: RKLLM takes multiples of 32 "
                    message += f"up to {RKLLM_MAX_CONTEXT}, got {tokens}"
                    problems.append(
                        ((name, "params", "max_context_len"), message, "4096 suits most models")
                    )

                continue

            for key in ("tokenizer", "lora", "lora_scale", "npu"):
                if key in model.model_fields_set:
                    hint = "remove it, or set engine.kind to rkllm"
                    problems.append(((name, key), f"{key} is for the rkllm engine only", hint))

        if problems:
            raise all_wrong(problems)
        return models

    @property
    def file(self) -> Path:
        """The manifest's own path, as it was given to `parse`."""
        return self._file

    def note_place(self, file: Path, lines: dict[Steps, int]) -> None:
        """Note the file that it was written in, and the line of each part; for the parser."""
        self._file = file
        self._lines = lines

    def line_of(self, *steps: str | int) -> int:
        """The line of what is declared at `steps`, or of the nearest thing around it.

        1-based; 0 if nothing was parsed.
        """
        return nearest_line(self._lines, steps)

    def __eq__(self, other: object) -> bool:
        """Equal when they ask for the same: a comment that moves the lines changes nothing.

        The order of models and prompts does, which has no part in the equality of dicts: the budget
        goes by it.
        """
        if (
            not isinstance(other, Manifest)
            or self.file != other.file
            or self.__dict__ != other.__dict__
        ):
            return False

        return self._order() == other._order()

    def _order(self) -> list[tuple[str, list[str]]]:
        return [(name, list(model.prompts)) for name, model in self.models.items()]

    __hash__ = None  # type: ignore[assignment]  # holds dicts


def system_conflict(manifest: Manifest, model: str, prompt: str) -> SystemConflict:
    """The treatment of a request that names this prompt and has another system message."""
    config = manifest.models.get(model)
    declared = config.prompts.get(prompt) if config is not None else None
    if declared is not None and declared.system_conflict is not None:
        return declared.system_conflict
    return manifest.serving.system_conflict


def json_schema() -> dict[str, Any]:
    """The manifest as JSON schema (draft 2020-12), for editors and for the documentation."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(),
    }
