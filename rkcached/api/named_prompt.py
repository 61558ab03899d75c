"""The prompt that a chat request asks for by name, and the messages with it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from rkcached.api.requests import ChatRequest
from rkcached.errors import RequestError
from rkcached.messages.message import Message
from rkcached.reconcile.snapshot import Snapshot
from rkcached.serving.models import MOST_COMPARED
from rkcached.sources.manifest import SystemConflict, system_conflict
from rkcached.sources.names import hint_for
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
            hint="name the prompt once",
        )
    return Key(model, cache), "cache" if request.cache is not None else "use_cache"


class Merged(NamedTuple):
    """The messages of a request that names a prompt."""

    messages: list[Message]
    ignored: tuple[str, ...] = ()
    """The system messages that were left out, by their place; or the parameter that names the
    prompt, where its text was."""


def prompt_text(snapshot: Snapshot, key: Key, param: str) -> str:
    """Errors: RequestError for a prompt that is not there or cannot be used."""
    text = snapshot.desired.texts.get(key)
    if text is None:
        raise _no_text(snapshot, key, param)
    return text


def with_prompt(snapshot: Snapshot, key: Key, messages: list[Message], param: str) -> Merged:
    """The messages with the prompt as their system message, or as the beginning of it.

    Where they have a system message that contradicts it, the manifest decides. Errors: RequestError
    """
    text = prompt_text(snapshot, key, param)
    systems = [message["content"] for message in messages if message["role"] == "system"]
    systems = [system for system in systems if system.strip()]
    others = [message for message in messages if message["role"] != "system"]
    wanted = _lines(text)
    if all(_lines(system).rstrip("\n") == wanted for system in systems):
        return Merged([Message(role="system", content=text), *others])

    first = _lines(systems[0])
    if messages[0]["role"] == "system" and first.startswith(wanted):
        longer = text + first[len(wanted) :]
        rest = [message for message in messages[1:] if message["content"].strip()]
        return Merged([Message(role="system", content=longer), *rest])

    match system_conflict(snapshot.manifest, key.model, key.prompt):
        case SystemConflict.PROMPT:
            places = [
                f"messages.{at}"
                for at, message in enumerate(messages)
                if message["role"] == "system" and message["content"].strip()
            ]
            return Merged([Message(role="system", content=text), *others], tuple(places))
        case SystemConflict.CLIENT:
            return Merged(messages, (param,))
        case SystemConflict.APPEND:
            both = "\n\n".join([text, *systems])
            return Merged([Message(role="system", content=both), *others])
        case SystemConflict.REFUSE:
            raise _conflict(key)


def _conflict(key: Key) -> RequestError:
    return RequestError(
        409,
        f"the request has a system message of its own, which does not begin with the prompt {key}",
        code="system_message_conflict",
        param="messages",
        hint="leave the system message out, begin it with the prompt's text, ask for the model "
        f"{key.model!r} without a prompt, or set serving.system_conflict in the manifest",
    )


def _lines(text: str) -> str:
    """The same lines, with one way to end them."""
    return text.replace("\r\n", "\n")


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
    return RequestError(
        404,
        f"the model {key.model!r} has no prompt {key.prompt!r}",
        code="prompt_not_found",
        param=param,
        hint=hint_for(key.prompt, names, "prompts", most_compared=MOST_COMPARED),
    )
