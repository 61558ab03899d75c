"""Explains why figures are not to be trusted, and why a cache does not help. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rkcached.cli.bench.machine import QUIET_LOAD
from rkcached.cli.bench.results import MachineFacts, Measured, PromptResult, Run, State
from rkcached.cli.bench.samples import chance, median, relative_spread, spread

ENOUGH_RUNS = 5
MUCH_STEAL_PERCENT = 1.0
MUCH_SPREAD = 0.15
SURELY = 0.05
"""A gain that would come about by chance less often is one. One test for each prompt, unlike those
of `compare`."""
LONG_QUEUE = 0.05
"""Share of the time to first token."""
LONG_QUEUE_MS = 5.0
"""A shorter wait is the daemon's own way from one answer to the next."""

CHANGED = "it changed while it was measured; measure it again"

_HELP = {
    "uncacheable": "this model's state cannot be saved with this runtime, as with recurrent models",
    "blocked": "its cache cannot be built",
    "stale": "what it is made of changed since its cache was built",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Meanwhile:
    """Other work that the daemon did while it was measured."""

    answers: int = 0
    """To others."""
    builds: int = 0


def warnings(
    machine: MachineFacts,
    steal_percent: float,
    runs: int,
    prompts: Sequence[PromptResult],
    meanwhile: Meanwhile = Meanwhile(),
) -> list[str]:
    """Each a sentence."""
    sentences = []
    if machine.clocks_fixed is None:
        sentences.append("it is not known whether the clocks are fixed: no governor can be seen")
    elif not machine.clocks_fixed:
        sentences.append(
            "the clocks are not fixed; `rkcached doctor` says how: "
            + "; ".join(machine.clocks.values())
        )

    if machine.load_average > QUIET_LOAD:
        sentences.append(
            f"the machine had just been busy: its load average was {machine.load_average:.2f} at "
            "the start"
        )

    if steal_percent > MUCH_STEAL_PERCENT:
        sentences.append(f"the hypervisor gave {steal_percent:.1f} % of the CPU time to others")

    sentences.extend(_disturbed(prompts, meanwhile))
    if runs < ENOUGH_RUNS:
        sentences.append(
            f"{runs} {'run is' if runs == 1 else 'runs are'} few: {ENOUGH_RUNS} or more make a "
            "median worth comparing"
        )

    if wide := list(_wide_spreads(prompts)):
        sentences.append(
            f"half of the runs are spread over more than {MUCH_SPREAD * 100:.0f} % of the median: "
            + ", ".join(wide)
        )

    return sentences


def _wide_spreads(prompts: Sequence[PromptResult]) -> Iterator[str]:
    for prompt in prompts:
        for state, measured in prompt.states.items():
            for figure, what in (("ttft_ms", ""), ("decode_tokens_per_s", " tok/s")):
                share = relative_spread(measured.samples(figure))
                if share > MUCH_SPREAD:
                    yield f"{prompt.name} {state}{what} ({share * 100:.0f} %)"


def _disturbed(prompts: Sequence[PromptResult], meanwhile: Meanwhile) -> list[str]:
    """Warn of others who used the daemon at the same time, by its counts and by waiting runs."""
    sentences = []
    if meanwhile.answers > 0:
        answers = "1 answer was"
        if meanwhile.answers != 1:
            answers = f"{meanwhile.answers:,} answers were"
        sentences.append(
            f"other clients asked the daemon meanwhile: {answers} not for this command"
        )

    if meanwhile.builds > 0:
        builds = "1 prompt cache"
        if meanwhile.builds != 1:
            builds = f"{meanwhile.builds:,} prompt caches"
        sentences.append(f"the daemon built {builds} meanwhile")

    count = 0
    waited = []
    for prompt in prompts:
        for measured in prompt.states.values():
            count += len(measured.runs)
            waited += [run.queue_ms for run in measured.runs if _waited_long(run)]

    if waited:
        longest = f"up to {max(waited):,.0f} ms"
        sentences.append(
            f"{len(waited)} of {count} runs waited for the engine, {longest}, as other requests or "
            "builds used it; measure again while nothing else runs"
        )

    return sentences


def _waited_long(run: Run) -> bool:
    return run.queue_ms > max(LONG_QUEUE_MS, LONG_QUEUE * run.ttft_ms)


def reductions(states: dict[State, Measured]) -> dict[State, float]:
    if State.COLD not in states:
        return {}
    cold = states[State.COLD].median("ttft_ms")
    if not cold:
        return {}

    shares: dict[State, float] = {}
    for state, measured in states.items():
        warm = measured.median("ttft_ms")
        if state is not State.COLD and warm is not None:
            shares[state] = round(1 - warm / cold, 4)

    return shares


def changed(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a fresh prompt's cache is no longer of what it was, by its entries in the status.

    A cache that does not fit its prompt is not shown. One that is built anew on request fits.
    """
    had = before.get("artifact")
    has = after.get("artifact")
    if before["state"] != "fresh" or had is None:
        return False
    if has is not None:
        return bool(has["fingerprint"] != had["fingerprint"]) or after["state"] == "stale"
    return after["state"] in ("building", "stale", "uncached")


def why_no_gain(status: dict[str, Any], states: dict[State, Measured]) -> str:
    """`status` is the prompt's entry in the daemon's status.

    Empty where loading its cache is quicker than computing it, and where a cache is there but was
    not measured: then nobody knows. Only time that was measured at the file itself is a reason to
    change the configuration.
    """
    loaded = states[State.FILE]
    cold = states[State.COLD]
    if loaded.missing:
        state = status["state"]
        if state == "fresh":
            return ""
        parts = [_HELP.get(state, f"it is {state}"), status["reason"], status["hint"]]
        return "; ".join(part for part in parts if part)

    samples = {state: states[state].samples("ttft_ms") for state in (State.COLD, State.FILE)}
    before, after = samples.values()
    if not before or not after or _is_clear_gain(before, after):
        return ""

    few = min(len(before), len(after)) < ENOUGH_RUNS
    scattered = max(relative_spread(before), relative_spread(after)) > MUCH_SPREAD
    if median(after) >= median(before):
        load_ms = loaded.median("load_ms") or 0.0
        spared_ms = _spared_ms(cold, loaded)
        if load_ms >= spared_ms and _is_always_dear(cold, loaded):
            tokens = (status.get("artifact") or {}).get("tokens", 0)
            return (
                f"the prompt is too short: loading {tokens:,} tokens takes {load_ms:.1f} ms and "
                "saves "
                f"{spared_ms:.1f} ms of prefill; raise cache.min_tokens above {tokens:,} to leave "
                "it out"
            )

        if not few and not scattered:
            return (
                f"loading takes {load_ms:.1f} ms and saves {spared_ms:.1f} ms of prefill, "
                "but the answers took longer"
            )

    ranges = ", ".join(f"{state} {spread(values)}" for state, values in samples.items())
    runs = "such close"
    if few:
        runs = "so few"
    elif scattered:
        runs = "such scattered"

    return f"nothing can be told of {runs} runs: {ranges}; measure with more --runs"


def _is_clear_gain(cold: Sequence[float], file: Sequence[float]) -> bool:
    """No luck of the runs: hardly any order of them is so clear.

    Few runs must be far apart, as their order is none.
    """
    before = median(cold)
    after = median(file)
    if min(len(cold), len(file)) < ENOUGH_RUNS:
        return max(file) < min(cold) and after < before * (1 - MUCH_SPREAD)
    return after < before and chance(cold, file) < SURELY


def _spared_ms(cold: Measured, loaded: Measured) -> float:
    return (cold.median("prefill_ms") or 0.0) - (loaded.median("prefill_ms") or 0.0)


def _is_always_dear(cold: Measured, loaded: Measured) -> bool:
    """Whether the quickest runs show it, too: they are the least disturbed."""
    least = min(loaded.samples("load_ms"))
    return least >= min(cold.samples("prefill_ms")) - min(loaded.samples("prefill_ms"))
