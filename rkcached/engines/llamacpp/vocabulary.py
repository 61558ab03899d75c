"""The chat template and the special tokens of a GGUF file, by its metadata.

The rules for what the metadata leave out are those of `llama_vocab::impl::load` in llama.cpp's
`src/llama-vocab.cpp` (read at commit 00ad355). Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.tokenizer_facts import (
    MAX_CONTROL_TOKENS,
    MAX_TOKEN_CHARACTERS,
    TokenizerFacts,
    combined,
)

PREFIX: Final = "tokenizer."
"""The beginning of the keys that are about the tokenizer."""
TOKENS: Final = "tokenizer.ggml.tokens"
TYPES: Final = "tokenizer.ggml.token_type"

_TEMPLATE: Final = "tokenizer.chat_template"
_TEMPLATE_WITH_TOOLS: Final = "tokenizer.chat_template.tool_use"
_ADD_BOS: Final = "tokenizer.ggml.add_bos_token"
_BOS: Final = "tokenizer.ggml.bos_token_id"
_EOS: Final = "tokenizer.ggml.eos_token_id"

# llama_token_type of llama.h. When llama.cpp tokenizes a prompt (`parse_special`), it takes the
# first two kinds for what they are, and user-defined tokens always.
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

# The tokens that begin and end a text if the metadata do not state them, by the tokenizer's model.
# A byte-pair vocabulary has 11 in llama.cpp, which is no special token in any of them.
_DEFAULT_IDS: Final = {"llama": (1, 2), "plamo2": (1, 2), "bert": (101, None), "t5": (None, 1)}
_BYTE_PAIRS: Final = ("gpt2", "hybriddna", "whitespace", "gemma4")

# llama.cpp adds BOS to the prompts of these if the metadata say nothing: by the tokenizer's model,
# and for byte pairs by the pre-tokenizer.
_ADDING_MODELS: Final = ("llama", "bert")
_ADDING_BYTE_PAIRS: Final = frozenset(
    {
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
        "tekken",
        "chameleon",
    }
)
# llama.cpp adds BOS to these whatever the metadata say.
_ALWAYS_ADDING: Final = ("gemma4", "granite-embed-multi-311m")

# llama.cpp makes control tokens of these, whatever type the file gives them.
_TAKEN_FOR_CONTROL: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
# llama.cpp makes user-defined tokens of gpt-oss's marks, which it then finds in any text.
_TAKEN_FOR_USER_DEFINED: Final = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_WITH_THESE: Final = "<|end|>"

_LENGTH_BYTES: Final = 8
_TYPE_BYTES: Final = 4


@dataclass(slots=True, kw_only=True)
class Metadata:
    """The metadata of a GGUF file, as far as they matter here."""

    data: bytearray
    """The header, as far as it was read."""
    integers: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Those about the tokenizer."""
    long_texts: dict[str, int] = field(default_factory=dict)
    """Bytes of the texts about the tokenizer that are longer than any template may be."""
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    """Where in the data the length of each token stands; its text follows."""
    tokens_end: int = 0
    types: int = 0
    """The number of tokens whose type is stated."""
    types_at: int = 0

    def token(self, number: int) -> bytes:
        at = self.tokens[number]
        length = int.from_bytes(self.data[at : at + _LENGTH_BYTES], "little")
        return bytes(self.data[at + _LENGTH_BYTES : at + _LENGTH_BYTES + length])

    def special_text(self, number: int | None) -> str:
        """The text of a token; empty if there is none that a template could write."""
        if number is None or not 0 <= number < len(self.tokens):
            return ""
        text = self.token(number).decode(errors="replace")
        return text if len(text) <= MAX_TOKEN_CHARACTERS else ""

    def of_type(self, *kinds: int) -> Iterator[int]:
        """The numbers of the tokens of these types."""
        count = min(self.types, len(self.tokens))
        end = self.types_at + count * _TYPE_BYTES
        types = array("i")
        types.frombytes(self.data[self.types_at : end])
        for kind in kinds:
            yield from (number for number, own in enumerate(types) if own == kind)

    def has_token(self, text: str) -> bool:
        data = text.encode()
        whole = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        start = self.tokens[0] if self.tokens else 0
        return self.data.find(whole, start, self.tokens_end) >= 0


def tokenizer_facts(metadata: Metadata, path: Path) -> TokenizerFacts:
    """Find the chat template and the special tokens."""
    template = metadata.texts.get(_TEMPLATE, "")
    origin = f"{_TEMPLATE} of {path}"
    if template and (with_tools := metadata.texts.get(_TEMPLATE_WITH_TOOLS)):
        template = combined(template, with_tools)
        origin = f"{_TEMPLATE} and .tool_use of {path}"

    control: frozenset[str] | None = None
    always: frozenset[str] = frozenset()
    refusal = ""
    numbers = list(metadata.of_type(_UNKNOWN, _CONTROL))
    if len(numbers) > MAX_CONTROL_TOKENS:
        refusal = (
            f"{path} states {len(numbers):,} control tokens, the limit is {MAX_CONTROL_TOKENS:,}"
        )
    elif metadata.tokens:
        stated = set(map(metadata.special_text, numbers)) - {""}
        always = frozenset(_found_in_any_text(metadata))
        control = always.union(stated, filter(metadata.has_token, _TAKEN_FOR_CONTROL))

    bos, eos = _first_and_last(metadata)
    return TokenizerFacts(
        template=template,
        template_bytes=len(template.encode()) or metadata.long_texts.get(_TEMPLATE, 0),
        template_origin=origin,
        special=SpecialTokens(
            control=control,
            always=always,
            bos=metadata.special_text(bos),
            eos=metadata.special_text(eos),
            adds_bos=_adds_bos(metadata),
        ),
        special_origin=f"{TYPES} of {path}",
        added=frozenset(map(metadata.special_text, metadata.of_type(_USER_DEFINED))) - {""},
        refusal=refusal,
    )


def _found_in_any_text(metadata: Metadata) -> Iterator[str]:
    """The control tokens that llama.cpp finds without `parse_special`, too."""
    tokens = list(filter(metadata.has_token, _TAKEN_FOR_USER_DEFINED))
    yield from tokens
    if tokens and metadata.has_token(_WITH_THESE):
        yield _WITH_THESE


def _first_and_last(metadata: Metadata) -> tuple[int | None, int | None]:
    """The numbers of BOS and EOS.

    A number that no token has counts as not stated.
    """
    model = metadata.texts.get("tokenizer.ggml.model", "")
    bos, eos = _DEFAULT_IDS.get(model, (None, None))
    stated_bos = metadata.integers.get(_BOS, -1)
    stated_eos = metadata.integers.get(_EOS, -1)
    if 0 <= stated_bos < len(metadata.tokens):
        bos = stated_bos
    if 0 <= stated_eos < len(metadata.tokens):
        eos = stated_eos
    return bos, eos


def _adds_bos(metadata: Metadata) -> bool:
    """Whether llama.cpp puts BOS in front of a prompt."""
    model = metadata.texts.get("tokenizer.ggml.model", "")
    before = metadata.texts.get("tokenizer.ggml.pre", "")
    if model == "gemma4":
        before = model
    if model in _BYTE_PAIRS and before in _ALWAYS_ADDING:
        return True

    by_default = model in _ADDING_MODELS
    if model in _BYTE_PAIRS:
        by_default = before in _ADDING_BYTE_PAIRS
    return metadata.flags.get(_ADD_BOS, by_default)
