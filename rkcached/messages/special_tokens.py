"""The special tokens of a model, as its tokenizer states them. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The control tokens of a vocabulary, and how a prompt begins and ends.

    They come from a GGUF file's metadata (`tokenizer.ggml.*`) or from the files of a Hugging Face
    tokenizer (`tokenizer.json`, `tokenizer_config.json`).
    """

    control: frozenset[str] | None = None
    """The texts that the tokenizer reads as control tokens; None if no tokenizer states them."""
    bos: str = ""
    """The text of the beginning-of-sequence token."""
    eos: str = ""
    """The text of the end-of-sequence token."""
    adds_bos: bool = False
    """Whether the engine puts BOS in front of a prompt itself: then the text must not have it."""
