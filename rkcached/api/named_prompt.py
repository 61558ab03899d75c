"""The prompt that a chat request asks for by name, and the messages with it. Pure."""

from __future__ import annotations

from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError
from rkcached.messages.message import Message
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.records import Key, Trouble


def named_prompt(request: ChatRequest) -> tuple[Key | None, str]:
    """The prompt that is named, if any, and the parameter that names it. Errors: RequestError."""
    model, slash, prompt = request.model.partition("/")
    cache = request.wanted_cache
    if not isinstance(cache, str):
        named = Key(model, prompt) if slash else None
        return named, "model"

    if prompt and cache != prompt:
        raise RequestError(
            400,
            f"model names the prompt {prompt!r}, cache names {cache!r}",
            code="conflict",
            param="cache",
        )
    return Key(model, cache), "cache" if request.cache is not None else "use_cache"


def with_prompt(snapshot: Snapshot, key: Key, messages: list[Message], param: str) -> list[Message]:
    """The messages with the prompt as their system message. Errors: RequestError."""
    text = snapshot.desired.texts.get(key)
    if text is None:
        raise _no_text(snapshot, key, param)

    systems = [message["content"] for message in messages if message["role"] == "system"]
    if any(system.strip() and not _is_same(system, text) for system in systems):
        raise RequestError(
            409,
            f"the request has a system message of its own, and it is not the prompt {key}",
            code="system_message_conflict",
            param="messages",
            hint="leave the system message out, "
            f"or ask for the model {key.model!r} without a prompt",
        )
    others = [message for message in messages if message["role"] != "system"]
    return [Message(role="system", content=text), *others]


def _is_same(system: str, text: str) -> bool:
    """Whether they have the same lines, however these end."""
    return system.rstrip("\r\n").replace("\r\n", "\n") == text.replace("\r\n", "\n")


def _no_text(snapshot: Snapshot, key: Key, param: str) -> RequestError:
    """The reason why a prompt that was named has no text."""
    declared = snapshot.desired.prompts.get(key)
    if declared is not None:
        trouble = declared.trouble or Trouble(message="it has no text")
        return RequestError(
            503,
            f"the prompt {key} cannot be used: {trouble.message}",
            code="prompt_blocked",
            hint=trouble.hint,
        )

    unlisted = snapshot.desired.unlisted.get(key.model)
    if unlisted is not None:
        return RequestError(
            503,
            f"the prompt {key} is not known: {unlisted.message}",
            code="prompt_blocked",
            hint=unlisted.hint,
        )

    names = [other.prompt for other in snapshot.desired.prompts if other.model == key.model]
    known = ", ".join(names) or "none"
    return RequestError(
        404,
        f"the model {key.model!r} has no prompt {key.prompt!r}; known prompts: {known}",
        code="prompt_not_found",
        param=param,
    )
