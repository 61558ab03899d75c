"""Which of the prompt caches that were found is loaded, and what an answer says of it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from rkcached.engines.base import FinishReason, RunStats, Sampling
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.index import Match
from rkcached.serving.job import Job
from rkcached.serving.report import NOT_MEASURED
from rkcached.serving.reuse import Found, outcome
from rkcached.sources.records import Key
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact


def match(prompt: str, text: bytes, common_bytes: int) -> Match:
    figures = Figures(
        prefill_ms=2.0, load_ms=1.0, cold_ttft_ms=3.0, warm_ttft_ms=1.5, verified="exact"
    )
    sidecar = Sidecar(
        model="m",
        prompt=prompt,
        artifact=f"{prompt}.memory_cache",
        fingerprint="",
        components={},
        size_bytes=1,
        sha256="",
        text_sha256="",
        tokens=len(text),
        built_at=0.0,
        build_ms=0.0,
        figures=figures,
    )
    artifact = StoredArtifact(folder=Path("/cache"), sidecar=sidecar, signature=None, text=text)
    return Match(Key("m", prompt), artifact, common_bytes)


WHOLE = match("whole", b"You are", 7)
PART = match("part", b"You are a cook", 9)


def test_a_part_is_loaded_where_a_state_can_be_cut() -> None:
    """If it is worth it."""
    found = Found(chosen=PART, whole=WHOLE, nearest=PART).on(rewinds=True)
    assert (found.chosen, found.rewinds) == (PART, True)


def test_only_a_whole_one_is_loaded_where_a_state_cannot_be_cut() -> None:
    """The longest whole one, if there is any; the reason still names the nearest."""
    found = Found(chosen=PART, whole=WHOLE, nearest=PART).on(rewinds=False)
    assert (found.chosen, found.nearest, found.rewinds) == (WHOLE, PART, False)
    assert Found(chosen=PART, nearest=PART).on(rewinds=False).chosen is None


def test_a_worker_that_died_over_a_cache_loads_none() -> None:
    """Whatever else was found."""
    found = Found(chosen=PART, whole=WHOLE, nearest=PART).without("it crashed")
    assert found.on(rewinds=False).chosen is None


def outcome_of(found: Found, cached_tokens: int | None) -> tuple[str, str]:
    job = Job(
        model=cast("DesiredModel", None),
        named=None,
        prompt="You are a cooper, who makes barrels.",
        sampling=Sampling(),
        cold=False,
        accepted=0.0,
    )
    stats = RunStats(
        finish=FinishReason.STOP,
        prompt_tokens=36,
        cached_tokens=cached_tokens,
        prefill_ms=1.0,
        decode_tokens=1,
        decode_ms=1.0,
    )
    return outcome(found, job, stats)


def test_a_runtime_that_counts_no_tokens_still_has_a_reason() -> None:
    """What was loaded is not measured; where nothing was, the reason says what is missing."""
    assert outcome_of(Found(chosen=PART, nearest=PART), None) == ("loaded", NOT_MEASURED)
    state, reason = outcome_of(Found(nearest=PART), None)
    assert state == "cold"
    assert reason.endswith("; that is too little to be worth loading")
    assert outcome_of(Found(), None) == ("cold", "no prompt begins like this request")


def test_what_was_loaded_is_not_called_too_little_to_be_loaded() -> None:
    """The engine's count says that it did not help."""
    state, reason = outcome_of(Found(chosen=PART, nearest=PART), 0)
    assert state == "cold"
    assert reason.endswith("; it was loaded but not reused")
