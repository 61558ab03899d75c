"""The manifest: what should exist, as its owner wrote it.

`parse` turns YAML text into frozen models, or raises one ManifestError with every problem, each with its line and a
hint. It is pure: no file is opened, and whether a path exists is for `sources` to say. `yamlmap` reads the text, so
that `verify: off` means what it says; `problems` has the words. The same models make the JSON schema;
`etc/rkcached/manifest.example.yaml` explains each key, and a test holds the two together.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from rkcached.errors import ManifestError
from rkcached.problems import NAME, NAME_RULE, Sections, all_wrong, explain, nearest, wrong
from rkcached.yamlmap import Steps, YamlReader, nearest_line, show

__all__ = [
    "BUILTIN_TEMPLATES",
    "NAME",
    "NAME_RULE",
    "RKLLM_ABIS",
    "CacheConfig",
    "EngineConfig",
    "EngineKind",
    "FingerprintMode",
    "Manifest",
    "ModelConfig",
    "ModelParams",
    "NpuConfig",
    "Pooling",
    "PromptConfig",
    "SamplingParams",
    "ServingConfig",
    "Verify",
    "json_schema",
    "parse",
]

BUILTIN_TEMPLATES: Final = ("chatml", "llama3", "gemma", "deepseek", "phi")


RKLLM_ABIS: Final = ("1.1.0", "1.2.0", "1.2.1b1", "1.2.1", "1.3.0")
"""The first version of each binary interface of RKLLM that the binding speaks."""

RESERVED_MODELS: Final = ("available", "load", "loaded", "unload")
RESERVED_PROMPT: Final = "generate-binary"
"""The HTTP API has another meaning for these."""

RKLLM_MAX_CONTEXT: Final = 16_384


class EngineKind(StrEnum):
    RKLLM = "rkllm"
    LLAMACPP = "llamacpp"
    MEMORY = "memory"


class Verify(StrEnum):
    """How much a new prompt cache must prove before it is published."""

    OFF = "off"
    HIT = "hit"
    EXACT = "exact"


class Pooling(StrEnum):
    """How an embedding model's states of all tokens become one vector."""

    MEAN = "mean"
    LAST = "last"


class FingerprintMode(StrEnum):
    """Whether sampling parameters belong to a prompt cache's identity."""

    FULL = "full"
    KV = "kv"


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _absolute(path: Path | str, info: ValidationInfo) -> str:
    """Join to the manifest's directory by the letters alone; links are not followed, `~` and variables not expanded."""
    text = str(path)
    if re.search("[\0\ud800-\udfff]", text):
        raise wrong(f"{info.field_name}: {show(text)} holds a character that no path can have")
    if text.startswith("~"):
        raise wrong(f"{info.field_name}: '~' is not expanded in {show(text)}", "write the absolute path")
    base = (info.context or {}).get("base")
    return os.path.abspath(os.path.join(base, text)) if base else text  # noqa: PTH100, PTH118 -- resolve() reads links


def _path(value: object, info: ValidationInfo) -> object:
    if value == "":
        raise wrong(f"{info.field_name}: the path is empty", "name a file")
    return Path(_absolute(value, info)) if isinstance(value, str | Path) else value


def _pattern(value: str, info: ValidationInfo) -> str:
    head, _, last = value.rpartition("/")
    if not last or last in {".", ".."}:
        raise wrong(f"prompts_from: {show(value)} names a directory", "say which files, for example 'prompts/*.md'")
    if re.search(r"[*?\[]", head) or "**" in last:
        hint = "use one '*' for the file name, and one pattern for each directory"
        raise wrong(f"prompts_from: wildcards work only in the last part of a path, got {show(value)}", hint)
    return _absolute(value, info)


def _template(value: str, info: ValidationInfo) -> str:
    if value in BUILTIN_TEMPLATES:
        return value
    if value.endswith((".jinja", ".jinja2")):
        return _absolute(value, info)
    message = f"chat_template: {show(value)} is neither a built-in template nor a .jinja file"
    raise wrong(message, nearest(value, BUILTIN_TEMPLATES))


def _abi(value: str | None) -> str | None:
    if value is None or value in RKLLM_ABIS:
        return value
    raise wrong(f"abi: {show(value)} is no known binary interface", f"one of {', '.join(RKLLM_ABIS)}")


def _size(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}(\.\d{1,9})?\s*[A-Za-z]*\s*", value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise wrong(f"max_bytes: expected a size, got {show(value)}", "write bytes, or a unit: 2GiB, 500 MB")


