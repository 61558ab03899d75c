"""The pure middle: compare what should exist with what does, and say what to do and why.

`assess` gives every prompt one state with its reason, `plan` turns states into actions. Nothing here reads a file, a
clock or an event: the same input always gives the same plan, and `rkcached plan` prints exactly this data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, assert_never

from rkcached.errors import PromptTooShort, RkcachedError
from rkcached.fingerprint import Change, Fingerprint, changes

MAX_RETRY_S = 60.0
"""No failed attempt waits longer for the next one; a time further ahead was written by a clock that was wrong."""


class Key(NamedTuple):
    """A prompt of a model; written `model/prompt`."""

    model: str
    prompt: str

    def __str__(self) -> str:
        return f"{self.model}/{self.prompt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why something cannot be, and the next thing to do."""

    message: str
    hint: str = ""
    place: tuple[str | int, ...] = ()
    """The way in the manifest to what names it, from the model or prompt that has the trouble; for its line."""

    @classmethod
    def of(cls, error: RkcachedError, *place: str | int) -> Trouble:
        return cls(message=error.message, hint=error.hint, place=place)

    def __str__(self) -> str:
        return self.message + (f" ({self.hint})" if self.hint else "")


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


class VerdictKind(StrEnum):
    """Why an earlier attempt at exactly this fingerprint gave no artifact, and what may change that."""

    FAILED = "failed"  # something passing: tried again at `retry_at`
    TOO_LONG = "too_long"  # lasting
    TOO_SHORT = "too_short"  # until cache.min_tokens is lowered
    OVER_BUDGET = "over_budget"  # until there is room in cache.max_bytes
    UNCACHEABLE = "uncacheable"  # lasting, and true for every prompt of the model
    QUARANTINED = "quarantined"  # lasting


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of earlier attempts at one fingerprint. Only UNCACHEABLE says something about others."""

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
    BLOCKED = "blocked"
    UNCACHED = "uncached"
    UNCACHEABLE = "uncacheable"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    key: Key
    reason: str
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Take an artifact out of the store. `verdict`, if any, is remembered so that it is not built again at once."""

    key: Key
    reason: str
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """Nothing can be done now. `retry_at` (Unix seconds) is set where time alone may help."""

    key: Key
    reason: str
    hint: str = ""
    retry_at: float = 0.0


Action = Build | Remove | Blocked


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the manifest allows the store."""

    max_bytes: int | None = None
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the disk says, at Unix time `now`."""

    artifacts: Mapping[Key, Artifact] = field(default_factory=dict)
    verdicts: Mapping[Key, Verdict] = field(default_factory=dict)
    unlisted_models: frozenset[str] = frozenset()
    """Models whose prompts_from folder cannot be listed: what they declare is not known, so nothing is an orphan."""
    foreign_bytes: int = 0
    """Of files in the store's place that are none of its: the budget is smaller by them."""
    now: float = 0.0


def assess(desired: Sequence[DesiredPrompt], observed: Observed, limits: Limits) -> tuple[Assessment, ...]:
    """The state of every declared prompt in manifest order, then of every artifact that nobody declares.

    The budget goes to what is served, or will be, in manifest order. What is left goes to artifacts that serve nobody
    now, so that whatever stays on disk fits, and a build that is due finds the room that was counted for it.
    """
    claimed_bytes, claims = observed.foreign_bytes, dict[Key, int]()
    assessments = []
    for prompt in desired:
        artifact = observed.artifacts.get(prompt.key)
        assessment = _assess_one(prompt, artifact, observed, limits, claimed_bytes)
        claims[prompt.key] = _claim(assessment, observed, limits, claimed_bytes)
        claimed_bytes += claims[prompt.key]
        assessments.append(assessment)
    declared = {prompt.key for prompt in desired}
    assessments += [_assess_orphan(key, observed) for key in sorted(observed.artifacts) if key not in declared]
    return tuple(_make_room(assessments, observed, limits, claims))


def plan(assessments: Iterable[Assessment]) -> tuple[Action, ...]:
    """The actions, in the order to carry them out: removals make room first, then builds in manifest order."""
    removes: list[Action] = []
    builds: list[Action] = []
    blocked: list[Action] = []
    for assessment in assessments:
        match assessment.action:
            case None:
                pass
            case Remove():
                removes.append(assessment.action)
            case Build():
                builds.append(assessment.action)
            case Blocked():
                blocked.append(assessment.action)
            case _:
                assert_never(assessment.action)
    return (*removes, *builds, *blocked)


