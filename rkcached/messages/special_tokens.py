"""The special tokens of a model, as its tokenizer states them, and texts without them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The control tokens of a vocabulary, and how a prompt begins and ends.

    They come from a GGUF file's metadata (`tokenizer.ggml.*`) or from the files of a Hugging Face
    tokenizer (`tokenizer.json`, `tokenizer_config.json`).
    """

    control: frozenset[str] | None = None
    """The texts that the tokenizer reads as control tokens; None if no tokenizer states them."""
    always: frozenset[str] = frozenset()
    """Those of the control tokens that a tokenizer finds in plain text, too: see `PLAIN_START`."""
    bos: str = ""
    """The text of the beginning-of-sequence token."""
    eos: str = ""
    """The text of the end-of-sequence token."""
    adds_bos: bool = False
    """Whether the engine puts BOS in front of a prompt itself: then the text must not have it."""


PLAIN_START: Final = "\ufdd0"
PLAIN_END: Final = "\ufdd1"
"""A prompt's text between these two marks is read without control tokens: `<|im_end|>` is letters
there. Engines that can do so drop the marks. They are noncharacters of Unicode, so no text has
them."""


def pieces(prompt: str) -> Iterator[tuple[str, bool]]:
    """The parts of a prompt in order, each with whether it has control tokens.

    A mark without its partner ends with the text.
    """
    for at, part in enumerate(prompt.split(PLAIN_START)):
        if at == 0:
            if part:
                yield part, True
            continue

        plain, _, rest = part.partition(PLAIN_END)
        if plain:
            yield plain, False
        if rest:
            yield rest, True
