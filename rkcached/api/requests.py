"""Records of the HTTP API's requests. Pure. Those of the answers are in `responses`.

The shapes are OpenAI's, with additions: `cache` in a request chooses a prompt, `top_k`, `min_p`
and `repeat_penalty` are accepted. A parameter that is not supported is rejected by name, unless its
value changes nothing. The messages of a chat are in `chat_messages`, the variables of its template
in `variables`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from rkcached.api.chat_messages import AssistantMessage, ChatMessage
from rkcached.api.variables import TemplateVariables
from rkcached.messages.bounds import MAX_TOKEN_IDS
from rkcached.messages.record import Many, Name, Record
from rkcached.messages.tools import ToolList

_INT32 = 2**31
_INT63 = 2**63

MOST: Final = -1
"""As `max_tokens`: an answer may fill the context."""

MAX_STOPS: Final = 32
"""Each is looked for in every piece of an answer."""


class NamedFunction(Record):
    name: Name


class NamedTool(Record):
    type: Literal["function"]
    function: NamedFunction


class PlainText(Record):
    type: Literal["text"]


class JsonObject(Record):
    type: Literal["json_object"]


class NamedSchema(Record):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(
        default=None, description="No effect: an answer always follows the schema."
    )


class JsonSchema(Record):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class StreamOptions(Record):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(
        default=None, description="Nothing is added to hide the length of the pieces; ignored."
    )


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _integral(value: object) -> object:
    """The integer that a number such as 8.0 is: JavaScript and Lua write them so now and then."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError(f"should be 1 or more, or {MOST} for as much as the context holds")
    return value


Whole = Annotated[int, BeforeValidator(_integral)]

AnswerTokens = Annotated[
    Whole,
    Field(ge=MOST, lt=_INT32, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_not_zero),
]

Duration = Annotated[
    str, Field(max_length=32, pattern=r"^-?([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h)?)+$")
]
"""As Ollama has it: 5m, 1h30m, 300s; a number alone means seconds."""

_Zero = Annotated[float, Field(ge=0, le=0)]
_One = Annotated[float, Field(ge=1, le=1)]
_NoItems = Annotated[list[Any], Field(max_length=0)]
_NoKeys = Annotated[dict[str, Any], Field(max_length=0)]


class _AboutTheService(Record):
    """OpenAI's parameters that are about their service, not about the answer.

    They are accepted, and change nothing.
    """

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    cache_control: Any = None


class NeutralOnly(Record):
    """Parameters that other servers have, and that are accepted if their value changes nothing.

    Programs send them with every request. Any other value would change the answer.
    """

    logit_bias: _NoKeys | _NoItems | None = None
    modalities: Annotated[Many[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    functions: _NoItems | None = None
    function_call: Literal["none", "auto"] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=1)] | None = None
    verbosity: Literal["medium"] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    repetition_penalty: _One | None = None
    length_penalty: _One | None = None
    typical_p: _One | None = None
    dynatemp_range: _Zero | None = None
    dry_multiplier: _Zero | None = None
    xtc_probability: _Zero | None = None
    mirostat: _Zero | None = None
    min_tokens: _Zero | None = None
    ignore_eos: Literal[False] | None = None


