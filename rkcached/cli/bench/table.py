"""The tables of `rkcached bench` and `rkcached compare`, for 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkcached.api.words import size
from rkcached.cli.bench.compare import Comparison
from rkcached.cli.bench.results import MachineFacts, PromptResult, Results, State
from rkcached.cli.bench.samples import number, p95
from rkcached.errors import printable

_HIGH = "high"
# Runs; of fewer it is about the maximum, which then is shown as such.
_ENOUGH_FOR_P95 = 20

_COLUMNS = {
    "ttft_ms": "ttft",
    _HIGH: "p95",
    "queue_ms": "queue",
    "load_ms": "load",
    "prefill_ms": "prefill",
    "first_decode_ms": "first",
    "direct_ttft_ms": "engine",
    "daemon_share_ms": "own",
    "cached_tokens": "cached",
    "decode_tokens_per_s": "tok/s",
}


def machine_line(machine: MachineFacts) -> str:
    board = ""
    if machine.board and machine.board != machine.cpu:
        board = f"{machine.board}, "
    return (
        f"{board}{machine.cpu}, {machine.cores} cores, {size(machine.memory_bytes)}, "
        f"{machine.kernel}"
    )


def runs_words(runs: int) -> str:
    if runs == 1:
        return "1 run"
    return f"median of {runs:,} runs"


def print_results(console: Console, results: Results) -> None:
    versions = results.versions
    console.print(_text(f"{results.date}  {machine_line(results.machine)}"))
    console.print(
        _text(
            f"rkcached {versions.daemon}, python {versions.python}, load "
            f"{results.machine.load_average:.2f}"
        )
    )

    for name, model in results.models.items():
        digest = ""
        if model.digest:
            digest = f", sha256 {model.digest[:12]}"

        console.print(
            _text(f"{name}: {model.engine} {model.runtime or 'of an unknown version'}{digest}")
        )
        if model.digest:
            console.print(_text(f"  {model.file}"), overflow="fold", no_wrap=False)
        if name in results.first_answers:
            first = results.first_answers[name]
            console.print(
                _text(
                    f"  first answer after {number(first.ttft_ms)} ms, of them "
                    f"{number(first.model_load_ms)} ms for loading the model"
                )
            )

    console.print(_text(f"{runs_words(results.parameters.runs)}, milliseconds", style="dim"))
    for prompt in results.prompts:
        console.print()
        _print_prompt(console, prompt)

    console.print()
    for line in _legend(results):
        console.print(_text(line, style="dim"))
    if results.direct:
        console.print(_text(f"the engine was not measured alone: {results.direct}"))

    for warning in results.warnings:
        console.print(_text(f"not to be trusted: {warning}", style="yellow"))

    for refusal in results.refused:
        console.print(_text(f"not measured: {refusal}", style="yellow"))


def _legend(results: Results) -> Iterator[str]:
    yield "first: first token decoded and written; engine: ttft without the daemon"
    yield (
        "own: what daemon and socket add, (ttft - load - prefill) less the same of the engine alone"
    )
    if any(_shares_question(prompt) for prompt in results.prompts):
        yield (
            "cached above the prompt's tokens: in memory is the answer before, and the beginning "
            "of its question, "
            "which the next one shares"
        )


def _shares_question(prompt: PromptResult) -> bool:
    known = prompt.states.get(State.MEMORY)
    cached = None
    if known is not None:
        cached = known.median("cached_tokens")
    return cached is not None and prompt.tokens is not None and cached > prompt.tokens


def _text(words: str, style: str = "") -> Text:
    """Names come from files that others wrote."""
    return Text(printable(words), style=style)


def _print_prompt(console: Console, prompt: PromptResult) -> None:
    console.print(_text(f"{prompt.name}  {_built(prompt)}", style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)

    for figure, title in _COLUMNS.items():
        shown = title
        if figure == _HIGH and not _has_p95(prompt):
            shown = "max"
        table.add_column(shown, justify="right", no_wrap=True)

    for state, measured in prompt.states.items():
        if not measured.missing:
            table.add_row(state, *(_cell(prompt, state, figure) for figure in _COLUMNS))

    console.print(table)
    _print_gain(console, prompt)


def _built(prompt: PromptResult) -> str:
    """The prompt cache's size, and the time that its build took."""
    built = "no cache"
    if prompt.tokens is not None:
        built = f"{prompt.tokens:,} tokens, {size(prompt.size_bytes)}"
    if prompt.build_ms is not None:
        built += f", built in {prompt.build_ms / 1000:.1f} s"
    return built


def _print_gain(console: Console, prompt: PromptResult) -> None:
    saved = []
    for state, measured in prompt.states.items():
        if measured.missing and not prompt.no_gain:
            console.print(_text(f"{state}: not measured: {measured.missing}", style="dim"))

    for state, share in prompt.reduction.items():
        if share > 0:
            saved.append(f"{share * 100:.0f} % {_FROM[state]}")

    if prompt.no_gain:
        console.print(_text(f"no gain: {prompt.no_gain}", style="yellow"))
    elif saved:
        console.print(_text(f"saves {', '.join(saved)}", style="green"))
        if prompt.build_saw_no_gain:
            console.print(
                _text(
                    "its build saw no gain, as `rkcached status` says: that is one sample, these "
                    "are more"
                )
            )


_FROM = {State.FILE: "from the file", State.MEMORY: "in memory"}


def _has_p95(prompt: PromptResult) -> bool:
    return any(len(measured.runs) >= _ENOUGH_FOR_P95 for measured in prompt.states.values())


def _cell(prompt: PromptResult, state: State, figure: str) -> str:
    summary = prompt.states[state].summary
    if figure == _HIGH:
        samples = prompt.states[state].samples("ttft_ms")
        if samples:
            return number(p95(samples) if _has_p95(prompt) else max(samples))
        return "-"

    if figure not in summary:
        return "-"

    value = summary[figure].median
    if figure == "cached_tokens":
        return f"{value:,.0f}"
    return number(value)


def print_comparison(console: Console, comparison: Comparison) -> None:
    for difference in comparison.differences:
        console.print(_text(f"{difference.what}: {difference.before} -> {difference.after}"))

    if not comparison.differences:
        console.print(
            _text("no difference is known in machine, versions, model files, parameters and texts")
        )

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("A", "B", "B/A"):
        table.add_column(title, justify="right", no_wrap=True)

    table.add_column("verdict")
    style = {"faster": "green", "slower": "red"}
    name = ""

    for row in comparison.rows:
        if row.prompt != name:
            name = row.prompt
            table.add_row(_text(name, style="bold"))

        ratio = ""
        if row.ratio is not None:
            ratio = f"{row.ratio:.2f}"

        cells = [number(value) if value is not None else "-" for value in (row.before, row.after)]
        table.add_row(
            f"  {row.what}", *cells, ratio, Text(row.verdict, style=style.get(row.verdict, ""))
        )

    console.print(table)
    for warning in comparison.warnings:
        console.print(_text(f"not to be trusted: {warning}", style="yellow"))
