"""Looks at the world: manifest, sources and store, compared by the planner.

A look never changes anything and never fails for a bad input: what is wrong is part of what was
seen. Blocking; the daemon does it in a thread, one look at a time, and the command line does it
without a daemon.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from rkcached import errors
from rkcached.host import disk
from rkcached.messages.sandbox import Renderer
from rkcached.plan.desired import Desired, DesiredModel, Resolver
from rkcached.plan.planner import assess, plan
from rkcached.plan.records import (
    Action,
    Assessment,
    Build,
    DesiredPrompt,
    Limits,
    Observed,
    Verdict,
    VerdictKind,
)
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import model_files
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import Key, PromptSource, Sources, Trouble, kept
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.scan import disown
from rkcached.store.sidecar import Inventory, StoredArtifact
from rkcached.store.store import Store

MAX_MANIFEST_BYTES = 4 << 20

NEW_S = 3600.0
"""A retired artifact does not expire before it was seen for so long, whatever the clock says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One consistent look at manifest, sources and store, and what follows from it."""

    manifest: Manifest
    sources: Sources
    desired: Desired
    inventory: Inventory
    assessments: tuple[Assessment, ...]
    actions: tuple[Action, ...]
    """The plan: what to do about the assessments, in this order."""
    store_trouble: errors.StoreError | None = None
    """Why the store cannot be read. The look goes on without it: no artifact is known, and none can
    be built."""

    def with_assessments(self, assessments: tuple[Assessment, ...]) -> Observation:
        """The same, but for these assessments and what to do about them."""
        return replace(self, assessments=assessments, actions=plan(assessments))


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """A fresh prompt whose text changed, and the build that follows from it."""

    prompt: DesiredPrompt
    text: str
    assessment: Assessment
    build: Build


@dataclass(frozen=True, slots=True, kw_only=True)
class _Last:
    """The parts of the last look that a glance needs."""

    sources: Sources
    models: Mapping[str, DesiredModel | Trouble]
    verdicts: dict[Key, Verdict]
    # Fingerprints.
    retired: Collection[str]


class Observer:
    """Looks at the disk. Used by the daemon and, without one, by the command line."""

    def __init__(self, store: Store, stored: StoredTexts | None = None) -> None:
        self._store = store
        self._reader = SourceReader(store.digests, stored)
        self._resolver = Resolver(Renderer().compile)
        self._last: _Last | None = None
        # By fingerprint: when this process saw the retired artifact first, in monotonic seconds.
        self._retired_since: dict[str, float] = {}
        # Of the last look: by prompt, and by fingerprint for retired artifacts.
        self._assessments: dict[Key | str, Assessment] = {}

    def observe(
        self, manifest: Manifest, extra_verdicts: Mapping[Key, Verdict] | None = None
    ) -> Observation:
        """Scan and assess. Blocking."""
        sources = self._reader.scan(manifest)
        desired = self._resolver.resolve(manifest, sources)
        trouble: errors.StoreError | None = None
        self._store.spare(_named(manifest, sources))
        try:
            inventory = self._store.scan()
            disown(inventory, self._store.root, desired.prompts)
        except errors.StoreError as error:
            inventory, trouble = Inventory(), error
        verdicts = {**inventory.verdicts, **(extra_verdicts or {})}
        self._last = _Last(
            sources=sources,
            models=desired.models,
            verdicts=verdicts,
            retired=inventory.retired.keys(),
        )
        observed = Observed(
            artifacts=inventory.observed(),
            verdicts=_spread(dict(verdicts), desired),
            unlisted_models=frozenset(sources.unlisted_models),
            foreign_bytes=sum(inventory.foreign.values()),
            retired=inventory.retired,
            spare_bytes=disk.spare_bytes(self._store.root),
            new_retired=self._new_retired(inventory, min(manifest.cache.keep_retired_s, NEW_S)),
            now=time.time(),
        )
        limits = Limits(
            max_bytes=manifest.cache.max_bytes,
            min_tokens=manifest.cache.min_tokens,
            keep_retired_s=manifest.cache.keep_retired_s,
        )
        prompts = tuple(desired.prompts.values())
        if trouble is not None:
            prompts = tuple(
                replace(p, fingerprint=None, trouble=p.trouble or Trouble.of(trouble))
                for p in prompts
            )
        before = self._assessments
        self._assessments = {
            (place := assessment.retired or assessment.key): kept(before.get(place), assessment)
            for assessment in assess(prompts, observed, limits)
        }
        assessments = tuple(self._assessments.values())
        return Observation(
            manifest=manifest,
            sources=sources,
            desired=desired,
            inventory=inventory,
            assessments=assessments,
            actions=plan(assessments),
            store_trouble=trouble,
        )

    def _new_retired(self, inventory: Inventory, new_s: float) -> frozenset[str]:
        """Find the retired artifacts that this process has known for less than that.

        A board without a clock of its own starts with an old time, which then jumps.
        """
        now = time.monotonic()
        known = self._retired_since
        self._retired_since = {digest: known.get(digest, now) for digest in inventory.retired}
        return frozenset(
            digest for digest, since in self._retired_since.items() if now - since < new_s
        )

    def glance(
        self, manifest: Manifest, changed: set[str], fresh: Mapping[Key, StoredArtifact]
    ) -> list[Glimpse]:
        """Find the `fresh` prompts that must be built because of files that changed. Blocking.

        Everything else is taken to be as the last look saw it, so nothing but these files is read;
        a file is known by the prompts it was part of then, never by its name. A look must follow.
        Whether a text fits into the budget its build finds out; one that did not fit before is left
        to the look, as that depends on all prompts.
        """
        if (last := self._last) is None:
            return []
        existing = {*last.retired, *(artifact.fingerprint for artifact in fresh.values())}
        glimpses = []
        for key, declared in last.sources.prompts.items():
            if changed.isdisjoint(declared.files) or (artifact := fresh.get(key)) is None:
                continue
            now = self._reader.read_again(declared)
            prompt = self._resolver.resolve_one(now, last.models[key.model], manifest)
            if _did_not_fit(prompt, last.verdicts.get(key)):
                continue
            if prompt.fingerprint is not None and prompt.fingerprint.digest in existing:
                continue  # the store has it under another name: the look adopts it
            desired = Desired(models=last.models, prompts={key: prompt}, texts={})
            observed = Observed(
                artifacts={key: artifact},
                verdicts=_spread(dict(last.verdicts), desired),
                now=time.time(),
            )
            (assessment,) = assess(
                (prompt,), observed, Limits(min_tokens=manifest.cache.min_tokens)
            )
            if isinstance(now.source, PromptSource) and isinstance(assessment.action, Build):
                glimpses.append(
                    Glimpse(
                        prompt=prompt,
                        text=now.source.text,
                        assessment=assessment,
                        build=assessment.action,
                    )
                )
        return glimpses


def _named(manifest: Manifest, sources: Sources) -> Iterator[str]:
    """The files that the manifest names, itself among them."""
    yield str(manifest.file)
    for model in manifest.models.values():
        yield from map(str, (model.path, *model_files(model)))
    for declared in sources.prompts.values():
        yield from declared.files


def _did_not_fit(prompt: DesiredPrompt, verdict: Verdict | None) -> bool:
    wanted = prompt.fingerprint.digest if prompt.fingerprint is not None else ""
    return (
        verdict is not None
        and verdict.kind is VerdictKind.OVER_BUDGET
        and verdict.fingerprint == wanted
    )


def _spread(verdicts: dict[Key, Verdict], desired: Desired) -> dict[Key, Verdict]:
    """Give each prompt of a model that cannot be cached a verdict that says so.

    It holds until the model's file, the runtime or its parameters change.
    """
    uncacheable = {
        v.model: v for v in verdicts.values() if v.kind is VerdictKind.UNCACHEABLE and v.model
    }
    for key, prompt in desired.prompts.items() if uncacheable else ():
        model = desired.models.get(key.model)
        verdict = uncacheable.get(model.identity) if isinstance(model, DesiredModel) else None
        if verdict is not None and prompt.fingerprint is not None:
            verdicts[key] = replace(verdict, fingerprint=prompt.fingerprint.digest)
    return verdicts
