"""The stand-in's tokens as a tokenizer.json."""

from __future__ import annotations

from pathlib import Path

import tokenizers


def byte_tokenizer(path: Path) -> Path:
    """A tokenizer.json with the stand-in's tokens: each byte is one, its value plus 3."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # GPT-2's table: the others follow from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    of_byte = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + at) for at, byte in enumerate(others)
    }
    assert sorted(of_byte.values()) == letters
    vocabulary = {letter: byte + 3 for byte, letter in of_byte.items()} | {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
    }
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.save(str(path))
    return path