class GenerationRequest(_AboutTheService, NeutralOnly):
    """The parameters that chat and plain completions share."""

    model: Name = Field(description="A model, or `model/prompt`.")
    cache: Annotated[Name, Field(min_length=1)] | bool | None = Field(
        default=None,
        description="A prompt of the model; false: answer without any cache; "
        "nothing: the best that fits.",
    )
    use_cache: Annotated[Name, Field(min_length=1)] | bool | None = Field(
        default=None, description="Another word for cache."
    )
    cache_prompt: bool | None = Field(
        default=None,
        description="llama.cpp's. false: answer without any cache, as `cache: false` does.",
    )
    keep_alive: Duration | float | None = Field(
        default=None,
        description="Ollama's. 0 unloads the model after the answer, on the admin socket or with "
        "an admin key. Any other value has no effect: idle_unload_s in the manifest decides.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = Field(
        default=None,
        description="A stream also reports how much of the prompt has been read, in "
        "`prompt_progress`.",
    )
    max_tokens: AnswerTokens | None = Field(
        default=None, description="-1: as many as the context holds."
    )
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[Whole, Field(ge=0, le=100_000)] | None = None
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Leave out tokens less likely than this fraction of the most likely one.",
    )
    seed: Annotated[Whole, Field(ge=-_INT63, lt=_INT63)] | None = None
    stop: Annotated[
        str | Annotated[Many[str], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_listed)
    ] = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    n: Annotated[Whole, Field(ge=1, le=1)] | None = None

    _ignored: tuple[str, ...] = PrivateAttr(default=())

    @property
    def ignored(self) -> tuple[str, ...]:
        """The parameters of the body that were left out, as they are not supported."""
        return self._ignored

    def note_ignored(self, names: tuple[str, ...]) -> None:
        self._ignored = names

    @model_validator(mode="after")
    def _one_cache(self) -> Self:
        if self.cache is not None and self.use_cache is not None and self.cache != self.use_cache:
            raise ValueError("cache and use_cache mean the same, but have different values")
        return self

    @property
    def wanted_cache(self) -> str | bool | None:
        """A prompt; False for none; None for the best that fits."""
        wanted = self.cache if self.cache is not None else self.use_cache
        return None if wanted is True else wanted

    @property
    def is_cold(self) -> bool:
        """Whether the answer may use no cache."""
        return self.wanted_cache is False or self.cache_prompt is False

    @property
    def ends_model(self) -> bool:
        """Whether the model should leave the memory after the answer."""
        return self.keep_alive is not None and not re.search("[1-9]", str(self.keep_alive))

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the request names."""
        wanted = {
            "max_new_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": tuple(text for text in self.stop or () if text),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repeat_penalty": self.repeat_penalty,
        }
        return {name: value for name, value in wanted.items() if value is not None}


class ChatRequest(GenerationRequest, TemplateVariables):
    """`POST /v1/chat/completions`."""

    messages: Many[ChatMessage] = Field(min_length=1)
    max_completion_tokens: AnswerTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: ToolList | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = Field(
        default=None,
        description="The answer goes on with the last message, which is the assistant's. Without "
        "a value it does so if there is such a message.",
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="The opposite of continue_final_message."
    )

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message.

        llama.cpp's server does so whenever that is an answer, vLLM if it is told to.
        """
        if self.must_continue is not None:
            return self.must_continue
        return self._ends_with_an_answer()

    @property
    def must_continue(self) -> bool | None:
        """The client's own words about that."""
        if self.continue_final_message is None and self.add_generation_prompt is not None:
            return not self.add_generation_prompt
        return self.continue_final_message

    def _ends_with_an_answer(self) -> bool:
        last = self.messages[-1]
        return isinstance(last, AssistantMessage) and not last.tool_calls

    @model_validator(mode="after")
    def _continues_an_answer(self) -> Self:
        wanted = self.continue_final_message
        header = self.add_generation_prompt
        if wanted is not None and wanted == header:
            value = str(wanted).lower()
            raise ValueError(
                f"continue_final_message and add_generation_prompt are both {value}, but one is "
                "the opposite of the other; leave one of them out"
            )
        if self.continues and not self._ends_with_an_answer():
            name = "continue_final_message" if wanted else "add_generation_prompt: false"
            raise ValueError(f"{name} needs a last message of the assistant's, without tool calls")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (
            None,
            self.max_tokens,
        ):
            raise ValueError(
                "max_tokens and max_completion_tokens mean the same, but have different values"
            )
        return self

    def sampling(self) -> dict[str, Any]:
        wanted = super().sampling()
        if self.max_completion_tokens is not None:
            wanted["max_new_tokens"] = self.max_completion_tokens
        if self.logprobs:
            wanted["logprobs"] = self.top_logprobs or 0
        return wanted


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: the text as it is, without a template."""

    prompt: str | Annotated[Many[str], Field(min_length=1, max_length=1)] = Field(
        min_length=1, description="One text. It is not put into the model's chat template."
    )
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def sampling(self) -> dict[str, Any]:
        wanted = super().sampling()
        if self.logprobs is not None:
            wanted["logprobs"] = self.logprobs
        return wanted


TokenIds = Annotated[Many[Annotated[int, Field(ge=0, lt=_INT32)]], Field(min_length=1)]
EmbeddingInput = Annotated[str, Field(min_length=1)] | TokenIds


class EmbeddingRequest(_AboutTheService):
    """`POST /v1/embeddings`: a text, or tokens, or a list of these."""

    max_values: ClassVar[int] = MAX_TOKEN_IDS

    model: Name
    input: EmbeddingInput | Annotated[Many[EmbeddingInput], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None

    def each(self) -> Iterator[str | tuple[int, ...]]:
        """The texts, or their tokens."""
        if isinstance(self.input, str):
            yield self.input
        elif isinstance(self.input[0], int):
            yield tuple(self.input)  # then all of them are numbers
        else:
            for item in self.input:
                yield item if isinstance(item, str) else tuple(item)


Document = Annotated[str, Field(min_length=1)]


class TextDocument(Record):
    """A document as an object."""

    text: Document


class RerankRequest(_AboutTheService):
    """`POST /v1/rerank`: a query and documents, as llama.cpp's server and Cohere take them."""

    model: Name
    query: Document
    documents: Annotated[Many[Document | TextDocument], Field(min_length=1, max_length=2048)]
    top_n: int | None = Field(
        default=None, ge=1, description="The answer has so many of the best; by default all."
    )
    return_documents: bool | None = Field(
        default=None, description="The answer repeats the documents."
    )

    @model_validator(mode="before")
    @classmethod
    def _has_documents(cls, value: object) -> object:
        if isinstance(value, dict) and "texts" in value and "documents" not in value:
            raise ValueError(
                "has texts, as text-embeddings-inference takes them; name them documents, and "
                "add the model"
            )
        return value

    def texts(self) -> list[str]:
        return [item if isinstance(item, str) else item.text for item in self.documents]


class StoreRequest(Record):
    """`POST /v1/cache/{model}`."""

    cache_name: Name
    content: str
    wait: bool = Field(
        default=True, description="Answer when the prompt cache is built; else at once, with 202."
    )


class GenerateBinaryRequest(Record):
    """`POST /v1/cache/{model}/generate-binary`."""

    cache_name: Name
    prompt: str | None = Field(
        default=None,
        description="A new text to store; without it, the stored prompt keeps its own.",
    )


class SuggestRequest(Record):
    """`POST /v1/suggestions`."""

    id: Name = Field(description="Of a suggestion.")
    name: Name = Field(description="The name of the prompt to be.")


class ModelRequest(Record):
    """`POST /v1/models/load` and `/unload`."""

    model: Name


class CollectRequest(Record):
    """`POST /v1/gc`."""

    dry_run: bool = Field(default=False, description="Only say what would be removed.")
    strangers: bool = Field(
        default=False,
        description="Also remove what is not the store's, except what the manifest names.",
    )
