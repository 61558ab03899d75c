"""The beginning of an RKLLM prompt cache file: the part that is known.

Undocumented; seen in a file of 1.1, and reported for later versions: little-endian u32 magic
(0x6767736e in 1.1, an architecture number since 1.2.3), u32 8, u32 n_tokens, then the token ids as
i32. Good for showing and for counting, never a reason by itself to reject a file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("<III")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheHeader:
    magic: int
    n_tokens: int


def read_header(path: Path) -> CacheHeader | None:
    """What the file says of itself; None if it is missing, unreadable or too short."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER.size)
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    magic, _, n_tokens = _HEADER.unpack(data)
    return CacheHeader(magic=magic, n_tokens=n_tokens)
