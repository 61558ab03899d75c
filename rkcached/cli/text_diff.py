"""The difference between the text that a prompt cache was made from and the text of today.

The store keeps the rendered text. Where the template's words around the prompt are as they were,
the prompt's own lines are compared; else the rendered texts are. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rkcached.errors import TemplateError
from rkcached.plan.desired import DesiredModel
from rkcached.plan.fingerprint import Change, changes
from rkcached.plan.probe import texts_of
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key

MOST_SHOWN: Final = 400
"""Lines of a difference that are shown."""

# Lines of either text that are matched with each other: the time grows with their square.
_MOST_MATCHED = 2000

# Lines around a change.
_AROUND = 3

# Letters of a line that are shown, and those of them before the first one that differs.
_MOST_LETTERS = 400
_LETTERS_BEFORE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDiff:
    of: Literal["text", "rendered", ""]
    """The texts that were compared: "text", the prompt's own; "rendered", with the words of the
    template; empty if nothing was."""
    why: str = ""
    """A sentence in place of lines, where there are none."""
    lines: tuple[str, ...] = ()
    """As `diff -u` writes them, without its two lines of names."""
    left_out: int = 0
    """So many more lines differ, or stand beside lines that do."""


def text_diff(look: Observation, key: Key) -> TextDiff:
    """Compare the text that a prompt cache was built from with the text of today."""
    prompt = look.desired.prompts.get(key)
    if prompt is None:
        return TextDiff(of="", why="nobody declares the prompt, so it has no text of today")

    model = look.desired.models.get(key.model)
    wanted = prompt.fingerprint
    if wanted is None or not isinstance(model, DesiredModel):
        return TextDiff(of="", why="the text of today cannot be used, so nothing is compared")

    artifact = look.inventory.artifacts.get(key)
    if artifact is None:
        return TextDiff(of="", why="there is no prompt cache yet, so nothing is compared")
    if artifact.corrupt:
        return TextDiff(of="", why="the prompt cache is damaged, so its text is not known")

    changed = changes(artifact.components, wanted.components)
    if not any(change.component == "prefix.digest" for change in changed):
        return TextDiff(of="", why=_same_text(changed))

    text = look.desired.texts[key]
    try:
        new, _ = texts_of(model.template_for(key.prompt), text, prompt.tools)
    except TemplateError as error:
        return TextDiff(of="", why=error.message)

    old = artifact.text.decode()
    own = own_texts(old, new, text)
    if own is None or not all(map(_leaves_frame, changed)):
        return diff_of(old, new, of="rendered")
    return diff_of(*own)


def _same_text(changed: Sequence[Change]) -> str:
    if not changed:
        return "nothing changed since the prompt cache was built"
    names = ", ".join(change.component for change in changed)
    return f"the text is the same; only {names} changed"


def _leaves_frame(change: Change) -> bool:
    """Whether the words around the prompt's own text are as they were in spite of this change."""
    return change.component.startswith(("prefix.", "params."))


def own_texts(old: str, new: str, text: str) -> tuple[str, str] | None:
    """The prompt's own text then and now, from the rendered texts `old` and `new`.

    None if what stands around it is not as it was, or `new` does not have `text` as it is.
    """
    for own in filter(None, (text, text.strip())):
        head, found, tail = new.partition(own)
        around = len(head) + len(tail)
        same = old.startswith(head) and old.endswith(tail) and len(old) >= around
        if found and same:
            return old[len(head) : len(old) - len(tail)], own
    return None


def diff_of(old: str, new: str, *, of: Literal["text", "rendered"] = "text") -> TextDiff:
    """The lines that differ between two texts that are not the same."""
    before = old.split("\n")
    after = new.split("\n")
    start = _common(before, after)
    same_end = _common(before[start:][::-1], after[start:][::-1])

    shown_from = max(0, start - _AROUND)
    shown_after = max(0, same_end - _AROUND)
    before = before[shown_from : len(before) - shown_after]
    after = after[shown_from : len(after) - shown_after]

    lines = list(_hunks(before[:_MOST_MATCHED], after[:_MOST_MATCHED], shown_from))
    unmatched = len(before[_MOST_MATCHED:]) + len(after[_MOST_MATCHED:])
    left_out = len(lines[MOST_SHOWN:]) + unmatched
    return TextDiff(of=of, lines=tuple(lines[:MOST_SHOWN]), left_out=left_out)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of letters or lines in which both begin alike."""
    for place, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return place
    return min(len(one), len(other))


def _hunks(before: Sequence[str], after: Sequence[str], offset: int) -> Iterator[str]:
    """The changes with the lines around them; `offset` lines stand before these."""
    matcher = difflib.SequenceMatcher(None, before, after)
    for group in matcher.get_grouped_opcodes(_AROUND):
        first, last = group[0], group[-1]
        old_place = _place(first[1] + offset, last[2] - first[1])
        new_place = _place(first[3] + offset, last[4] - first[3])
        yield f"@@ -{old_place} +{new_place} @@"

        for kind, i, i_end, j, j_end in group:
            if kind == "equal":
                yield from (f" {_cut(line, 0)}" for line in before[i:i_end])
            else:
                yield from _change(before[i:i_end], after[j:j_end])


def _place(start: int, count: int) -> str:
    """A range of lines as unified diffs write it."""
    if count == 1:
        return str(start + 1)
    return f"{start + 1 if count else start},{count}"


def _change(removed: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    """The lines that went and came; a long one is shown where it differs from its counterpart."""
    places = [_common(*pair) for pair in zip(removed, added, strict=False)]
    places += [0] * abs(len(removed) - len(added))

    for line, place in zip(removed, places, strict=False):
        yield f"-{_cut(line, place)}"
    for line, place in zip(added, places, strict=False):
        yield f"+{_cut(line, place)}"


def _cut(line: str, place: int) -> str:
    """A line, or so much of a long one around `place` as is shown."""
    if len(line) <= _MOST_LETTERS:
        return line

    start = max(0, min(place - _LETTERS_BEFORE, len(line) - _MOST_LETTERS))
    end = start + _MOST_LETTERS
    before = ""
    if start:
        before = f"({start:,} letters) ... "
    after = ""
    if end < len(line):
        after = f" ... ({len(line) - end:,} letters)"
    return f"{before}{line[start:end]}{after}"
