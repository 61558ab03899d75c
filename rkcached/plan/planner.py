"""The pure middle: compare what should exist with what does, and say what to do and why.

`assess` gives every prompt one state with its reason, `plan` turns states into actions. Nothing
here reads a file, a clock or an event: the same input always gives the same plan, and `rkcached
plan` prints exactly this data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, assert_never

from rkcached.errors import PromptTooShort
from rkcached.plan.fingerprint import Change, Fingerprint, changes
from rkcached.sources.records import Key, Trouble

MAX_RETRY_S = 60.0
"""No failed attempt waits longer for the next one; a time further ahead was written by a clock that
was wrong."""


PASSING_RETRY_S = 10.0
"""An input that may become usable without anybody's doing is looked at again after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredPrompt:
    """A declared prompt: its fingerprint, or the trouble that keeps it from having one."""

    key: Key
    description: str = ""
    fingerprint: Fingerprint | None = None
    trouble: Trouble | None = None


class Artifact(Protocol):
    """A prompt cache in the store, as its sidecar and a look at its files describe it."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def components(self) -> Mapping[str, str]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def corrupt(self) -> str:
        """Why it does not match its sidecar; empty when it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A complete artifact that no prompt uses now.

    It is kept for a while, because its text may come back.
    """

    key: Key
    """The prompt that it was built for, which may be declared with another text now."""
    fingerprint: str
    tokens: int
    size_bytes: int
    retired_at: float
    """Unix seconds."""


class VerdictKind(StrEnum):
    """Why an earlier attempt at this fingerprint gave no artifact, and what may change that."""

    FAILED = "failed"  # something passing: tried again at `retry_at`
    TOO_LONG = "too_long"  # lasting
    TOO_SHORT = "too_short"  # until cache.min_tokens is lowered
    OVER_BUDGET = "over_budget"  # until there is room in cache.max_bytes
    UNCACHEABLE = "uncacheable"  # lasting, and true for every prompt of the model
    QUARANTINED = "quarantined"  # lasting


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of earlier attempts at one fingerprint.

    Only UNCACHEABLE says something about others.
    """

    fingerprint: str
    kind: VerdictKind
    trouble: Trouble
    attempts: int = 1
    retry_at: float = 0.0
    """Unix seconds; for FAILED."""
    tokens: int = 0
    needed_bytes: int = 0
    model: str = ""
    """Identity of the model (file, runtime, parameters) that UNCACHEABLE was found for."""


class State(StrEnum):
    """The one state of a prompt; see the comments in `assess` for how it comes about."""

    FRESH = "fresh"
    STALE = "stale"
    MISSING = "missing"
    CORRUPT = "corrupt"
    ORPHAN = "orphan"
    RETIRED = "retired"
    BLOCKED = "blocked"
    UNCACHED = "uncached"
    UNCACHEABLE = "uncacheable"
    QUARANTINED = "quarantined"


_NEEDS_SOMEBODY = frozenset({State.BLOCKED, State.QUARANTINED, State.CORRUPT, State.UNCACHEABLE})
_ON_ITS_WAY = frozenset({"building", State.MISSING, State.STALE})
_DECLARED = frozenset({State.FRESH, State.UNCACHED})


def urgency(state: str) -> int:
    """The place of a state in lists for people; within one place they keep the manifest's order.

    First what somebody should see to, then what is on its way, then what is as it should be, last
    what nobody declares.
    """
    places = (_NEEDS_SOMEBODY, _ON_ITS_WAY, _DECLARED)
    return next((place for place, states in enumerate(places) if state in states), len(places))


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    key: Key
    reason: str
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Publish an artifact of the wanted fingerprint that the store has under another name."""

    key: Key
    reason: str
    fingerprint: Fingerprint
    source: Key | None = None
    """The prompt whose artifact is copied or taken; None: the retired artifact of this fingerprint.
    """
    take: bool = False
    """Nobody else needs the source, so its files are renamed. Otherwise they are copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """Put an artifact that serves nobody now aside, by its fingerprint. `verdict` as for Remove."""

    key: Key
    reason: str
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Take an artifact out of the store.

    `verdict`, if any, is remembered so that it is not built again at once.
    """

    key: Key
    reason: str
    verdict: Verdict | None = None
    retired: str = ""
    """The fingerprint of the retired artifact that goes. Empty: the artifact in the place of `key`
    goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """Nothing can be done now. `retry_at` (Unix seconds) is set where time alone may help."""

    key: Key
    reason: str
    hint: str = ""
    retry_at: float = 0.0