def _assess_one(
    prompt: DesiredPrompt, artifact: Artifact | None, observed: Observed, limits: Limits, claimed_bytes: int
) -> Assessment:
    key, wanted = prompt.key, prompt.fingerprint
    fresh = Assessment(key=key, state=State.FRESH, description=prompt.description)

    # Its inputs are unusable, so nobody knows what it should be. What exists is kept: the same text may come back.
    if wanted is None:
        return _blocked(fresh, State.BLOCKED, prompt.trouble or Trouble(message="the prompt has no text"))

    # There is an artifact of exactly this fingerprint.
    if artifact is not None and not artifact.corrupt and artifact.fingerprint == wanted.digest:
        # The manifest's limits may have been tightened since it was built.
        if artifact.tokens < limits.min_tokens:
            return _dropped(fresh, State.UNCACHED, too_short(wanted.digest, artifact.tokens, limits.min_tokens))
        if limits.max_bytes is not None and claimed_bytes + artifact.size_bytes > limits.max_bytes:
            unfit = over_budget(
                wanted.digest, artifact.size_bytes, claimed_bytes, limits.max_bytes, observed.foreign_bytes
            )
            return _dropped(fresh, State.BLOCKED, unfit)
        return fresh

    # There is none. An earlier attempt at this very fingerprint may say that trying is useless, or too early.
    verdict = observed.verdicts.get(key)
    if verdict is not None and verdict.fingerprint == wanted.digest:
        sentenced = _by_verdict(fresh, verdict, observed, limits, claimed_bytes)
        if sentenced is not None:
            return sentenced

    if artifact is None:
        build = Build(key=key, reason="missing", fingerprint=wanted)
        return replace(fresh, state=State.MISSING, reason=build.reason, action=build)
    if artifact.corrupt:
        build = Build(key=key, reason=f"corrupt: {artifact.corrupt}", fingerprint=wanted)
        return replace(fresh, state=State.CORRUPT, reason=artifact.corrupt, action=build)
    changed = changes(artifact.components, wanted.components)
    build = Build(key=key, reason=", ".join(str(change) for change in changed), fingerprint=wanted)
    return replace(fresh, state=State.STALE, reason=build.reason, changes=changed, action=build)


def _by_verdict(
    base: Assessment, verdict: Verdict, observed: Observed, limits: Limits, claimed_bytes: int
) -> Assessment | None:
    """What the verdict on earlier attempts says now; None if another attempt is due."""
    match verdict.kind:
        case VerdictKind.UNCACHEABLE:
            return _blocked(base, State.UNCACHEABLE, verdict.trouble)
        case VerdictKind.QUARANTINED:
            return _blocked(base, State.QUARANTINED, verdict.trouble)
        case VerdictKind.TOO_LONG:
            return _blocked(base, State.BLOCKED, verdict.trouble)
        case VerdictKind.TOO_SHORT if verdict.tokens < limits.min_tokens:
            said = too_short(verdict.fingerprint, verdict.tokens, limits.min_tokens).trouble
            return replace(base, state=State.UNCACHED, reason=said.message, hint=said.hint)
        case VerdictKind.OVER_BUDGET if (
            limits.max_bytes is not None and claimed_bytes + verdict.needed_bytes > limits.max_bytes
        ):
            # Said anew, because the other artifacts may have grown or shrunk since.
            said = over_budget(
                verdict.fingerprint, verdict.needed_bytes, claimed_bytes, limits.max_bytes, observed.foreign_bytes
            ).trouble
            return _blocked(base, State.BLOCKED, said)
        case VerdictKind.FAILED if observed.now < verdict.retry_at <= observed.now + MAX_RETRY_S:
            return _blocked(base, State.BLOCKED, verdict.trouble, verdict.retry_at)
        case VerdictKind.TOO_SHORT | VerdictKind.OVER_BUDGET | VerdictKind.FAILED:
            return None  # the limit was raised, the time has come, or the clock was set back
        case _:
            assert_never(verdict.kind)


