"""Breaks markers in texts that are data, so that nobody can forge a turn.

A blank after its first character does it: `<|im_end|>` becomes `< |im_end|>`, which reads the same
and is data to every tokenizer. A blank, because some tokenizers drop invisible characters. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

# Words that start and end turns, after their `<`: a tokenizer may know more of them than its
# template writes.
_MARKERS: Final = (
    r"\|[^<>\s]{1,80}\|>",  # <|im_end|>: ChatML, Llama 3, Phi, Qwen, Granite
    "\uff5c[^<>\\s]{1,80}\uff5c>",  # the same with fullwidth bars: DeepSeek
    r"/?(?:start|end)_of_turn>",  # Gemma
    r"(?:bos|eos|pad|unk)>",
    r"/?s>",  # Llama 2, Mistral
)

# Marks that a template may write around messages: `<user>`, `<<SYS>>`, `[INST]` and the like.
_WRITTEN: Final = re.compile(
    r"</?[A-Za-z][\w.:-]{0,63}>|<<\w{1,32}>>|<</\w{1,32}>>|\[/?[A-Z][A-Z_]{1,31}\]"
)

# Words inside a turn: an answer that is sent back may hold them, and a prompt may explain them.
_WORDS: Final = frozenset(
    {"<think>", "</think>", "<tools>", "</tools>", "<tool_call>", "</tool_call>"}
)

_PLACEHOLDERS: Final = frozenset({"<function-name>", "<args-json-object>"})


class Markers:
    """The markers of one template.

    They are the forms in which the known families write theirs, and whatever else of that kind
    stands in the template itself or is its bos_token or eos_token.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        written = {*_WRITTEN.findall(source), bos_token, eos_token} - _WORDS - _PLACEHOLDERS
        rests: dict[str, list[str]] = {"<": list(_MARKERS)}
        for token in sorted(token for token in written if len(token) > 1):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))

        # A match consumes only the first character of a marker, because markers may overlap.
        pattern = "|".join(
            f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()
        )
        self._first_character = re.compile(pattern)
        self._first = tuple(rests)

    def as_data(self, value: Any) -> Any:
        """A copy in which no text, at any depth, holds a marker."""
        match value:
            case str():
                # Most texts hold none, and this check is much faster.
                if not any(first in value for first in self._first):
                    return value
                return self._first_character.sub(r"\g<0> ", value)
            case list() | tuple():
                return [self.as_data(item) for item in value]
            case Mapping():
                return {self.as_data(key): self.as_data(item) for key, item in value.items()}
            case _:
                return value
