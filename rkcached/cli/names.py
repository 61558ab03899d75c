"""Names of prompts on the command line: MODEL, or MODEL/PROMPT."""

from __future__ import annotations

from collections.abc import Sequence

from rkcached.errors import SourceError, UsageError
from rkcached.sources.names import hint_for
from rkcached.sources.records import Key


def key_of(text: str) -> Key:
    """The prompt that MODEL/PROMPT names. Errors: UsageError."""
    model, slash, prompt = text.partition("/")
    if not (model and slash and prompt):
        raise UsageError(
            f"{text!r} names no prompt", hint="write MODEL/PROMPT, for example qwen3-0.6b/system"
        )
    return Key(model, prompt)


def matching(wanted: Sequence[str], known: Sequence[tuple[str, str]]) -> list[Key]:
    """The known prompts that MODEL or MODEL/PROMPT name, in their order.

    Errors: SourceError for a name that matches none.
    """
    keys = [Key(*key) for key in known]
    for text in wanted:
        if not any(text in (key.model, str(key)) for key in keys):
            raise SourceError(f"there is no {text!r}", hint=hint_for(text, map(str, keys)))

    return [key for key in keys if key.model in wanted or str(key) in wanted]
