"""The pure middle: compare what should exist with what does, and say what to do and why.

`assess` gives every prompt one state with its reason, `plan` turns states into actions. Nothing
here reads a file, a clock or an event: the same input always gives the same plan, and `rkcached
plan` prints exactly this data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, assert_never

from rkcached.plan.fingerprint import Fingerprint, changes, reason_of
from rkcached.plan.records import (
    MAX_QUARANTINE_S,
    MAX_RETRY_S,
    PASSING_RETRY_S,
    Action,
    Adopt,
    Artifact,
    Assessment,
    Blocked,
    Build,
    DesiredPrompt,
    Limits,
    Observed,
    Remove,
    Retire,
    State,
    Verdict,
    VerdictKind,
    over_budget,
    too_short,
)
from rkcached.sources.records import Key, Trouble


def assess(
    desired: Sequence[DesiredPrompt], observed: Observed, limits: Limits
) -> tuple[Assessment, ...]:
    """Assess every declared prompt in manifest order, undeclared artifacts, and retired ones.

    The budget goes to what is served, or will be, in manifest order. What is left goes to artifacts
    that serve nobody now, so that whatever stays on disk fits, and a build that is due finds the
    room that was counted for it. The retired ones get what is left then, the youngest first.
    """
    declared = {prompt.key for prompt in desired}
    sources = _sources(desired, observed)
    world = _World(
        observed=observed, limits=limits, sources=sources, claimed_bytes=observed.foreign_bytes
    )
    claims: dict[Key, int] = {}
    assessments = []

    for prompt in desired:
        assessment = _assess_one(prompt, world)
        if claimed_bytes := _claim(assessment, world):
            claims[prompt.key] = claimed_bytes
            world.claimed_bytes += claimed_bytes

        assessments.append(assessment)

    assessments = _take_sources(assessments, declared)
    undeclared = [key for key in sorted(observed.artifacts) if key not in declared]
    if not undeclared and not observed.retired:
        return tuple(_make_room(assessments, observed, limits, claims))

    needed = _Needed.by(assessments, observed)
    assessments += [_assess_orphan(key, needed, observed, limits) for key in undeclared]

    kept = list(_make_room(assessments, observed, limits, claims))
    return (*kept, *_assess_retired(kept, needed, observed, limits, claims))


def plan(assessments: Iterable[Assessment]) -> tuple[Action, ...]:
    """The actions, in the order to carry them out.

    Copies come first, because the next steps may take their sources away; then what is taken over,
    put aside and removed, which makes room for the builds, in manifest order.
    """
    copies: list[Action] = []
    takes: list[Action] = []
    retires: list[Action] = []
    removes: list[Action] = []
    builds: list[Action] = []
    blocked: list[Action] = []

    for assessment in assessments:
        match assessment.action:
            case None:
                pass
            case Adopt(take=False):
                copies.append(assessment.action)
            case Adopt():
                takes.append(assessment.action)
            case Retire():
                retires.append(assessment.action)
            case Remove():
                removes.append(assessment.action)
            case Build():
                builds.append(assessment.action)
            case Blocked():
                blocked.append(assessment.action)
            case _:
                assert_never(assessment.action)

    return (*copies, *takes, *retires, *removes, *builds, *blocked)


class _Source(NamedTuple):
    """Where an artifact of some fingerprint is, and what it takes."""

    # None: it is retired.
    key: Key | None
    tokens: int
    size_bytes: int
    reason: str


@dataclass(slots=True)
class _World:
    """The world that a prompt is assessed in.

    `claimed_bytes` of the budget are taken by the prompts before it.
    """

    observed: Observed
    limits: Limits
    sources: Mapping[str, _Source]
    claimed_bytes: int

    def fits(self, size_bytes: int) -> bool:
        return (
            self.limits.max_bytes is None
            or self.claimed_bytes + size_bytes <= self.limits.max_bytes
        )

    def unfit(self, fingerprint: str, size_bytes: int) -> Verdict:
        """The verdict on an artifact that does not fit."""
        max_bytes = self.limits.max_bytes or 0
        return over_budget(
            fingerprint, size_bytes, self.claimed_bytes, max_bytes, self.observed.foreign_bytes
        )


def _sources(desired: Iterable[DesiredPrompt], observed: Observed) -> dict[str, _Source]:
    """By fingerprint: artifacts that a declared prompt wants and does not have in its own place."""
    wanted = set()
    for prompt in desired:
        artifact = observed.artifacts.get(prompt.key)
        if prompt.fingerprint is not None and not _matches(artifact, prompt.fingerprint.digest):
            wanted.add(prompt.fingerprint.digest)

    sources: dict[str, _Source] = {}
    for fingerprint in wanted & observed.retired.keys():
        retired = observed.retired[fingerprint]
        reason = f"the retired prompt cache of {retired.key} has the same text and parameters"
        sources[fingerprint] = _Source(None, retired.tokens, retired.size_bytes, reason)

    if not wanted - sources.keys():
        return sources

    for key, artifact in observed.artifacts.items():
        if (
            artifact.fingerprint in wanted
            and artifact.fingerprint not in sources
            and not artifact.corrupt
        ):
            # One that is no longer declared is renamed; a declared one stays and is copied.
            reason = f"the prompt cache of {key} has the same text and parameters"
            sources[artifact.fingerprint] = _Source(
                key, artifact.tokens, artifact.size_bytes, reason
            )

    return sources


def _take_sources(assessments: list[Assessment], declared: set[Key]) -> list[Assessment]:
    """Let the last of several adoptions take its source over, unless a declared prompt keeps it."""
    last: dict[str, int] = {}
    for position, assessment in enumerate(assessments):
        if isinstance(action := assessment.action, Adopt) and action.source not in declared:
            last[action.fingerprint.digest] = position

    for position in last.values():
        assessment = assessments[position]
        if isinstance(action := assessment.action, Adopt):
            assessments[position] = replace(assessment, action=replace(action, take=True))

    return assessments


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needed:
    """The artifacts that the declared prompts have and are about to adopt."""

    # By fingerprint: a prompt with a fresh artifact of it.
    served: Mapping[str, Key]
    # Fingerprints of artifacts that an action of this plan needs where they are.
    adopted: frozenset[str]

    @classmethod
    def by(cls, assessments: Iterable[Assessment], observed: Observed) -> _Needed:
        served = {}
        adopted = set()

        for assessment in assessments:
            if assessment.state is State.FRESH:
                served[observed.artifacts[assessment.key].fingerprint] = assessment.key
            elif isinstance(assessment.action, Adopt):
                adopted.add(assessment.action.fingerprint.digest)

        return cls(served=served, adopted=frozenset(adopted))


def _matches(artifact: Artifact | None, fingerprint: str) -> bool:
    return artifact is not None and not artifact.corrupt and artifact.fingerprint == fingerprint


def _assess_one(prompt: DesiredPrompt, world: _World) -> Assessment:
    key = prompt.key
    wanted = prompt.fingerprint
    artifact = world.observed.artifacts.get(key)
    fresh = Assessment(key=key, state=State.FRESH, description=prompt.description)

    # Its inputs are unusable, so nobody knows what it should be. What exists is kept: the same text
    # may come back.
    if wanted is None:
        trouble = prompt.trouble or Trouble(message="the prompt has no text")
        retry_at = world.observed.now + PASSING_RETRY_S if trouble.passing else 0.0
        return _blocked(fresh, State.BLOCKED, trouble, retry_at)

    # There is an artifact of exactly this fingerprint.
    if artifact is not None and _matches(artifact, wanted.digest):
        return _within_limits(fresh, artifact, world)

    # There is none in its place, but the store has it under another name. No verdict on building it
    # matters then; only one that failed when it was used is not tried again.
    verdict = world.observed.verdicts.get(key)
    if verdict is not None and verdict.fingerprint != wanted.digest:
        verdict = None
    source = world.sources.get(wanted.digest)
    if source is not None and (verdict is None or verdict.kind is not VerdictKind.QUARANTINED):
        return _adopted(fresh, wanted, source, world)

    # There is none. An earlier attempt at this very fingerprint may say that trying is useless, or
    # too early.
    sentenced = _by_verdict(fresh, verdict, world) if verdict is not None else None
    return sentenced or _built(fresh, wanted, artifact)


def _within_limits(fresh: Assessment, artifact: Artifact, world: _World) -> Assessment:
    """Assess an artifact of the wanted fingerprint: the limits may be tighter than they were."""
    limits = world.limits
    if artifact.tokens < limits.min_tokens:
        verdict = too_short(artifact.fingerprint, artifact.tokens, limits.min_tokens)
        return _dropped(fresh, State.UNCACHED, verdict, limits)

    if not world.fits(artifact.size_bytes):
        return _dropped(
            fresh, State.BLOCKED, world.unfit(artifact.fingerprint, artifact.size_bytes), limits
        )

    return fresh


def _built(base: Assessment, wanted: Fingerprint, artifact: Artifact | None) -> Assessment:
    """A prompt that has to be prefilled, and why."""
    if artifact is None:
        build = Build(key=base.key, reason="missing", fingerprint=wanted)
        return replace(base, state=State.MISSING, reason=build.reason, action=build)

    if artifact.unsigned:
        build = Build(key=base.key, reason=artifact.corrupt, fingerprint=wanted)
        return replace(base, state=State.STALE, reason=build.reason, action=build)

    if artifact.corrupt:
        build = Build(key=base.key, reason=f"corrupt: {artifact.corrupt}", fingerprint=wanted)
        return replace(base, state=State.CORRUPT, reason=artifact.corrupt, action=build)

    changed = changes(artifact.components, wanted.components)
    build = Build(key=base.key, reason=reason_of(changed), fingerprint=wanted)
    return replace(base, state=State.STALE, reason=build.reason, changes=changed, action=build)


def _adopted(base: Assessment, wanted: Fingerprint, source: _Source, world: _World) -> Assessment:
    """Assess a prompt whose artifact the store has under another name; the limits hold, too."""
    if source.tokens < world.limits.min_tokens:
        trouble = too_short(wanted.digest, source.tokens, world.limits.min_tokens).trouble
        return replace(base, state=State.UNCACHED, reason=trouble.message, hint=trouble.hint)

    if not world.fits(source.size_bytes):
        return _blocked(base, State.BLOCKED, world.unfit(wanted.digest, source.size_bytes).trouble)

    artifact = world.observed.artifacts.get(base.key)
    state = State.MISSING
    if artifact is not None:
        state = State.CORRUPT if artifact.corrupt and not artifact.unsigned else State.STALE
    action = Adopt(key=base.key, reason=source.reason, fingerprint=wanted, source=source.key)
    return replace(base, state=state, reason=source.reason, action=action)


def _by_verdict(base: Assessment, verdict: Verdict, world: _World) -> Assessment | None:
    """Assess a prompt by the verdict on earlier attempts; None if another attempt is due."""
    now = world.observed.now
    match verdict.kind:
        case VerdictKind.UNCACHEABLE:
            return _blocked(base, State.UNCACHEABLE, verdict.trouble)
        case VerdictKind.QUARANTINED if now < verdict.retry_at <= now + MAX_QUARANTINE_S:
            return _blocked(base, State.QUARANTINED, verdict.trouble, verdict.retry_at)
        case VerdictKind.TOO_LONG:
            return _blocked(base, State.BLOCKED, verdict.trouble)
        case VerdictKind.TOO_SHORT if verdict.tokens < world.limits.min_tokens:
            trouble = too_short(
                verdict.fingerprint, verdict.tokens, world.limits.min_tokens
            ).trouble
            return replace(base, state=State.UNCACHED, reason=trouble.message, hint=trouble.hint)
        case VerdictKind.OVER_BUDGET if not world.fits(verdict.needed_bytes):
            # Worded anew, because the other artifacts may have grown or shrunk since.
            trouble = world.unfit(verdict.fingerprint, verdict.needed_bytes).trouble
            return _blocked(base, State.BLOCKED, trouble)
        case VerdictKind.FAILED if now < verdict.retry_at <= now + MAX_RETRY_S:
            return _blocked(base, State.BLOCKED, verdict.trouble, verdict.retry_at)
        case (
            VerdictKind.TOO_SHORT
            | VerdictKind.OVER_BUDGET
            | VerdictKind.FAILED
            | VerdictKind.QUARANTINED
        ):
            return None  # the limit was raised, the time has come, or the clock was set back
        case _:
            assert_never(verdict.kind)


def _claim(assessment: Assessment, world: _World) -> int:
    """The bytes of the budget that a prompt takes, or that its next build needs.

    Where nobody knows that, it is taken to be what the stale artifact has that it replaces, if
    there is room for it: or an edit would let something be built in its place that has to go again.
    """
    observed = world.observed
    artifact = observed.artifacts.get(assessment.key)
    if assessment.state is State.FRESH and artifact is not None:
        return artifact.size_bytes
    if isinstance(assessment.action, Adopt):
        return world.sources[assessment.action.fingerprint.digest].size_bytes
    if not isinstance(assessment.action, Build):
        return 0
    verdict = observed.verdicts.get(assessment.key)
    if (
        verdict
        and verdict.fingerprint == assessment.action.fingerprint.digest
        and verdict.needed_bytes
    ):
        return verdict.needed_bytes

    if artifact is None or artifact.corrupt or world.limits.max_bytes is None:
        return 0
    return artifact.size_bytes if world.fits(artifact.size_bytes) else 0


def _make_room(
    assessments: Sequence[Assessment], observed: Observed, limits: Limits, claims: Mapping[Key, int]
) -> Iterator[Assessment]:
    """Remove artifacts that serve nobody (stale, corrupt, undeclared) where the budget is short.

    It shares the room of the build that replaces it, as the one comes when the other goes; and what
    another prompt takes over has that prompt's room.
    """
    if limits.max_bytes is None:
        yield from assessments
        return

    taken = {a.action.source for a in assessments if isinstance(a.action, Adopt) and a.action.take}
    claimed_bytes = observed.foreign_bytes + sum(claims.values())

    for assessment in assessments:
        artifact = observed.artifacts.get(assessment.key)
        served = assessment.state is State.FRESH
        leaves = isinstance(assessment.action, Remove | Retire) or assessment.key in taken
        if artifact is None or served or leaves:
            yield assessment
            continue

        more_bytes = max(0, artifact.size_bytes - claims.get(assessment.key, 0))
        if claimed_bytes + more_bytes <= limits.max_bytes:
            claimed_bytes += more_bytes
            yield assessment
        else:
            reason = f"makes room: it is {assessment.state}, "
            reason += f"and cache.max_bytes {limits.max_bytes:,} is too small for it"
            yield replace(assessment, action=Remove(key=assessment.key, reason=reason))


def _assess_orphan(key: Key, needed: _Needed, observed: Observed, limits: Limits) -> Assessment:
    """An artifact in the place of a prompt that nobody declares."""
    orphan = Assessment(key=key, state=State.ORPHAN, reason="not in the manifest")
    artifact = observed.artifacts[key]

    if key.model in observed.unlisted_models:
        reason = "not declared, but kept: a prompts_from folder of this model cannot be listed"
        return replace(orphan, reason=reason)

    if artifact.fingerprint in needed.adopted:
        return replace(orphan, reason="not in the manifest; a declared prompt adopts it")
    if artifact.corrupt or artifact.fingerprint in needed.served or limits.keep_retired_s <= 0:
        return replace(orphan, action=Remove(key=key, reason=orphan.reason))
    return replace(orphan, action=Retire(key=key, reason=orphan.reason))


def _assess_retired(
    kept: Sequence[Assessment],
    needed: _Needed,
    observed: Observed,
    limits: Limits,
    claims: Mapping[Key, int],
) -> Iterator[Assessment]:
    """Keep retired artifacts that are young enough and fit, the youngest first.

    Where there is no budget they go when the disk is nearly full.
    """
    room_bytes = _room_for_retired(kept, observed, limits, claims)

    for retired in sorted(
        observed.retired.values(), key=lambda artifact: artifact.retired_at, reverse=True
    ):
        reason = ""
        if retired.fingerprint in needed.adopted:
            pass
        elif retired.fingerprint in needed.served:
            reason = f"{needed.served[retired.fingerprint]} has the same prompt cache"
        elif retired.fingerprint not in observed.new_retired and (
            observed.now - retired.retired_at >= limits.keep_retired_s
        ):
            reason = "retired, and not declared again within cache.keep_retired_s"
        elif room_bytes is not None and retired.size_bytes > room_bytes:
            reason = "makes room: it is retired, and there is no space left for it"
        elif room_bytes is not None:
            room_bytes -= retired.size_bytes

        yield Assessment(
            key=retired.key,
            state=State.RETIRED,
            reason=reason or "no prompt uses it now; it is kept in case it is declared again",
            retired=retired.fingerprint,
            action=Remove(key=retired.key, reason=reason, retired=retired.fingerprint)
            if reason
            else None,
        )


def _room_for_retired(
    kept: Sequence[Assessment], observed: Observed, limits: Limits, claims: Mapping[Key, int]
) -> int | None:
    """Bytes that all retired artifacts may take together; None where nothing bounds them."""
    if limits.max_bytes is None:
        if observed.spare_bytes is None:
            return None
        retired_bytes = sum(artifact.size_bytes for artifact in observed.retired.values())
        return observed.spare_bytes + retired_bytes

    sources = {a.action.source for a in kept if isinstance(a.action, Adopt) and a.action.take}
    taken_bytes = observed.foreign_bytes + sum(claims.values())

    for assessment in kept:
        artifact = observed.artifacts.get(assessment.key)
        leaves = isinstance(assessment.action, Remove) or assessment.key in sources
        if artifact is not None and not leaves:
            taken_bytes += max(0, artifact.size_bytes - claims.get(assessment.key, 0))

    return max(0, limits.max_bytes - taken_bytes)


def _blocked(base: Assessment, state: State, trouble: Trouble, retry_at: float = 0.0) -> Assessment:
    action = Blocked(key=base.key, reason=trouble.message, hint=trouble.hint, retry_at=retry_at)
    return replace(base, state=state, reason=trouble.message, hint=trouble.hint, action=action)


def _dropped(base: Assessment, state: State, verdict: Verdict, limits: Limits) -> Assessment:
    """A good artifact that the limits no longer allow: the verdict keeps it from being built again.

    It is put aside, as the limits may be what they were soon.
    """
    trouble = verdict.trouble
    action: Action = Remove(key=base.key, reason=trouble.message, verdict=verdict)
    if limits.keep_retired_s > 0:
        action = Retire(key=base.key, reason=trouble.message, verdict=verdict)
    return replace(base, state=state, reason=trouble.message, hint=trouble.hint, action=action)
