"""Which of the prompt caches that were found is loaded, and what an answer says of it."""

from __future__ import annotations

from pathlib import Path

from rkcached.reconcile.index import Match
from rkcached.serving.reuse import Found
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
