"""A snapshot of the reconciler: complete, frozen, and cheap to change with thousands of prompts."""

from __future__ import annotations

import time
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from rkcached.host.digests import Digests, Reading
from rkcached.plan.desired import Desired
from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.records import Assessment, DesiredPrompt, Retired, State
from rkcached.reconcile.snapshot import BuildProgress, Published, Snapshot
from rkcached.sources.parser import parse
from rkcached.sources.records import Key
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact

FIGURES = Figures(prefill_ms=2.0, load_ms=1.0, cold_ttft_ms=3.0, warm_ttft_ms=1.5, verified="exact")
WANTED = fingerprint({"prefix.digest": "d", "prefix.bytes": 1})
OLD = fingerprint({"prefix.digest": "e", "prefix.bytes": 1})
MANIFEST = parse("version: 1\nmodels: {m: {path: m.gguf}}", file=Path("/etc/manifest.yaml"))


def stored(key: Key, digest: str = WANTED.digest) -> StoredArtifact:
    sidecar = Sidecar(
        model=key.model,
        prompt=key.prompt,
        artifact=f"{key.prompt}.memory_cache",
        fingerprint=digest,
        components=WANTED.components,
        size_bytes=1,
        sha256="",
        text_sha256="",
        tokens=1,
        built_at=0.0,
        build_ms=0.0,
        figures=FIGURES,
    )
    return StoredArtifact(folder=Path("/cache"), sidecar=sidecar, signature=None)


def snapshot_of(number: int) -> Snapshot:
    """All of them are stale."""
    keys = [Key("m", str(n)) for n in range(number)]
    prompts = {key: DesiredPrompt(key=key, fingerprint=WANTED) for key in keys}
    return Snapshot(
        manifest=MANIFEST,
        desired=Desired(models={}, prompts=prompts, texts={}),
        assessments={key: Assessment(key=key, state=State.STALE) for key in keys},
        artifacts={key: stored(key, OLD.digest) for key in keys},
        unreadable_bytes={keys[0]: 7},
    )


A, B = Key("m", "0"), Key("m", "1")


def test_a_snapshot_is_frozen() -> None:
    """Who holds one sees no change."""
    snapshot = snapshot_of(2)
    with pytest.raises(FrozenInstanceError):
        snapshot.builds = 1  # type: ignore[misc]
    changed = snapshot.with_artifact(A, stored(A)).without_artifact(B)
    assert snapshot.assessments[A].state is State.STALE
    assert (len(snapshot.artifacts), len(snapshot.index)) == (2, 0)
    assert (len(changed.artifacts), len(changed.index)) == (1, 1)


def test_what_was_published_is_fresh_if_it_is_what_is_wanted() -> None:
    """The text may have changed while it was built."""
    fresh = snapshot_of(2).with_artifact(A, stored(A))
    assert (fresh.assessments[A].state, fresh.index.get(A)) == (State.FRESH, stored(A))
    assert fresh.unreadable_bytes == {}

    late = snapshot_of(2).with_artifact(A, stored(A, OLD.digest))
    assert (late.assessments[A].state, late.index.get(A)) == (State.STALE, None)


def test_an_artifact_that_nobody_declares_is_gone_with_its_state() -> None:
    """Who asked for its removal must not see it any more; a declared prompt keeps its state."""
    orphan = Key("m", "orphan")
    snapshot = snapshot_of(1).with_artifact(orphan, stored(orphan))
    snapshot = snapshot.with_assessment(Assessment(key=orphan, state=State.ORPHAN))
    assert orphan not in snapshot.without_artifact(orphan).assessments
    assert A in snapshot.without_artifact(A).assessments


def test_a_user_sees_nothing_that_serves_another() -> None:
    """Neither prompts nor artifacts, retired ones and the running build among them."""
    gone = Key("m", "learned-0123456789ab")
    retired = Retired(key=gone, fingerprint="f", tokens=1, size_bytes=1, retired_at=0.0, owner=1000)
    snapshot = snapshot_of(2)
    assert snapshot.seen_by(1001) is snapshot
    snapshot = replace(
        snapshot,
        desired=replace(
            snapshot.desired, texts={A: "a", B: "b"}, stored=frozenset({A}), learned={A: 1000}
        ),
        private={A: 1000},
        retired={"f": retired},
        building=BuildProgress(key=A, reason="missing", fingerprint="f", started=0.0),
    )
    assert snapshot.seen_by(None) is snapshot
    mine = snapshot.seen_by(1000)
    assert (mine.assessments, mine.retired, mine.building) == (
        snapshot.assessments,
        snapshot.retired,
        snapshot.building,
    )

    other = snapshot.seen_by(1001)
    of_other = other.desired
    shown = (of_other.prompts, of_other.texts, other.assessments, other.artifacts)
    assert all(set(things) == {B} for things in shown)
    assert (of_other.stored, of_other.learned) == (frozenset(), {})
    assert (other.unreadable_bytes, other.retired, other.building) == ({}, {}, None)

    assert snapshot.may_see(1000, A)
    assert not snapshot.may_see(1001, A)
    assert snapshot.may_see(1001, B)
    assert not snapshot.may_see(1000, gone)  # whose it was is not known any more
    assert snapshot.may_see(None, gone)


def test_progress_copies_nothing_that_grows_with_the_prompts() -> None:
    """It comes many times a second."""
    published = Published(MANIFEST, Digests())
    published.put(replace(snapshot_of(10), ready=True))
    before = published.now
    progress = BuildProgress(key=A, reason="", fingerprint="", started=0.0)
    published.change(building=replace(progress, done_tokens=1, total_tokens=2))
    after = published.now
    assert after.is_building(A)
    same = {f.name for f in fields(Snapshot) if getattr(before, f.name) is getattr(after, f.name)}
    assert {f.name for f in fields(Snapshot)} - same == {"building"}


def test_a_change_among_thousands_takes_milliseconds() -> None:
    """It copies dicts of references and no more."""
    snapshot = snapshot_of(10_000)
    artifact = stored(A)
    best_s = 1.0
    for _ in range(20):
        started = time.perf_counter()
        snapshot.with_artifact(A, artifact).without_artifact(A)
        best_s = min(best_s, time.perf_counter() - started)
    assert best_s < 0.02


def test_until_the_first_look_is_over_it_says_what_is_read() -> None:
    """A thread reads on; each snapshot says how far it was."""
    digests = Digests()
    published = Published(MANIFEST, digests)
    assert published.now.reading is None
    digests.reading = Reading(path="/m.gguf", total_bytes=9, done_bytes=1)
    early = published.now
    digests.reading.done_bytes = 5
    assert early.reading is not None
    assert early.reading.done_bytes == 1
    assert published.now.reading == digests.reading
    published.change(ready=True)
    assert published.now.reading is None
