"""A request that is ready to run, and the pieces of its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

from rkcached.engines.base import FinishReason, Sampling, TokenLogprob
from rkcached.plan.desired import DesiredModel
from rkcached.serving.report import CacheReport, Usage
from rkcached.sources.records import Key
from rkcached.worker.held import NOBODY

SYSTEM_MESSAGE = "the system message"
"""The name of that part."""


class Part(NamedTuple):
    """A part of a request that its user knows, such as the system message."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request, checked and rendered."""

    model: DesiredModel
    named: Key | None
    """The prompt that the client asks for by name."""
    prompt: str
    """The whole rendered request."""
    sampling: Sampling
    cold: bool
    """Use no prompt cache, and none of the KV state."""
    accepted: float
    """Monotonic seconds."""
    owner: int = NOBODY
    """The uid of the client."""
    state_owner: int = NOBODY
    """Who may go on from the state that it leaves in the engine: a uid, or EVERYBODY."""
    parts: tuple[Part, ...] = ()
    """The messages, in the order in which the prompt has them."""
    goes_on: bool = False
    """The conversation has an answer already."""
    with_tools: bool = False
    variables: tuple[str, ...] = ()
    """The names of the template's variables that the request sets."""
    text_param: str = "messages"
    """The request's parameter that holds the text; errors name it."""
    schema_param: str = "response_format"
    """The request's parameter that holds the schema of the answer; errors name it."""
    ignores_unsupported: bool = False
    """Sampling that the engine cannot change in a run is left out, not refused."""
    ignored: tuple[str, ...] = ()
    """The client asked for these and does not get them; the answer lists them."""
    ends_model: bool = False
    """The model leaves the memory after the answer."""
    correct: Callable[[str, str], Awaitable[str]] | None = None
    """Renders a second try from an answer that does not fit the schema, and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A piece of an answer."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How much of a request is read, before its answer begins; not every engine says so."""

    cached_tokens: int
    """Of those that are read: they were in the KV state already."""
    read_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of an answer."""

    finish: FinishReason
    usage: Usage
    report: CacheReport