def _claim(assessment: Assessment, observed: Observed, limits: Limits, claimed_bytes: int) -> int:
    """The bytes of the budget that a prompt takes: its artifact's, or those that its next build needs.

    Where nobody knows that, it is taken to be what the stale artifact has that it replaces, if there is room for it: or
    an edit would let something be built in its place that has to go again.
    """
    artifact = observed.artifacts.get(assessment.key)
    if assessment.state is State.FRESH and artifact is not None:
        return artifact.size_bytes
    if not isinstance(assessment.action, Build):
        return 0
    verdict = observed.verdicts.get(assessment.key)
    if verdict and verdict.fingerprint == assessment.action.fingerprint.digest and verdict.needed_bytes:
        return verdict.needed_bytes
    if artifact is None or artifact.corrupt or limits.max_bytes is None:
        return 0
    return artifact.size_bytes if claimed_bytes + artifact.size_bytes <= limits.max_bytes else 0


def _make_room(
    assessments: Iterable[Assessment], observed: Observed, limits: Limits, claims: Mapping[Key, int]
) -> Iterator[Assessment]:
    """Keep an artifact that serves nobody (stale, corrupt, in trouble, undeclared) only where the budget has room.

    It shares the room of the build that replaces it, as the one comes when the other goes.
    """
    claimed_bytes = observed.foreign_bytes + sum(claims.values())
    for assessment in assessments:
        artifact = observed.artifacts.get(assessment.key)
        served = assessment.state is State.FRESH
        if artifact is None or served or limits.max_bytes is None or isinstance(assessment.action, Remove):
            yield assessment
            continue
        more_bytes = max(0, artifact.size_bytes - claims.get(assessment.key, 0))
        if claimed_bytes + more_bytes <= limits.max_bytes:
            claimed_bytes += more_bytes
            yield assessment
        else:
            reason = f"makes room: it is {assessment.state}, and cache.max_bytes {limits.max_bytes:,} is short"
            yield replace(assessment, action=Remove(key=assessment.key, reason=reason))


def _assess_orphan(key: Key, observed: Observed) -> Assessment:
    if key.model in observed.unlisted_models:
        reason = "not declared, but kept: a prompts_from folder of this model cannot be listed"
        return Assessment(key=key, state=State.ORPHAN, reason=reason)
    reason = "not in the manifest"
    return Assessment(key=key, state=State.ORPHAN, reason=reason, action=Remove(key=key, reason=reason))


def _blocked(base: Assessment, state: State, trouble: Trouble, retry_at: float = 0.0) -> Assessment:
    action = Blocked(key=base.key, reason=trouble.message, hint=trouble.hint, retry_at=retry_at)
    return replace(base, state=state, reason=trouble.message, hint=trouble.hint, action=action)


def _dropped(base: Assessment, state: State, verdict: Verdict) -> Assessment:
    """A good artifact that the limits no longer allow: it goes, and the verdict keeps it from being built again."""
    trouble = verdict.trouble
    action = Remove(key=base.key, reason=trouble.message, verdict=verdict)
    return replace(base, state=state, reason=trouble.message, hint=trouble.hint, action=action)


def too_short(fingerprint: str, tokens: int, min_tokens: int) -> Verdict:
    """The verdict on a prompt of `tokens`, which is below cache.min_tokens."""
    trouble = Trouble.of(PromptTooShort(tokens, min_tokens))
    return Verdict(fingerprint=fingerprint, kind=VerdictKind.TOO_SHORT, trouble=trouble, tokens=tokens)


def over_budget(
    fingerprint: str, needed_bytes: int, kept_bytes: int, max_bytes: int, foreign_bytes: int = 0
) -> Verdict:
    """The verdict on an artifact of `needed_bytes` for which `kept_bytes` of `max_bytes` leave no room."""
    message = (
        f"needs {needed_bytes:,} bytes, {max(0, max_bytes - kept_bytes):,} of cache.max_bytes {max_bytes:,} are left"
    )
    hint = "raise cache.max_bytes, or move the prompt up in the manifest"
    if foreign_bytes:
        hint += f"; {foreign_bytes:,} bytes are taken by files that are not the store's: `rkcached gc --strangers`"
    return Verdict(
        fingerprint=fingerprint,
        kind=VerdictKind.OVER_BUDGET,
        trouble=Trouble(message=message, hint=hint),
        needed_bytes=needed_bytes,
    )
