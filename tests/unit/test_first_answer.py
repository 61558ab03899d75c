"""How long `rkcached doctor` says that the first answer takes: what was measured, and no guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rkcached.cli.board import Check, Outcome
from rkcached.cli.first_answer import checks
from rkcached.sources.parser import parse

ARTIFACT = {"load_ms": 200.0, "warm_ttft_ms": 320.0}


def checked(status: dict[str, Any] | None, keys: str = "") -> Check:
    """The check of the model m, whose prompt is cook."""
    text = f"version: 1\nmodels:\n  m: {{path: m.gguf, prompts: {{cook: cook.md}}{keys}}}\n"
    (check,) = checks(parse(text, file=Path("/etc/rkcached/manifest.yaml")), status)
    return check


def status_of(
    *,
    load_ms: float | None = 1500.0,
    worker: str = "ready",
    trouble: str = "",
    artifact: dict[str, float] | None = ARTIFACT,
) -> dict[str, Any]:
    model = {"name": "m", "worker": worker, "model_load_ms": load_ms, "preload_trouble": trouble}
    prompt: dict[str, Any] = {"model": "m", "prompt": "cook", "state": "fresh"}
    if artifact is not None:
        prompt["artifact"] = artifact
    return {"models": [model], "prompts": [prompt]}


def test_the_parts_are_those_that_were_measured() -> None:
    check = checked(status_of())
    assert check.outcome is Outcome.OK
    assert check.finding == (
        "1.8 s with cook (model 1.5 s, cache 200 ms, question 120 ms), as last measured"
    )
    assert check.next_step.startswith("`preload: cook`")


def test_what_is_preloaded_takes_no_time() -> None:
    """Of the first prompt neither model nor cache; unless the model is not in memory now."""
    check = checked(status_of(), ", preload: cook")
    assert check.finding == "120 ms with cook (question 120 ms), as last measured"
    check = checked(status_of(), ", preload: true")
    assert check.finding.startswith("320 ms with cook (cache 200 ms, question 120 ms)")
    check = checked(status_of(worker="stopped"), ", preload: cook")
    assert check.finding.startswith("1.8 s with cook (model 1.5 s")


@pytest.mark.parametrize(
    ("status", "finding", "next_step"),
    [
        (None, "no daemon runs", "start it"),
        (status_of(load_ms=None), "the model was not loaded", "rkcached bench m"),
        (status_of(artifact=None), "none of its prompts", "rkcached status"),
        (status_of(artifact={**ARTIFACT, "warm_ttft_ms": 0.0}), "none of its prompts", "status"),
    ],
)
def test_what_was_not_measured_is_not_guessed(
    status: dict[str, Any] | None, finding: str, next_step: str
) -> None:
    check = checked(status)
    assert check.outcome is Outcome.SKIP
    assert check.finding.startswith("not measured")
    assert finding in check.finding
    assert next_step in check.next_step


def test_a_model_that_cannot_be_preloaded_is_to_look_at() -> None:
    check = checked(status_of(trouble="no memory"), ", preload: cook")
    assert check.outcome is Outcome.WARN
    assert check.finding.endswith("no memory")
