"""What `rkcached bench` says of its figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rkcached.benchmark import plots
from rkcached.benchmark.results import MachineFacts, PromptResult
from rkcached.benchmark.trust import ENOUGH_RUNS, warnings
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
        ({"clocks_fixed": False, "clocks": {"npu": "ondemand"}}, 0.0, ENOUGH_RUNS, ["not fixed", "ondemand"]),
        ({"load_average": 1.5}, 0.0, ENOUGH_RUNS, ["load average was 1.50"]),
        ({}, 7.25, ENOUGH_RUNS, ["7.2 % of the CPU time"]),
        ({}, 0.0, ENOUGH_RUNS - 1, ["4 runs are few"]),
    ],
)
def test_it_says_when_a_figure_is_not_to_be_trusted(
    facts: dict[str, Any], steal_percent: float, runs: int, said: list[str]
) -> None:
    """Clocks that move, a busy machine, a hypervisor that takes time, and few runs: a sentence each, and only then."""
    found = warnings(msgspec.structs.replace(FIXED, **facts), steal_percent, runs, [])
    assert len(found) == bool(said)
    assert all(words in found[0] for words in said)


@pytest.mark.parametrize(
    ("prompt", "length", "name"),
    [("bench-123-2048", 2048, "m, 2,048 tokens"), ("system", None, "m/system"), ("bench-1-128", None, "m/bench-1-128")],
)
def test_a_prompt_of_a_sweep_goes_by_its_length(prompt: str, length: int | None, name: str) -> None:
    """Its own name is of one session, and says nothing to a reader. A declared prompt may be named alike."""
    result = PromptResult(
        model="m", prompt=prompt, tokens=None, size_bytes=None, build_ms=None, length=length, states={}
    )
    assert result.name == name


def test_a_picture_without_the_drawing_library_is_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra; the error says which."""
    plots.check(Path("a.svg"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as error:
        plots.check(Path("a.svg"))
    assert "rkcached[plot]" in error.value.hint
    with pytest.raises(UsageError, match="neither SVG nor PNG"):
        plots.check(Path("a.pdf"))
