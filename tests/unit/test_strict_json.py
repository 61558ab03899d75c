"""JSON of other people, of which nothing may come that is no JSON."""

from __future__ import annotations

import pytest

from rkcached.messages.strict_json import _PIECE_BYTES, strict_json


@pytest.mark.parametrize("before", [0, 1, 5, _PIECE_BYTES - 9, _PIECE_BYTES - 3, _PIECE_BYTES + 1])
@pytest.mark.parametrize("number", ["1e999", "-1E+400", "9" * 400, "1.5e0000000400"])
def test_a_number_beyond_every_float_is_refused_wherever_it_stands(
    before: int, number: str
) -> None:
    """The text is searched in pieces; what lies across two of them is found, too."""
    text = f'["{"x" * before}", {number}]'.encode()
    if number.startswith("9"):
        assert strict_json(text)[1] == int(number)  # an integer may be as long as it likes
        return
    with pytest.raises(ValueError, match="out of range"):
        strict_json(text)


def test_words_that_look_like_a_number_are_words() -> None:
    assert strict_json(b'["1e999", 1e9, 12.5]') == ["1e999", 1e9, 12.5]
