"""The public keys whose bundles a manifest trusts, in the form of minisign. Pure.

A key is one word of 56 letters, as in the second line of minisign's `.pub` files. In a manifest a
name may follow it, as in a file of authorized SSH keys.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

ALGORITHM: Final = b"Ed"
"""The first two bytes of a key: it is for Ed25519."""

ID_BYTES: Final = 8
KEY_BYTES: Final = 32

MAX_NAME_LETTERS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedKey:
    id: str
    """As minisign shows it: 16 hexadecimal digits."""
    key: bytes
    name: str = ""
    """As the manifest names it."""

    def __str__(self) -> str:
        return self.name or self.id


def id_of(number: bytes) -> str:
    """The id of a key by its bytes in files: they are a little-endian number."""
    return number[::-1].hex().upper()


def parse_trusted_key(text: str) -> TrustedKey:
    """A key, and the name that may follow it. Errors: ValueError, which says why it is none."""
    word, _, name = text.strip().partition(" ")
    name = name.strip()
    try:
        data = base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != len(ALGORITHM) + ID_BYTES + KEY_BYTES or not data.startswith(ALGORITHM):
        raise ValueError("it is not a public key of minisign")
    if not name.isprintable() or len(name) > MAX_NAME_LETTERS:
        raise ValueError(f"its name is not {MAX_NAME_LETTERS} printable letters at most")

    number = data[len(ALGORITHM) :][:ID_BYTES]
    return TrustedKey(id=id_of(number), key=data[-KEY_BYTES:], name=name)