_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1 << 20, "maximum": 1 << 60}, {"type": "string"}]}
_ABI_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string", "enum": list(RKLLM_ABIS)}, {"type": "null"}]}
_PATHS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 64}]}

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
FilePath = Annotated[Path, BeforeValidator(_path)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Size = Annotated[ByteSize, BeforeValidator(_size), Field(ge=1 << 20, le=1 << 60), WithJsonSchema(_SIZE_SCHEMA)]

# The bounds of each parameter, written once: a model has defaults, a prompt only what it changes.
_number = partial(Field, strict=True, allow_inf_nan=False)
_whole = partial(Field, strict=True)
_max_new_tokens = partial(_whole, ge=1, le=131_072, description="Most tokens an answer may have.")
_temperature = partial(_number, ge=0, le=5, description="Spread of the sampling; 0 always takes the likeliest token.")
_top_k = partial(_whole, ge=0, le=100_000, description="Sample among this many likeliest tokens; 0 means all.")
_top_p = partial(_number, gt=0, le=1, description="Sample among the likeliest tokens that sum to this probability.")
_repeat_penalty = partial(_number, gt=0, le=10, description="Makes recent tokens less likely; 1 is off.")
_frequency_penalty = partial(_number, ge=-2, le=2, description="Penalty that grows with each use of a token.")
_presence_penalty = partial(_number, ge=-2, le=2, description="Penalty for a token that was used at all.")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Section):
    """The inference engine."""

    kind: EngineKind = Field(
        default=EngineKind.LLAMACPP, description="Inference library: rkllm, llamacpp, or memory for tests."
    )
    threads: int = _whole(default=0, ge=0, le=256, description="CPU threads of a llamacpp worker; 0 is one per core.")
    library: FilePath = Field(
        default=Path("/usr/lib/librkllmrt.so"), description="RKLLM's runtime library.", validate_default=True
    )
    abi: Annotated[str | None, AfterValidator(_abi)] = Field(
        default=None,
        description="RKLLM's binary interface, by version; None finds it.",
        json_schema_extra=_ABI_SCHEMA,
    )
    timeout_s: float = _number(
        default=300.0, ge=5, le=3600, description="Kill a worker whose library says nothing for so long."
    )
    concurrent: bool = Field(default=False, strict=True, description="Let several models use the NPU at the same time.")
    max_loaded: int | None = _whole(
        default=None,
        ge=1,
        le=64,
        description="Models in memory at once. None: 1 with rkllm (unless concurrent), else what fits in memory.",
    )


class CacheConfig(_Section):
    """The store of prompt caches."""

    max_bytes: Size | None = Field(
        default=None, description="Budget of the store: bytes, or with a unit. None is no limit."
    )
    verify: Verify = Field(default=Verify.EXACT, description="Proof required of a new prompt cache before it is used.")
    fingerprint: FingerprintMode = Field(
        default=FingerprintMode.FULL,
        description="full: sampling parameters invalidate a prompt cache too; kv: they do not.",
    )
    min_tokens: int = _whole(default=0, ge=0, le=1_048_576, description="Shorter prompts are not cached.")


class ServingConfig(_Section):
    """How requests are treated."""

    queue: int = _whole(default=32, ge=1, le=10_000, description="Requests that may wait for a model; more get 503.")
    request_timeout_s: float | None = _number(
        default=None, gt=0, le=86_400, description="Stop a request that takes longer. None is no limit."
    )
    shutdown_grace_s: float = _number(
        default=3.0, ge=0, le=3600, description="Running answers may end for so long when the daemon is stopped."
    )


class SamplingParams(_Section):
    """What one prompt changes of its model's parameters."""

    max_new_tokens: int | None = _max_new_tokens(default=None)
    temperature: float | None = _temperature(default=None)
    top_k: int | None = _top_k(default=None)
    top_p: float | None = _top_p(default=None)
    repeat_penalty: float | None = _repeat_penalty(default=None)
    frequency_penalty: float | None = _frequency_penalty(default=None)
    presence_penalty: float | None = _presence_penalty(default=None)


class ModelParams(_Section):
    """Context and sampling of a model."""

    max_context_len: int = _whole(
        default=4096, ge=32, le=1_048_576, description="Tokens the context holds: prompt and answer together."
    )
    max_new_tokens: int = _max_new_tokens(default=512, validate_default=True)
    temperature: float = _temperature(default=0.8)
    top_k: int = _top_k(default=40)
    top_p: float = _top_p(default=0.9)
    repeat_penalty: float = _repeat_penalty(default=1.1)
    frequency_penalty: float = _frequency_penalty(default=0.0)
    presence_penalty: float = _presence_penalty(default=0.0)

    @field_validator("max_new_tokens")
    @classmethod
    def _fits(cls, value: int, info: ValidationInfo) -> int:
        if value >= (limit := info.data.get("max_context_len", value + 1)):
            raise wrong(*_too_long(value, limit))
        return value


