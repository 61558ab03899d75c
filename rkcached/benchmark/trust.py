"""What a reader must know about figures: why they are not to be trusted, and why a cache does not help. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rkcached.benchmark.machine import QUIET_LOAD
from rkcached.benchmark.results import MachineFacts, Measured, PromptResult, State
from rkcached.benchmark.samples import relative_spread

ENOUGH_RUNS = 5
MUCH_STEAL_PERCENT = 1.0
MUCH_SPREAD = 0.15

_HELP = {
    "uncacheable": "this model's state cannot be saved with this runtime, as with recurrent models",
    "blocked": "its cache cannot be built",
    "stale": "what it is made of changed since its cache was built",
}


def warnings(machine: MachineFacts, steal_percent: float, runs: int, prompts: Sequence[PromptResult]) -> list[str]:
    """Each a sentence."""
    said = []
    if machine.clocks_fixed is None:
        said.append("nobody says whether the clocks are fixed: no governor can be seen")
    elif not machine.clocks_fixed:
        said.append("the clocks are not fixed; `rkcached doctor` says how: " + "; ".join(machine.clocks.values()))
    if machine.load_average > QUIET_LOAD:
        said.append(f"others used the machine: its load average was {machine.load_average:.2f} before it was measured")
    if steal_percent > MUCH_STEAL_PERCENT:
        said.append(f"the hypervisor gave {steal_percent:.1f} % of the CPU time to others")
    if runs < ENOUGH_RUNS:
        said.append(f"{runs} runs are few: {ENOUGH_RUNS} or more make a median worth comparing")
    wide = [
        f"{prompt.name} {state} ({relative_spread(samples) * 100:.0f} %)"
        for prompt in prompts
        for state, measured in prompt.states.items()
        if relative_spread(samples := measured.samples("ttft_ms")) > MUCH_SPREAD
    ]
    if wide:
        said.append(
            f"half of the runs are spread over more than {MUCH_SPREAD * 100:.0f} % of the median: " + ", ".join(wide)
        )
    return said


def reductions(states: dict[State, Measured]) -> dict[State, float]:
    cold = states[State.COLD].median("ttft_ms") if State.COLD in states else None
    return {
        state: round(1 - warm / cold, 4)
        for state, measured in states.items()
        if state is not State.COLD and cold and (warm := measured.median("ttft_ms")) is not None
    }


def why_no_gain(status: dict[str, Any], states: dict[State, Measured]) -> str:
    """`status` is what the daemon says of the prompt. Empty where loading its cache is quicker than computing it."""
    loaded, cold = states[State.FILE], states[State.COLD]
    if loaded.missing:
        state = status["state"]
        if state == "fresh":
            return loaded.missing
        parts = [_HELP.get(state, f"it is {state}"), status["reason"], status["hint"]]
        return "; ".join(part for part in parts if part)
    before, after = cold.median("ttft_ms"), loaded.median("ttft_ms")
    if before is None or after is None or after < before:
        return ""
    load_ms, prefill_ms = loaded.median("load_ms") or 0.0, cold.median("prefill_ms") or 0.0
    tokens = (status.get("artifact") or {}).get("tokens", 0)
    return (
        f"the prompt is too short: loading {tokens:,} tokens takes {load_ms:.1f} ms, reading the whole request "
        f"{prefill_ms:.1f} ms; raise cache.min_tokens above {tokens:,} to leave it out"
    )
