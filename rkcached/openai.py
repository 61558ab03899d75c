"""Records of the HTTP API: what a client may send, and what it gets. Pure.

The shapes are OpenAI's, with three additions: `cache` in a request chooses a prompt, `top_k` and `repeat_penalty` are
accepted, and `rkcached` in an answer says what happened. A parameter that is not supported is refused by name.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rkcached.errors import RequestError
from rkcached.template import Message

_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""OpenAI's parameters that are about their service, not about the answer."""

Body = TypeVar("Body", bound=BaseModel)

Role = Literal["system", "developer", "user", "assistant"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Role
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> Message:
        """As templates know it: `developer` is another word for `system`, and text parts are one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(_Body):
    include_usage: bool = False


class GenerationRequest(_Body):
    """What chat and plain completions share."""

    model: str = Field(description="A model, or `model/prompt`.")
    cache: str | bool | None = Field(
        default=None, description="A prompt of the model; false: answer without any cache; nothing: the best that fits."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=100_000)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    stop: list[str] | None = Field(default=None, max_length=4)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    n: Literal[1] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {k: v for k, v in data.items() if k not in _IGNORED}
        if "use_cache" in data:  # another word for it
            data.setdefault("cache", data.pop("use_cache"))
        return data

    @field_validator("cache")
    @classmethod
    def _true_is_the_best(cls, value: str | bool | None) -> str | bool | None:
        return None if value is True else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the request names."""
        wanted = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": tuple(text for text in self.stop or () if text),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repeat_penalty": self.repeat_penalty,
        }
        return {name: value for name, value in wanted.items() if value is not None}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: the text as it is, without a template."""

    prompt: str = Field(min_length=1, description="One text. It is not put into the model's chat template.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: object) -> object:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class StoreRequest(_Body):
    """`POST /v1/cache/{model}`."""

    cache_name: str
    content: str
    wait: bool = Field(default=True, description="Answer when the prompt cache is built; else at once, with 202.")


class GenerateBinaryRequest(_Body):
    """`POST /v1/cache/{model}/generate-binary`."""

    cache_name: str
    prompt: str | None = Field(default=None, description="A new text to store; without it, the stored text is used.")


class ModelRequest(_Body):
    """`POST /v1/models/load` and `/unload`."""

    model: str


class PromptTokensDetails(_Body):
    cached_tokens: int


class Usage(_Body):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None
    """None where the runtime does not measure it."""


class CacheReport(_Body):
    """What rkcached did for this answer. All of it was measured."""

    cache: str | None
    """The prompt whose cache was loaded."""
    state: str
    """hit, loaded (nobody measured more), miss (loaded, did not help), cold, or why the wanted one is not used."""
    reason: str = ""
    cached_tokens: int | None
    """None where the runtime does not measure it."""
    ttft_ms: float
    """Request accepted to first token written."""
    queue_ms: float
    load_ms: float
    prefill_ms: float
    decode_tokens_per_s: float


def parse_body(record: type[Body], data: bytes) -> Body:
    """Decode and validate a JSON body. Errors: RequestError 400 that names the first bad parameter."""
    try:
        return record.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = [str(part) for part in first["loc"] if part not in ("str", "list[TextPart]", "bool")]
        param = ".".join(where) or None
        match first["type"]:
            case "json_invalid":
                raise RequestError(
                    400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json"
                ) from error
            case "extra_forbidden":
                raise RequestError(
                    400, f"{param} is not supported", code="unsupported_parameter", param=param
                ) from error
            case "missing":
                raise RequestError(400, f"{param} is missing", code="missing_parameter", param=param) from error
            case _:
                raise RequestError(
                    400, f"{param or 'the body'}: {first['msg']}", code="invalid_value", param=param
                ) from error


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    message = error.message + (f" ({error.hint})" if error.hint else "")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
