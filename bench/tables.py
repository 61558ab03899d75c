"""Prints the tables of docs/peers.md and docs/scale.md: `tables.py FILE`, of measure.py --json."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from rkcached.cli.bench.samples import number

_SIDES = ("rkcached", "llama.cpp, same settings", "llama.cpp, its defaults")
_SIZE = re.compile(r"([\d,]+) over (\d+): (.+)")


def main() -> None:
    """Print what the file has figures for, as Markdown."""
    document = json.loads(Path(sys.argv[1]).read_text())
    facts = document["machine"]
    caption = (
        f"*{facts['cores']} cores of {facts['cpu']}, {facts['kernel']}, Python {facts['python']}, "
        "xllamacpp "
        f"{facts['xllamacpp']}, load average {facts['load_average_at_start'][0]:.1f} at the start; "
        "commit "
        f"{facts['commit']}, {facts['date'][:10]}.*"
    )
    print(textwrap.fill(caption, 120))
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for figure in document["figures"]:
        parts[figure["part"]].append(figure)
    if parts["peers"]:
        _peers(parts["peers"])
    if parts["scale"]:
        _scale(parts["scale"])


def _peers(figures: list[dict[str, Any]]) -> None:
    """Times to first token, with the differences that follow them.

    Then tokens; then what a user has to do.
    """
    times: dict[str, dict[str, str]] = {}
    tokens: dict[str, dict[str, str]] = defaultdict(dict)
    facts: dict[str, dict[str, str]] = defaultdict(dict)
    row = ""
    for figure in figures:
        name, _, side = figure["name"].strip().partition(": ")
        if name.startswith("a token more"):
            tokens[name.removeprefix("a token more, after ")][side] = _value(figure)
        elif figure["unit"] == "ms" and side:
            row = name
            times.setdefault(row, {})[side] = _value(figure)
        elif figure["unit"] == "ms":
            times[row][name] = _value(figure)
            if figure["target"] is not None:
                times[row]["aim"] = (
                    f"{figure['target']['limit']:g} ms, {'met' if figure['met'] else 'missed'}"
                )
        else:
            facts[name][side] = f"{figure['value']:,.0f}: {figure['note']}"
    columns = [*_SIDES, "rkcached less same settings, by pairs", "of it not prefill", "aim"]
    print("\n| prompt | state |", " | ".join(columns), "|\n|---|---|" + "---:|" * len(columns))
    for name, cells in times.items():
        prompt, _, state = name.rpartition(", ")
        print(
            "|",
            prompt,
            "|",
            state,
            "|",
            " | ".join(cells.get(column, "") for column in columns),
            "|",
        )
    print("\n| a token more, after |", " | ".join(_SIDES), "|\n|---|" + "---:|" * len(_SIDES))
    for name, cells in tokens.items():
        print("|", name, "tokens |", " | ".join(cells[side] for side in _SIDES), "|")
    print("\n| | rkcached | llama.cpp's server |\n|---|---|---|")
    for name, cells in facts.items():
        print("|", name, "|", cells.get("rkcached", ""), "|", cells.get("llama.cpp", ""), "|")


def _scale(figures: list[dict[str, Any]]) -> None:
    """A table for each number of models."""
    tables: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for figure in figures:
        if match := _SIZE.fullmatch(figure["name"]):
            prompts, models, what = match.groups()
            cells = tables[models][what.strip()]
            cells[prompts] = _value(figure)
            if figure["target"] is not None:
                cells["aim"] = f"{figure['target']['limit']:,g} {figure['unit']}" + (
                    "" if figure["met"] else ", missed"
                )
    for models, rows in tables.items():
        sizes = list(next(iter(rows.values())))
        titles = " | ".join(f"{size} prompts" for size in sizes)
        print(
            f"\n### {models} model{'s' * (models != '1')}\n\n| | {titles} | aim "
            f"|\n|---|{'---:|' * (len(sizes) + 1)}"
        )
        for what, cells in rows.items():
            print(
                "|", what, "|", " | ".join(cells.get(column, "") for column in [*sizes, "aim"]), "|"
            )


def _value(figure: dict[str, Any]) -> str:
    return (
        f"{number(figure['value'])} {figure['unit']}"
        if figure["unit"]
        else f"{figure['value']:,.0f}"
    )


if __name__ == "__main__":
    main()
