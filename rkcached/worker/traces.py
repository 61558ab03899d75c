"""Compares two answers to a probe: one on the state in memory, one on the loaded file. Pure.

Where a state is loaded to where it lay in memory, they are equal, to the last digit of each
log-probability. A saved window has its tokens in other places, and so has a state that shares its
room with others: the same numbers are then added up in another order, and where two tokens are
almost equally likely, either may be taken.
"""

from __future__ import annotations

from typing import Final

from rkcached.engines.base import Token, TokenLogprob

LIKELIEST: Final = 2
"""So many of the likeliest tokens at each place are compared."""

ROUNDING: Final = 0.2
"""Natural log-probabilities of one state differ by less than that, however it lies in memory: by up
to 0.07 in Gemma 3 270M with weights of 4 bits. Another text's differ by more at some token."""


def agree(expected: list[Token], answer: list[Token], *, moved: bool) -> bool:
    """Whether both answers come from one state.

    `moved`: it may lie elsewhere in memory. The log-probabilities then agree but for rounding, up
    to the end or to a place where two tokens were almost equally likely in both. Where an engine
    gives none, the tokens are equal.
    """
    if expected == answer or not moved:
        return expected == answer

    ours = [one for token in expected for one in token.details]
    others = [one for token in answer for one in token.details]
    if not ours or not others:
        return _ids(expected) == _ids(answer)

    for one, other in zip(ours, others, strict=False):
        if one.data == other.data:
            if abs(one.logprob - other.logprob) > ROUNDING:
                return False
        else:  # after this the texts differ, so nothing can be compared
            return _has(one, other) and _has(other, one)
    return len(ours) == len(others)


def _has(place: TokenLogprob, other: TokenLogprob) -> bool:
    """Whether the other token was about as likely at this place as at its own."""
    for likely in place.likeliest:
        if likely.data == other.data:
            return abs(likely.logprob - other.logprob) <= ROUNDING
    return False


def _ids(tokens: list[Token]) -> list[int]:
    return [one for token in tokens for one in token.ids]
