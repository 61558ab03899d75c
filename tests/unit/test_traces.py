"""Two answers to a probe come from one state, or they do not."""

from __future__ import annotations

import pytest

from rkcached.engines.base import Token, TokenLogprob
from rkcached.worker.traces import ROUNDING, agree

FAR = ROUNDING * 1.1


def token(text: str, logprob: float, likely: str = "?", likely_logprob: float = -9.0) -> Token:
    """A token with its own log-probability and that of the likeliest other one."""
    others = [(text, logprob), (likely, likely_logprob)]
    likeliest = [
        TokenLogprob(text=one, logprob=number, data=tuple(one.encode())) for one, number in others
    ]
    detail = TokenLogprob(
        text=text, logprob=logprob, data=tuple(text.encode()), likeliest=tuple(likeliest)
    )
    return Token(text=text, ids=tuple(text.encode()), logprobs=(logprob,), details=(detail,))


EXPECTED = [token("a", -0.5), token("b", -1.0, "z", -1.02), token("c", -0.7)]
ROUNDED = [token("a", -0.52), token("b", -0.97, "z", -1.03), token("c", -0.7)]
NEAR_TIE = [token("a", -0.5), token("z", -1.01, "b", -1.04), token("y", -3.0)]
OTHER_NUMBERS = [token("a", -0.5), token("b", -1.0 - FAR, "z", -1.3), token("c", -0.7)]
NO_TIE = [token("a", -0.5), token("z", -0.2, "b", -2.0), token("c", -0.7)]
UNLIKELY = [token("a", -0.5), token("y", -1.0, "b", -1.0), token("c", -0.7)]


def test_a_state_that_lies_as_it_was_answers_equally() -> None:
    """To the last digit."""
    assert agree(EXPECTED, list(EXPECTED), moved=False)
    assert not agree(EXPECTED, ROUNDED, moved=False)
    assert not agree(EXPECTED, NEAR_TIE, moved=False)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (EXPECTED, True),
        (ROUNDED, True),
        (NEAR_TIE, True),
        (OTHER_NUMBERS, False),
        (NO_TIE, False),
        (UNLIKELY, False),
        (EXPECTED[:2], False),
        ([], False),
    ],
)
def test_a_state_that_was_moved_answers_equally_but_for_rounding(
    answer: list[Token], same: bool
) -> None:
    """Up to a token that was almost as likely as another one, in both."""
    assert agree(EXPECTED, answer, moved=True) == same
    assert agree(answer, EXPECTED, moved=True) == same


def test_without_numbers_the_tokens_decide() -> None:
    """As with an engine that gives no log-probabilities."""
    expected = [Token(text="a", ids=(65,)), Token(text="b", ids=(66,))]
    assert agree(expected, [Token(text="ab", ids=(65, 66))], moved=True)
    assert not agree(expected, [Token(text="a", ids=(65,))], moved=True)
    assert not agree(expected, [Token(text="ac", ids=(65, 67))], moved=True)
