"""The variables of a chat template that a request sets, in the words of several servers. Pure.

vLLM and llama.cpp take any variable in `chat_template_kwargs`, OpenAI has `reasoning_effort`,
Ollama `think`, and Qwen's own clients `enable_thinking`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from rkcached.messages.bounds import is_deeper
from rkcached.messages.record import Many, Name, Record
from rkcached.sources.values import OWN_VARIABLES

MAX_VARIABLES = 32
MAX_VARIABLES_BYTES = 64 << 10
MAX_VARIABLES_DEPTH = 16
"""A tool in `custom_tools`, with the schema of its arguments, has about ten levels."""

_KWARGS: Final = "chat_template_kwargs"


class TemplateVariables(Record):
    """The part of a request that sets variables of the chat template."""

    chat_template_kwargs: dict[Name, Any] | None = Field(
        default=None, description="Variables of the chat template."
    )
    enable_thinking: bool | None = Field(
        default=None, description="The variable of that name, by which templates switch reasoning."
    )
    think: bool | Literal["low", "medium", "high"] | None = Field(
        default=None, description="Ollama's word for enable_thinking or reasoning_effort."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None,
        description="The variable of that name; none also sets enable_thinking to false.",
    )
    documents: Annotated[Many[dict[str, Any]], Field(max_length=1024)] | None = Field(
        default=None, description="The variable of that name, for templates that show documents."
    )

    def variables(self) -> dict[str, Any]:
        """The variables of the template, by name."""
        return {name: value for _, name, value in self._wishes()}

    def _wishes(self) -> Iterator[tuple[str, str, Any]]:
        """The parameter, and the name and value of the variable that it sets."""
        for name, value in (self.chat_template_kwargs or {}).items():
            yield f"{_KWARGS}.{name}", name, value
        if self.enable_thinking is not None:
            yield "enable_thinking", "enable_thinking", self.enable_thinking
        if self.think is not None:
            yield "think", "enable_thinking", self.think is not False
        if isinstance(self.think, str):
            yield "think", "reasoning_effort", self.think
        if self.reasoning_effort is not None:
            yield "reasoning_effort", "reasoning_effort", self.reasoning_effort
        if self.reasoning_effort == "none":
            yield "reasoning_effort", "enable_thinking", False
        if self.documents is not None:
            yield "documents", "documents", self.documents

    @field_validator("chat_template_kwargs")
    @classmethod
    def _is_small(cls, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        if variables is None:
            return None
        if len(variables) > MAX_VARIABLES:
            raise ValueError(f"it has more than {MAX_VARIABLES} variables")
        for name in variables:
            if name in OWN_VARIABLES:
                raise ValueError(f"{name} cannot be set here, as rkcached sets it; leave it out")
        if is_deeper(variables, MAX_VARIABLES_DEPTH):
            raise ValueError(f"it is nested deeper than {MAX_VARIABLES_DEPTH} levels")
        if len(json.dumps(variables)) > MAX_VARIABLES_BYTES:
            raise ValueError(f"it is larger than {MAX_VARIABLES_BYTES:,} bytes")
        return variables

    @field_validator("documents")
    @classmethod
    def _is_flat(cls, documents: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if is_deeper(documents, MAX_VARIABLES_DEPTH):
            raise ValueError(f"they are nested deeper than {MAX_VARIABLES_DEPTH} levels")
        return documents

    @model_validator(mode="after")
    def _is_one_wish(self) -> Self:
        known: dict[str, tuple[str, Any]] = {}
        for param, name, value in self._wishes():
            other, agreed = known.setdefault(name, (param, value))
            if agreed != value:
                raise ValueError(
                    f"{other} and {param} contradict each other about {name}; leave one of them out"
                )
        return self
