"""Suggests names in place of one that is not known. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

MAX_LISTED: Final = 10
"""A hint names so many at most: a manifest may have thousands of prompts."""

_NEAR: Final = 0.8
"""How alike two names are, from 0 to 1, of which one is taken for a misspelling of the other."""

_MAX_COMPARED: Final = 128
"""Letters of a name; the time of a comparison grows with the square of them."""


def meant(text: str, known: Iterable[str]) -> str:
    """The known name that `text` is a misspelling of; empty if there is none."""
    near = difflib.get_close_matches(text[:_MAX_COMPARED], known, n=1, cutoff=_NEAR)
    return near[0] if near else ""


def hint_for(
    text: str, known: Iterable[str], noun: str = "", *, most_compared: int | None = None
) -> str:
    """The names that `text` may have meant: all of them if they are few, else the most similar.

    `noun` says what they are, in the plural. `most_compared`: of more names, only the first ones;
    ten thousand take a tenth of a second.
    """
    names = list(known)
    head = f"known {noun}" if noun else "known"
    if not names:
        return f"{head}: none"

    compared = names if most_compared is None else names[:most_compared]
    near = meant(text, compared)
    question = f"did you mean {near!r}? " if near else ""
    if len(names) <= MAX_LISTED:
        return f"{question}{head}: {', '.join(names)}"

    similar = difflib.get_close_matches(text[:_MAX_COMPARED], compared, n=MAX_LISTED)
    listed = similar or names[:MAX_LISTED]
    return f"{question}{head}: {', '.join(listed)} and {len(names) - len(listed):,} more"
