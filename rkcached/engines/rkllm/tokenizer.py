"""A model's `tokenizer.json`: a text as tokens, with what the model expects before it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rkcached.errors import ModelLoadError
from rkcached.messages.special_tokens import pieces

Tokenize = Callable[[str], list[int]]


def load_tokenizer(path: str) -> Tokenize | None:
    """Load a tokenizer; None without a path. Errors: ModelLoadError.

    A file that a training script saved may cut or pad every text: both are switched off. It may
    also put a token behind each text, which would end the prompt in the middle of the conversation:
    only BOS is kept. A part of a prompt that is plain text gets no control tokens.
    """
    if not path:
        return None

    try:
        import tokenizers  # noqa: PLC0415 - 50 ms that only models with a tokenizer need
    except ImportError as error:
        raise ModelLoadError(
            f"the tokenizer {path} needs the package tokenizers",
            hint=f"{sys.executable} -m pip install tokenizers",
        ) from error

    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library has no class of its own for it
        raise ModelLoadError(
            f"{path} is not a tokenizer: {error}",
            hint="name the tokenizer.json that the model came with",
        ) from error

    tokenizer.no_truncation()
    tokenizer.no_padding()
    before = _before(tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids)

    def tokenize(text: str) -> list[int]:
        tokens = list(before)
        for part, has_control_tokens in pieces(text):
            tokenizer.encode_special_tokens = not has_control_tokens  # then they are plain text
            tokens += tokenizer.encode(part, add_special_tokens=False).ids
        return tokens

    return tokenize


def _before(dressed: list[int], plain: list[int]) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    for at in range(len(dressed) - len(plain) + 1):
        if dressed[at : at + len(plain)] == plain:
            return dressed[:at]
    return []
