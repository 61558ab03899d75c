"""Reads JSON of other people. What it gives can be written as JSON again. Pure."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from pydantic_core import from_json

# Without one of these there is no number that a float cannot hold.
_LARGE: Final = re.compile(rb"[0-9.][eE]\+?[0-9]|[0-9]{300}")

_PIECE_BYTES: Final = 64 << 10
_OVERLAP_BYTES: Final = 512


def strict_json(data: bytes) -> Any:
    """The value that a JSON text has. Errors: ValueError."""
    value = from_json(data, allow_inf_nan=False)
    # That refuses the word Infinity, but makes infinity of 1e999.
    if _has_large(data) and _has_infinity(value):
        raise ValueError("a number is out of range")
    return value


def _has_large(data: bytes) -> bool:
    """Piece by piece: one search of eight megabytes would keep other threads waiting."""
    return any(
        _LARGE.search(data, at, at + _PIECE_BYTES + _OVERLAP_BYTES) is not None
        for at in range(0, len(data), _PIECE_BYTES)
    )


def _has_infinity(value: Any) -> bool:
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here
        elif isinstance(here, float) and math.isinf(here):
            return True

    return False