Action = Build | Adopt | Retire | Remove | Blocked


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """The state of one prompt, why, and what follows from it."""

    key: Key
    state: State
    reason: str = ""
    hint: str = ""
    changes: tuple[Change, ...] = ()
    action: Action | None = None
    description: str = ""
    retired: str = ""
    """The fingerprint of the retired artifact that this is about. Empty: it is about the prompt
    `key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds that the manifest sets for the store."""

    max_bytes: int | None = None
    min_tokens: int = 0
    keep_retired_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The state of the disk at Unix time `now`."""

    artifacts: Mapping[Key, Artifact] = field(default_factory=dict)
    verdicts: Mapping[Key, Verdict] = field(default_factory=dict)
    unlisted_models: frozenset[str] = frozenset()
    """Models whose prompts_from folder cannot be listed: what they declare is not known, so nothing
    is an orphan."""
    foreign_bytes: int = 0
    """Of files in the store's place that are none of its: the budget is smaller by them."""
    retired: Mapping[str, Retired] = field(default_factory=dict)
    """By fingerprint."""
    spare_bytes: int | None = None
    """Free bytes of the store's disk beyond those that shall stay free; below 0 if it has less.
    None: not known."""
    new_retired: frozenset[str] = frozenset()
    """Fingerprints of retired artifacts that this process has not known for long. They do not
    expire, however old they seem by a clock that may just have been set."""
    now: float = 0.0


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

    if artifact.corrupt:
        build = Build(key=base.key, reason=f"corrupt: {artifact.corrupt}", fingerprint=wanted)
        return replace(base, state=State.CORRUPT, reason=artifact.corrupt, action=build)

    changed = changes(artifact.components, wanted.components)
    build = Build(
        key=base.key, reason=", ".join(str(change) for change in changed), fingerprint=wanted
    )
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
        state = State.CORRUPT if artifact.corrupt else State.STALE
    action = Adopt(key=base.key, reason=source.reason, fingerprint=wanted, source=source.key)
    return replace(base, state=state, reason=source.reason, action=action)


def _by_verdict(base: Assessment, verdict: Verdict, world: _World) -> Assessment | None:
    """Assess a prompt by the verdict on earlier attempts; None if another attempt is due."""
    match verdict.kind:
        case VerdictKind.UNCACHEABLE:
            return _blocked(base, State.UNCACHEABLE, verdict.trouble)
        case VerdictKind.QUARANTINED:
            return _blocked(base, State.QUARANTINED, verdict.trouble)
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
        case VerdictKind.FAILED if (
            world.observed.now < verdict.retry_at <= world.observed.now + MAX_RETRY_S
        ):
            return _blocked(base, State.BLOCKED, verdict.trouble, verdict.retry_at)
        case VerdictKind.TOO_SHORT | VerdictKind.OVER_BUDGET | VerdictKind.FAILED:
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
            reason += f"and cache.max_bytes {limits.max_bytes:,} is short"
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


def too_short(fingerprint: str, tokens: int, min_tokens: int) -> Verdict:
    """The verdict on a prompt of `tokens`, which is below cache.min_tokens."""
    trouble = Trouble.of(PromptTooShort(tokens, min_tokens))
    return Verdict(
        fingerprint=fingerprint, kind=VerdictKind.TOO_SHORT, trouble=trouble, tokens=tokens
    )


def over_budget(
    fingerprint: str, needed_bytes: int, kept_bytes: int, max_bytes: int, foreign_bytes: int = 0
) -> Verdict:
    """The verdict on an artifact of `needed_bytes`: `kept_bytes` of `max_bytes` leave no room."""
    left_bytes = max(0, max_bytes - kept_bytes)
    message = (
        f"needs {needed_bytes:,} bytes, {left_bytes:,} of cache.max_bytes {max_bytes:,} are left"
    )
    hint = "raise cache.max_bytes, or move the prompt up in the manifest"
    if foreign_bytes:
        hint += f"; {foreign_bytes:,} bytes are taken by files that are not the store's: "
        hint += "`rkcached gc --strangers` removes them"

    return Verdict(
        fingerprint=fingerprint,
        kind=VerdictKind.OVER_BUDGET,
        trouble=Trouble(message=message, hint=hint),
        needed_bytes=needed_bytes,
    )
