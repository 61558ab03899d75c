"""`rkcached compare`: two results, before and after an upgrade. Pure.

Two sets of runs differ beyond the noise if so clear an order of them would come up by chance less
often than `BEYOND` (rank test), and the medians differ by `WORTH` or more. Complete separation of 5
runs from 5 is beyond; 4 from 4 never is. This is the noise of the runs alone: what else changed
between the sessions, nobody measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from rkcached.cli.bench.results import Measured, PromptResult, Results, State
from rkcached.cli.bench.samples import chance, least_chance
from rkcached.errors import FormatError

BEYOND = 0.01
"""Not 0.05: a comparison makes a dozen of these tests at once."""
WORTH = 0.02

_FIGURES = (
    (State.COLD, "ttft_ms", "cold, ms"),
    (State.FILE, "ttft_ms", "from file, ms"),
    (State.FILE, "load_ms", "loading, ms"),
    (State.MEMORY, "ttft_ms", "in memory, ms"),
    (State.MEMORY, "decode_tokens_per_s", "decode in memory, tok/s"),
)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    before: str
    after: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    what: str = ""
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    verdict: str
    """faster, slower, within the noise, too few runs to tell, or why it is not compared."""
    chance: float | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal[1]
    differences: tuple[Difference, ...]
    """Of machine, versions, models, parameters and texts: what the figures may differ by."""
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


def compare(before: Results, after: Results) -> Comparison:
    """Errors: FormatError where no prompt is in both."""
    pairs = list(_pairs(before, after))
    if not any(a is not None and b is not None for _, a, b in pairs):
        raise FormatError(
            "the results have no prompt in common",
            hint="measure the same prompts, or both with --sweep",
        )

    return Comparison(
        format=1,
        differences=tuple(_differences(before, after)),
        rows=tuple(row for name, a, b in pairs for row in _rows(name, a, b)),
        warnings=tuple(_warnings(before, after)),
    )


def _warnings(before: Results, after: Results) -> Iterator[str]:
    """The warnings of both; those that both have come once."""
    for warning in dict.fromkeys([*before.warnings, *after.warnings]):
        sides = []
        if warning in before.warnings:
            sides.append("A")
        if warning in after.warnings:
            sides.append("B")
        yield f"{' and '.join(sides)}: {warning}"


def _pairs(
    before: Results, after: Results
) -> Iterator[tuple[str, PromptResult | None, PromptResult | None]]:
    left = _named(before)
    right = _named(after)
    for name in dict.fromkeys([*left, *right]):
        yield name, left.get(name), right.get(name)


def _named(results: Results) -> dict[str, PromptResult]:
    return {prompt.name: prompt for prompt in results.prompts}


def _rows(name: str, before: PromptResult | None, after: PromptResult | None) -> Iterator[Row]:
    if before is None or after is None:
        verdict = f"only in {'B' if before is None else 'A'}"
        yield Row(prompt=name, verdict=verdict)
        return

    if _is_rewritten(before, after):
        yield Row(prompt=name, verdict="not compared: its text changed")
        return

    for state, figure, what in _FIGURES:
        yield _row(name, what, before.states.get(state), after.states.get(state), figure)

    for what, a, b in (
        ("file, MB", _divided(before.size_bytes, 1e6), _divided(after.size_bytes, 1e6)),
        ("build, s", _divided(before.build_ms, 1000), _divided(after.build_ms, 1000)),
    ):
        if a is not None or b is not None:
            ratio = _ratio(a, b)
            yield Row(prompt=name, what=what, before=a, after=b, ratio=ratio, verdict="one sample")


def _is_rewritten(before: PromptResult, after: PromptResult) -> bool:
    """Whether the text changed; false where one does not have its digest."""
    return (
        bool(before.text_digest and after.text_digest) and before.text_digest != after.text_digest
    )


def _row(name: str, what: str, before: Measured | None, after: Measured | None, figure: str) -> Row:
    before = before or Measured()
    after = after or Measured()
    left = before.samples(figure)
    right = after.samples(figure)
    a = before.median(figure)
    b = after.median(figure)
    ratio = _ratio(a, b)

    if a is None or b is None:
        lacking = [side for side, value in (("A", a), ("B", b)) if value is None]
        why = f"not measured in {' and '.join(lacking)}"
        return Row(prompt=name, what=what, before=a, after=b, verdict=why)

    if nothing := [side for side, value in (("A", a), ("B", b)) if not value]:
        why = f"not compared: 0 in {' and '.join(nothing)}"
        return Row(prompt=name, what=what, before=a, after=b, verdict=why)

    probability = chance(left, right)
    if probability >= BEYOND or ratio is None or abs(ratio - 1) < WORTH:
        few = least_chance(len(left), len(right)) >= BEYOND
        verdict = "too few runs to tell" if few else "within the noise"
    else:
        verdict = "faster" if (b < a) == figure.endswith("_ms") else "slower"

    return Row(
        prompt=name,
        what=what,
        before=a,
        after=b,
        ratio=ratio,
        verdict=verdict,
        chance=round(probability, 4),
    )


def _ratio(before: float | None, after: float | None) -> float | None:
    """None where either is 0, too: nothing is a multiple of that."""
    if before and after:
        return round(after / before, 4)
    return None


def _divided(value: float | None, by: float) -> float | None:
    if value is None:
        return None
    return value / by


def _differences(before: Results, after: Results) -> Iterator[Difference]:
    left = _facts(before)
    right = _facts(after)
    for what in dict.fromkeys([*left, *right]):
        a = left.get(what, "none")
        b = right.get(what, "none")
        if a != b:
            yield Difference(what=what, before=_in_words(what, a), after=_in_words(what, b))

    for name, mine, other in _pairs(before, after):
        if mine is not None and other is not None and mine.text_digest != other.text_digest:
            what = f"{name}: text"
            yield Difference(
                what=what,
                before=_in_words(what, mine.text_digest),
                after=_in_words(what, other.text_digest),
            )


def _facts(results: Results) -> dict[str, Any]:
    """All that figures depend on, flat: `machine.cpu`, `models.qwen.digest`.

    The load is a warning's matter.
    """
    whole = msgspec.to_builtins(results)
    facts = {name: whole[name] for name in ("machine", "versions", "models", "parameters")}
    facts["machine"].pop("load_average")
    return dict(_flat("", facts))


def _flat(way: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{way}{name}.", value)
        else:
            yield f"{way}{name}", value


def _item_in_words(item: Any) -> str:
    if isinstance(item, int):
        return f"{item:,}"
    return str(item)


def _in_words(what: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"

    if isinstance(value, list | tuple):
        listed = ", ".join(map(_item_in_words, value))
        if what == "parameters.sweep":
            if listed:
                return f"{listed} tokens"
            return "no sweep"
        return listed or "none"

    if value is None or value == "":
        return "unknown"

    text = str(value)
    if len(text) == 64 and text.isalnum():
        return f"{text[:12]}..."
    return text
