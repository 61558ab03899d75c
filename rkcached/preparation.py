"""From a request to what an engine is asked: which model and prompt, the rendered text, the sampling. Or why not.

Every refusal is a RequestError with its HTTP status, OpenAI's code and the next thing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rkcached import errors
from rkcached.desired import DesiredModel
from rkcached.engines.base import Sampling
from rkcached.errors import RequestError
from rkcached.openai import ChatRequest, CompletionRequest
from rkcached.plan import Key, Trouble
from rkcached.template import Message
from rkcached.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request, ready to run."""

    model: DesiredModel
    named: Key | None
    """The prompt that was asked for by name."""
    prompt: str
    """The whole rendered request."""
    sampling: Sampling
    cold: bool
    accepted: float
    """Monotonic seconds."""


class Preparation:
    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view

    def chat(self, request: ChatRequest, accepted: float) -> Job:
        """Check a request against what is declared, and render it. Errors: RequestError."""
        name, _, wanted = request.model.partition("/")
        model = self.model(name)
        if isinstance(request.cache, str) and wanted and request.cache != wanted:
            raise RequestError(
                400, f"model names the prompt {wanted!r}, cache names {request.cache!r}", code="conflict", param="cache"
            )
        if isinstance(request.cache, str):
            wanted = request.cache
        messages = [message.plain() for message in request.messages]
        named = Key(name, wanted) if wanted else None
        if named is not None:
            messages = self._with_prompt(named, messages)
        if any("\0" in message["content"] for message in messages):
            raise _nul("messages")
        try:
            prompt = model.template.render(messages)
        except errors.TemplateError as error:
            raise RequestError(400, error.message, code="template_error", param="messages", hint=error.hint) from error
        values: dict[str, Any] = model.config.sampling(named.prompt if named else None) | request.sampling()
        return Job(
            model=model,
            named=named,
            prompt=prompt,
            sampling=Sampling(**values),
            cold=request.cache is False,
            accepted=accepted,
        )

    def completion(self, request: CompletionRequest, accepted: float) -> Job:
        """Check a request whose text goes to the model as it is. Errors: RequestError."""
        name, _, prompt = request.model.partition("/")
        if prompt or isinstance(request.cache, str):
            raise RequestError(
                400,
                "a plain completion has no system message, so no prompt can be chosen by name",
                code="unsupported_parameter",
                param="model" if prompt else "cache",
                hint=f"ask for the model {name!r}, or use /v1/chat/completions",
            )
        if "\0" in request.prompt:
            raise _nul("prompt")
        model = self.model(name)
        values: dict[str, Any] = model.config.sampling(None) | request.sampling()
        return Job(
            model=model,
            named=None,
            prompt=request.prompt,
            sampling=Sampling(**values),
            cold=request.cache is False,
            accepted=accepted,
        )

    def model(self, name: str) -> DesiredModel:
        view = self._view()
        model = view.model(name)
        if model is None:
            known = ", ".join(sorted(view.desired.models)) or "none"
            raise RequestError(
                404, f"the model {name!r} does not exist; known models: {known}", code="model_not_found", param="model"
            )
        if isinstance(model, Trouble):
            raise RequestError(
                503, f"the model {name!r} cannot be used: {model.message}", code="model_unavailable", hint=model.hint
            )
        return model

    def _with_prompt(self, key: Key, messages: list[Message]) -> list[Message]:
        """The messages with the prompt as their system message."""
        view = self._view()
        text = view.desired.texts.get(key)
        if text is None:
            declared = view.desired.prompts.get(key)
            if declared is None:
                known = ", ".join(k.prompt for k in view.desired.prompts if k.model == key.model) or "none"
                raise RequestError(
                    404,
                    f"the model {key.model!r} has no prompt {key.prompt!r}; known prompts: {known}",
                    code="prompt_not_found",
                    param="model",
                )
            trouble = declared.trouble or Trouble(message="it has no text")
            raise RequestError(
                503, f"the prompt {key} cannot be used: {trouble.message}", code="prompt_blocked", hint=trouble.hint
            )
        systems = [message["content"] for message in messages if message["role"] == "system"]
        if any(system.rstrip("\r\n") != text for system in systems):
            raise RequestError(
                409,
                f"the request has a system message of its own, and it is not the prompt {key}",
                code="system_message_conflict",
                param="messages",
                hint=f"leave the system message out, or ask for the model {key.model!r} without a prompt",
            )
        return [Message(role="system", content=text), *(m for m in messages if m["role"] != "system")]


def as_request_error(error: errors.RkcachedError) -> RequestError:
    """The HTTP face of every error that a run can end with."""
    match error:
        case RequestError():
            return error
        case errors.ContextExceeded():
            return RequestError(
                400,
                f"the request has {error.tokens} tokens, the context holds {error.limit}",
                code="context_length_exceeded",
                param="messages",
                hint="shorten the messages, or raise params.max_context_len of the model",
            )
        case errors.SamplingFixed():
            return RequestError(400, error.message, code="unsupported_parameter", hint=error.hint)
        case errors.ModelLoadError() | errors.RuntimeLibraryError():
            return RequestError(503, error.message, code="model_unavailable", hint=error.hint, retry_after_s=5)
        case errors.WorkerUnavailable():
            return RequestError(503, error.message, code="worker_unavailable", hint=error.hint, retry_after_s=5)
        case errors.WorkerTimeout():
            return RequestError(504, error.message, code="worker_timeout", hint=error.hint)
        case errors.WorkerDied():
            return RequestError(502, error.message, code="worker_died", hint=error.hint)
        case _:
            return RequestError(500, error.message, code="engine_error", hint=error.hint)


def _nul(param: str) -> RequestError:
    return RequestError(
        400, "the text has a NUL character", code="invalid_value", param=param, hint="many runtimes stop reading there"
    )
