"""What `rkcached bench` says of its figures."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from rkcached.cli.bench import plots
from rkcached.cli.bench.results import (
    FORMAT,
    MachineFacts,
    Measured,
    Parameters,
    PromptResult,
    Results,
    Run,
    State,
    Versions,
)
from rkcached.cli.bench.table import print_results
from rkcached.cli.bench.trust import ENOUGH_RUNS, Meanwhile, changed, warnings, why_no_gain
from rkcached.errors import UsageError

FIXED = MachineFacts(
    board="",
    cpu="c",
    cores=2,
    memory_bytes=1 << 30,
    kernel="k",
    clocks={"cpu0": "performance, 1.8 GHz"},
    clocks_fixed=True,
    load_average=0.1,
)


@pytest.mark.parametrize(
    ("facts", "steal_percent", "runs", "said"),
    [
        ({}, 0.0, ENOUGH_RUNS, []),
        ({"clocks_fixed": None}, 0.0, ENOUGH_RUNS, ["no governor can be seen"]),
        (
            {"clocks_fixed": False, "clocks": {"npu": "ondemand"}},
            0.0,
            ENOUGH_RUNS,
            ["not fixed", "ondemand"],
        ),
        ({"load_average": 1.5}, 0.0, ENOUGH_RUNS, ["load average was 1.50"]),
        ({}, 7.25, ENOUGH_RUNS, ["7.2 % of the CPU time"]),
        ({}, 0.0, ENOUGH_RUNS - 1, ["4 runs are few"]),
    ],
)
def test_it_says_when_a_figure_is_not_to_be_trusted(
    facts: dict[str, Any], steal_percent: float, runs: int, said: list[str]
) -> None:
    """Clocks that move, a busy machine, a hypervisor that takes time, and few runs.

    Each has its sentence, and there is none without them.
    """
    found = warnings(msgspec.structs.replace(FIXED, **facts), steal_percent, runs, [])
    assert len(found) == bool(said)
    assert all(words in found[0] for words in said)


def run(
    prefill_ms: float, load_ms: float = 0.0, *, queue_ms: float = 0.0, more_ms: float = 2.0
) -> Run:
    return Run(
        ttft_ms=queue_ms + load_ms + prefill_ms + more_ms,
        queue_ms=queue_ms,
        load_ms=load_ms,
        prefill_ms=prefill_ms,
        first_decode_ms=more_ms,
        socket_ms=0.0,
        prompt_tokens=100,
        cached_tokens=None,
        decode_tokens_per_s=10.0,
    )


def states(cold: list[Run], file: list[Run]) -> dict[State, Measured]:
    return {
        State.COLD: Measured(runs=tuple(cold)),
        State.FILE: Measured(runs=tuple(file)),
        State.MEMORY: Measured(),
    }


FRESH = {"state": "fresh", "reason": "", "hint": "", "artifact": {"tokens": 90, "fingerprint": "f"}}


@pytest.mark.parametrize(
    ("cold", "file", "said", "advises"),
    [
        ([run(100)] * 5, [run(10, 20)] * 5, "", False),
        (
            [run(30)] * 5,
            [run(10, 40)] * 5,
            "the prompt is too short: loading 90 tokens takes 40.0 ms and saves 20",
            True,
        ),
        ([run(30)] * 2, [run(10, 40)] * 2, "the prompt is too short", True),
        # an outlier among two runs, wherever it is
        (
            [run(100)] * 2,
            [run(10, 20), run(10, 20, more_ms=500)],
            "nothing can be told of so few runs: cold from",
            False,
        ),
        ([run(100)] * 2, [run(10, 20), run(500, 20)], "nothing can be told of so few runs", False),
        ([run(100)] * 2, [run(10, 20), run(10, 500)], "nothing can be told of so few runs", False),
        (
            [run(100)] * 6,
            [run(10, 20)] * 2 + [run(10, 20, more_ms=300)] * 4,
            "of such scattered runs",
            False,
        ),
        ([run(100)] * 6, [run(10, 20, more_ms=300)] * 6, "but the answers took longer", False),
        # a gain that is none: the quickest cold run is quicker than any from the file
        (
            [run(1.9), run(2.86), run(2.85)],
            [run(0.7, 2), run(0.8, 2), run(1.1, 2)],
            "of so few runs",
            False,
        ),
        (
            [run(2.3), run(3.42), run(3.49)],
            [run(1.6, 2), run(1.07, 2), run(1.05, 2)],
            "of so few runs",
            False,
        ),
        (
            [run(100), run(102), run(104)] * 2,
            [run(70, 29), run(70, 33), run(70, 31)] * 2,
            "of such close runs",
            False,
        ),
        ([run(100)] * 2, [run(70, 28)] * 2, "nothing can be told of so few runs", False),
        ([run(100)], [run(10, 20)], "", False),
        ([run(100), run(300), run(90), run(95), run(98)], [run(10, 20)] * 5, "", False),
    ],
)
def test_too_short_is_what_costs_more_to_load_than_to_read(
    cold: list[Run], file: list[Run], said: str, advises: bool
) -> None:
    """Noise is called noise, with the number of runs and their range.

    No configuration is advised for it.

    One slow answer of two was enough to advise a higher cache.min_tokens for a prompt whose cache
    spared 70 %.
    """
    found = why_no_gain(FRESH, states(cold, file))
    assert said in found
    assert bool(said) == bool(found)
    assert ("cache.min_tokens" in found) == advises
    assert ("n=" in found) == ("nothing can be told" in found)


@pytest.mark.parametrize(
    ("after", "is_changed"),
    [
        ({}, False),
        ({"state": "stale"}, True),
        ({"state": "building", "reason": "its text changed", "artifact": None}, True),
        ({"state": "building", "reason": "requested"}, False),
        ({"artifact": {"tokens": 90, "fingerprint": "g"}}, True),
        ({"state": "missing", "artifact": None}, False),
    ],
)
def test_a_prompt_that_changed_is_not_one_without_gain(
    after: dict[str, Any], is_changed: bool
) -> None:
    """The fingerprint tells, and before there is a new one, that the old cache does not fit.

    To be built anew is no change.
    """
    assert changed(FRESH, {**FRESH, **after}) == is_changed
    assert not changed({"state": "uncached", "reason": "", "hint": ""}, {**FRESH, **after})


@pytest.mark.parametrize(
    ("queue_ms", "meanwhile", "said"),
    [
        (0.4, Meanwhile(), []),
        (0.4, Meanwhile(answers=-3), []),
        (0.4, Meanwhile(answers=1), ["other clients asked the daemon meanwhile: 1 answer was not"]),
        (0.4, Meanwhile(builds=2), ["the daemon built 2 prompt caches meanwhile"]),
        (30.0, Meanwhile(), ["1 of 2 runs waited for the engine, up to 30 ms"]),
    ],
)
def test_others_who_had_the_daemon_are_named(
    queue_ms: float, meanwhile: Meanwhile, said: list[str]
) -> None:
    """By its counts of answers and builds, and by a wait that is long for the answer."""
    prompt = PromptResult(
        model="m",
        prompt="p",
        tokens=90,
        size_bytes=1,
        build_ms=1.0,
        states={State.COLD: Measured(runs=(run(100), run(100, queue_ms=queue_ms)))},
    )
    found = warnings(FIXED, 0.0, ENOUGH_RUNS, [prompt], meanwhile)
    assert len(found) == len(said)
    assert all(words in sentence for words, sentence in zip(said, found, strict=True))


def a_result(cold: tuple[Run, ...], **more: Any) -> PromptResult:
    return PromptResult(
        model="m",
        prompt="p",
        tokens=90,
        size_bytes=1,
        build_ms=1.0,
        states={State.COLD: Measured(runs=cold).summarised()},
        **more,
    )


def test_a_decode_speed_that_scatters_is_doubted() -> None:
    """As a time to first token is."""
    rates = [10.0, 10.0, 10.0, 20.0, 20.0]
    runs = tuple(msgspec.structs.replace(run(100), decode_tokens_per_s=rate) for rate in rates)
    (said,) = warnings(FIXED, 0.0, ENOUGH_RUNS, [a_result(runs)])
    assert said.endswith(": m/p cold tok/s (100 %)")


@pytest.mark.parametrize("saw_no_gain", [True, False])
def test_a_gain_that_its_build_did_not_see(saw_no_gain: bool) -> None:
    """The status says "no gain" of one sample: the table says why it says otherwise."""
    results = Results(
        format=FORMAT,
        date="2026-01-01T00:00:00+00:00",
        machine=FIXED,
        versions=Versions(rkcached="1", daemon="1", python="3"),
        parameters=Parameters(runs=5, answer_tokens=1, question="q", sweep=()),
        models={},
        prompts=(
            a_result((run(100),) * 5, reduction={State.FILE: 0.5}, build_saw_no_gain=saw_no_gain),
        ),
        direct="",
        steal_percent=0.0,
        warnings=(),
    )
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as captured:
        print_results(console, results)
    assert "saves 50 % from the file" in captured.get()
    assert ("its build saw no gain" in captured.get()) == saw_no_gain


@pytest.mark.parametrize(
    ("prompt", "length", "name"),
    [
        ("bench-123-2048", 2048, "m, 2,048 tokens"),
        ("system", None, "m/system"),
        ("bench-1-128", None, "m/bench-1-128"),
    ],
)
def test_a_prompt_of_a_sweep_goes_by_its_length(prompt: str, length: int | None, name: str) -> None:
    """Its own name is of one session, and says nothing to a reader.

    A declared prompt may be named alike.
    """
    result = PromptResult(
        model="m",
        prompt=prompt,
        tokens=None,
        size_bytes=None,
        build_ms=None,
        length=length,
        states={},
    )
    assert result.name == name


def test_a_picture_without_the_drawing_library_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is an extra; the error says how to get it, and how to draw elsewhere."""
    plots.check(Path("a.svg"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as error:
        plots.check(Path("a.svg"))
    assert f"{sys.executable} -m pip install matplotlib" in error.value.hint
    assert "--from" in error.value.hint
    assert error.value.exit_code == 69
    with pytest.raises(UsageError, match="neither SVG nor PNG"):
        plots.check(Path("a.pdf"))