def _too_long(value: int, limit: int) -> tuple[str, str]:
    message = f"max_new_tokens is {value}, but must be less than the model's max_context_len, {limit}"
    return message, "lower max_new_tokens or raise max_context_len"


class PromptConfig(_Section):
    """A prompt that is kept as a prompt cache: its files, joined. A path alone is the short form."""

    files: Annotated[
        tuple[FilePath, ...], BeforeValidator(_listed), WithJsonSchema(_PATHS_SCHEMA | {"minItems": 1})
    ] = Field(min_length=1, max_length=64, description="The prompt's files, joined in this order.")
    params: SamplingParams = Field(default_factory=SamplingParams, description="Changes to the model's parameters.")
    description: str = Field(default="", max_length=1000, description="Shown wherever caches are listed.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"files": [value]} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}


class NpuConfig(_Section):
    """How RKLLM uses the board for a model."""

    enabled_cpus: tuple[Annotated[int, Field(strict=True, ge=0, le=31)], ...] = Field(
        default=(), max_length=32, description="CPU numbers that help the NPU; empty leaves it to the runtime."
    )
    embed_flash: bool | None = Field(
        default=None, strict=True, description="Read the embedding table from flash, not from memory."
    )
    base_domain_id: int = _whole(default=0, ge=0, le=15, description="NPU address domain.")
    n_keep: int | None = _whole(
        default=None, ge=-1, le=RKLLM_MAX_CONTEXT, description="KV positions to keep when the context is full."
    )
    ignore_eos: bool = Field(default=False, strict=True, description="Go on after an end-of-sequence token.")


class ModelConfig(_Section):
    """A model and the prompts that are kept ready for it."""

    path: FilePath = Field(description="The model file.")
    chat_template: Annotated[str, AfterValidator(_template)] = Field(
        default="chatml", description=f"{', '.join(BUILTIN_TEMPLATES)}, or a .jinja file."
    )
    bos_token: str = Field(default="", max_length=64, description="What a .jinja template gets as bos_token.")
    eos_token: str = Field(default="", max_length=64, description="What a .jinja template gets as eos_token.")
    thinking: bool | None = Field(default=None, strict=True, description="enable_thinking, for templates that know it.")
    tokenizer: FilePath | None = Field(default=None, description="tokenizer.json: RKLLM then gets tokens, not text.")
    lora: FilePath | None = Field(default=None, description="A LoRA adapter for RKLLM, converted for the model.")
    lora_scale: float = _number(default=1.0, ge=0, le=10, description="Strength of the LoRA adapter.")
    npu: NpuConfig = Field(default_factory=NpuConfig, description="How RKLLM uses the board for this model.")
    embedding: bool = Field(default=False, strict=True, description="A model for /v1/embeddings; it has no prompts.")
    pooling: Pooling = Field(default=Pooling.LAST, description="last or mean: which states make an embedding.")
    params: ModelParams = Field(default_factory=ModelParams, description="Context and sampling parameters.")
    prompts: dict[Name, PromptConfig] = Field(
        default_factory=dict, description="Prompts by name.", json_schema_extra={"additionalProperties": False}
    )
    prompts_from: Annotated[
        tuple[Pattern, ...], BeforeValidator(_listed), WithJsonSchema(_PATHS_SCHEMA | {"default": []})
    ] = Field(
        default=(), max_length=64, description="Patterns such as prompts/*.md; each file is a prompt named by its stem."
    )
    idle_unload_s: float | None = _number(
        default=None, ge=1, le=31_536_000, description="Unload the model after so many idle seconds. None is never."
    )

    @field_validator("prompts")
    @classmethod
    def _no_endpoint(cls, prompts: dict[str, PromptConfig]) -> dict[str, PromptConfig]:
        if RESERVED_PROMPT in prompts:
            said = (
                f"a prompt cannot be named {RESERVED_PROMPT!r}: /v1/cache/MODEL/{RESERVED_PROMPT} means something else"
            )
            raise wrong(said, "choose another name")
        return prompts

    @field_validator("prompts")
    @classmethod
    def _answers_fit(cls, prompts: dict[str, PromptConfig], info: ValidationInfo) -> dict[str, PromptConfig]:
        if params := info.data.get("params"):
            limit = params.max_context_len
            wanted = {name: prompt.params.max_new_tokens or 0 for name, prompt in prompts.items()}
            if long := {name: tokens for name, tokens in wanted.items() if tokens >= limit}:
                raise all_wrong([((n, "params", "max_new_tokens"), *_too_long(t, limit)) for n, t in long.items()])
        return prompts

    @model_validator(mode="after")
    def _embeds_or_answers(self) -> ModelConfig:
        if self.embedding and (self.prompts or self.prompts_from):
            raise wrong("an embedding model has no prompts", "remove them, or `embedding: true`")
        if "pooling" in self.model_fields_set and not self.embedding:
            raise wrong("pooling is for embedding models only", "remove it, or add `embedding: true`")
        return self

    def sampling(self, prompt: str | None) -> dict[str, int | float]:
        """The effective sampling parameters: the model's, changed by the prompt's; sorted, without max_context_len.

        A prompt that the manifest does not name (one found by prompts_from) has the model's parameters.
        """
        values: dict[str, int | float] = self.params.model_dump(exclude={"max_context_len"})
        if prompt in self.prompts:
            values |= self.prompts[prompt].params.model_dump(exclude_none=True)
        return dict(sorted(values.items()))


class Manifest(_Section):
    """What should exist: models, and the prompts that are kept ready for them."""

    version: Literal[1] = Field(description="Version of the manifest's format.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="The inference engine.")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="The store of prompt caches.")
    serving: ServingConfig = Field(default_factory=ServingConfig, description="How requests are treated.")
    models: dict[Name, ModelConfig] = Field(
        min_length=1, description="Models by name.", json_schema_extra={"additionalProperties": False}
    )

    _file: Path = PrivateAttr(default=Path())
    _lines: dict[Steps, int] = PrivateAttr(default_factory=dict)

    @field_validator("version", mode="before")
    @classmethod
    def _known_version(cls, value: object) -> object:
        if type(value) is not int or value != 1:
            raise wrong(f"version: expected 1, got {show(value)}", "write `version: 1`, without quotes")
        return value

    @field_validator("models")
    @classmethod
    def _suits_the_engine(cls, models: dict[str, ModelConfig], info: ValidationInfo) -> dict[str, ModelConfig]:
        engine: EngineConfig | None = info.data.get("engine")
        if engine is None:
            return models
        found: list[tuple[Steps, str, str]] = []
        for name, model in models.items():
            if name in RESERVED_MODELS:
                found.append(((name,), f"a model cannot be named {name!r}: /v1/models/{name} means something else", ""))
            if engine.kind is EngineKind.RKLLM:
                tokens = model.params.max_context_len
                if tokens % 32 or tokens > RKLLM_MAX_CONTEXT:
                    message = f"max_context_len: RKLLM takes multiples of 32 up to {RKLLM_MAX_CONTEXT}, got {tokens}"
                    found.append(((name, "params", "max_context_len"), message, "4096 suits most models"))
                continue
            for key in ("tokenizer", "lora", "lora_scale", "npu"):
                if key in model.model_fields_set:
                    hint = "remove it, or set engine.kind to rkllm"
                    found.append(((name, key), f"{key} is for the rkllm engine only", hint))
        if found:
            raise all_wrong(found)
        return models

    @property
    def file(self) -> Path:
        """The manifest's own path, as it was given to `parse`."""
        return self._file

    def line_of(self, *steps: str | int) -> int:
        """The line of what is declared at `steps`, or of the nearest thing around it; 1-based, 0 if not parsed."""
        return nearest_line(self._lines, steps)

    def __eq__(self, other: object) -> bool:
        """Equal when they ask for the same: a comment that moves the lines changes nothing."""
        return isinstance(other, Manifest) and self.__dict__ == other.__dict__ and self.file == other.file

    __hash__ = None  # type: ignore[assignment]  # holds dicts


_SECTIONS: Final[Sections] = {
    "": Manifest,
    "engine": EngineConfig,
    "cache": CacheConfig,
    "serving": ServingConfig,
    "models.*": ModelConfig,
    "models.*.npu": NpuConfig,
    "models.*.params": ModelParams,
    "models.*.prompts.*": PromptConfig,
    "models.*.prompts.*.params": SamplingParams,
}


def parse(text: str, *, file: Path) -> Manifest:
    """The manifest in `text`; relative paths are taken from the directory of `file`, which is not opened.

    Raises ManifestError with every problem there is, in file order.
    """
    reader = YamlReader(file)
    data = reader.read(text.removeprefix("\ufeff"))
    problems = list(reader.problems)
    try:
        manifest = Manifest.model_validate(data, context={"base": os.path.abspath(file.parent)})  # noqa: PTH100
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            for steps, message, hint in explain(detail, _SECTIONS):
                problems.append(reader.problem(nearest_line(reader.lines, steps), message, hint))
    if problems:  # what an alias repeats is one problem
        raise ManifestError(tuple(sorted(dict.fromkeys(problems), key=lambda problem: problem.line)))
    manifest._file, manifest._lines = file, reader.lines  # noqa: SLF001 -- its own module
    return manifest


def json_schema() -> dict[str, Any]:
    """The manifest as JSON schema (draft 2020-12), for editors and for the documentation."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
