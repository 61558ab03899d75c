"""What changed in a prompt's text: its own lines where that can be told, and never without end."""

from __future__ import annotations

import io
import time
from itertools import cycle, islice

import pytest
from rich.console import Console

from rkcached.cli.explain import print_diff
from rkcached.cli.text_diff import MOST_SHOWN, TextDiff, diff_of, own_texts

HEAD, TAIL = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"


def rendered(text: str) -> str:
    return f"{HEAD}{text}{TAIL}"


@pytest.mark.parametrize(
    ("text", "old", "expected"),
    [
        ("You are B.", rendered("You are A."), ("You are A.", "You are B.")),
        ("  You are B.\n", rendered("You are A."), ("You are A.", "You are B.")),
        ("You are B.", "### You are A. ###", None),
        ("", rendered("You are A."), None),
    ],
)
def test_the_prompts_own_text(text: str, old: str, expected: tuple[str, str] | None) -> None:
    """It is what stands between the template's words, where those are as they were."""
    assert own_texts(old, rendered(text.strip()), text) == expected


def test_a_text_that_repeats_the_templates_words() -> None:
    """The template's words around the text are never taken to be in it."""
    old, new = rendered("system"), rendered("system system")
    assert own_texts(old, new, "system system") == ("system", "system system")
    assert own_texts("ab", "aba", "b") is None


def test_the_lines_that_changed() -> None:
    """As `diff -u` writes them, with three lines around."""
    old = [f"line {number}" for number in range(40)]
    new = [*old[:20], "another", *old[21:]]
    diff = diff_of("\n".join(old), "\n".join(new))
    assert diff.lines == (
        "@@ -18,7 +18,7 @@",
        " line 17",
        " line 18",
        " line 19",
        "-line 20",
        "+another",
        " line 21",
        " line 22",
        " line 23",
    )
    assert diff.left_out == 0


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("a\n", "a", ["-"]),
        ("a", "a\r", ["-a", "+a\r"]),
        ("", "a", ["-", "+a"]),
        ("a\u2028b", "a\u2028c", ["-a\u2028b", "+a\u2028c"]),
    ],
)
def test_every_difference_is_seen(old: str, new: str, changed: list[str]) -> None:
    """Also one of a last newline, or of a letter that only some call the end of a line."""
    lines = [line for line in diff_of(old, new).lines if line[0] in "+-"]
    assert lines == changed


def test_a_long_line_is_shown_where_it_differs() -> None:
    """A prompt may be one line of a megabyte."""
    before, after = "a" * 500_000 + "X" + "b" * 500_000, "a" * 500_000 + "Y" + "b" * 500_000
    removed, added = diff_of(before, after).lines[1:]
    assert "aaX" in removed
    assert "Xbb" in removed
    assert "aaYbb" in added
    assert max(len(removed), len(added)) < 1000


def test_a_huge_difference_has_an_end() -> None:
    """It takes seconds at most, and says how much is not shown."""
    began = time.monotonic()
    old = [f"{number} {number % 7}" for number in range(200_000)]
    diff = diff_of("\n".join(old), "\n".join(reversed(old)))
    assert len(diff.lines) == MOST_SHOWN
    assert diff.left_out > 300_000
    diff = diff_of("\n".join(islice(cycle("abc"), 50_000)), "\n".join(islice(cycle("bad"), 50_000)))
    assert len(diff.lines) <= MOST_SHOWN
    assert time.monotonic() - began < 20


def test_nothing_in_it_commands_the_terminal() -> None:
    """Colours are ours; escapes of the text are shown as such."""
    console = Console(file=io.StringIO(), width=40, force_terminal=True, highlight=False)
    diff = diff_of("a\x1b[2J\u202e\nsame\t[bold]", "b\x9b5m\nsame\t[bold]")
    with console.capture() as captured:
        print_diff(console, TextDiff(of="text", why="", lines=diff.lines, left_out=2))
    shown = captured.get()
    assert r"-a\x1b[2J\u202e" in shown
    assert r"+b\x9b5m" in shown
    assert "[bold]" in shown
    assert "\x1b[31m" in shown
    assert "\x1b[32m" in shown
    assert not {"\x9b", "\u202e"} & set(shown)
    assert "\x1b[2J" not in shown
    assert "2 more lines" in shown
