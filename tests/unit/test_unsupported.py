"""Sampling that an engine cannot change in a run, for those who want it ignored."""

from __future__ import annotations

from typing import Any, cast

import pytest

from rkcached.engines.base import SAMPLING_PARAMETERS, EngineInfo, Sampling
from rkcached.plan.desired import DesiredModel
from rkcached.serving.job import Job
from rkcached.serving.unsupported import without_unsupported

FIXED = Sampling(temperature=0.7, top_k=20)


def info(run_sampling: tuple[str, ...], *, greedy: bool = False, logs: bool = False) -> EngineInfo:
    return EngineInfo(
        runtime_version="1",
        context_tokens=4096,
        measures_prefill=True,
        aborts_prefill=True,
        run_sampling=run_sampling,
        greedy=greedy,
        gives_logprobs=logs,
    )


def job(sampling: Sampling) -> Job:
    return Job(
        model=cast(DesiredModel, None),  # nobody looks at it
        named=None,
        prompt="x",
        sampling=sampling,
        cold=False,
        accepted=0.0,
        ignored=("zzz",),
    )


@pytest.mark.parametrize(
    ("engine", "wanted", "kept", "ignored"),
    [
        (info(()), {"temperature": 0.2}, {}, ["temperature"]),
        (info(()), {"temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}, []),
        (info(()), {"temperature": 0.0}, {}, ["temperature"]),
        (info((), greedy=True), {"temperature": 0.0}, {"temperature": 0.0}, []),
        (info(()), {"min_p": 0.0}, {}, []),
        (info(()), {"min_p": 0.1, "seed": 1}, {}, ["min_p", "seed"]),
        (
            info(SAMPLING_PARAMETERS),
            {"temperature": 0.2, "seed": 1},
            {"temperature": 0.2},
            ["seed"],
        ),
        (info(()), {"logprobs": 0}, {}, ["logprobs"]),
        (info((), logs=True), {"logprobs": 0}, {"logprobs": 0}, []),
        (
            info(()),
            {"stop": ("a",), "max_new_tokens": 3},
            {"stop": ("a",), "max_new_tokens": 3},
            [],
        ),
    ],
)
def test_what_is_left_out(
    engine: EngineInfo, wanted: dict[str, Any], kept: dict[str, Any], ignored: list[str]
) -> None:
    """It is named, unless it would have changed nothing."""
    done = without_unsupported(job(Sampling(**wanted)), engine, FIXED)

    assert done.sampling == Sampling(**kept)
    assert list(done.ignored) == ["zzz", *ignored]
