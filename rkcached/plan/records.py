"""Records of the plan: what is declared, what the store has, what is to be done, and why.

`planner` makes assessments and actions of the others, and the rooms above carry them out and show
them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from rkcached.errors import PromptTooShort
from rkcached.host.integers import Int64
from rkcached.plan.fingerprint import Change, Fingerprint
from rkcached.sources.records import Key, Trouble
from rkcached.worker.held import NOBODY

if TYPE_CHECKING:  # it reads JSON with a library that no command needs which only shows a plan
    from rkcached.messages.tools import ToolSet

MAX_RETRY_S = 60.0
"""No failed attempt waits longer for the next one; a time further ahead was written by a clock that
was wrong."""

QUARANTINE_S = 3600.0
"""After so long a quarantined prompt is tried again; then after twice as long, and so on."""

MAX_QUARANTINE_S = 7 * 86_400.0


PASSING_RETRY_S = 10.0
"""An input that may become usable without anybody's doing is looked at again after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredPrompt:
    """A declared prompt: its fingerprint, or the trouble that keeps it from having one."""

    key: Key
    description: str = ""
    fingerprint: Fingerprint | None = None
    trouble: Trouble | None = None
    tools: ToolSet | None = None
    """Those that belong to it, as its text does; None also while it is in trouble."""


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
        """Why it cannot be used, though it may be of the right fingerprint; else empty."""

    @property
    def unsigned(self) -> bool:
        """Whether that is only because this installation has not signed its sidecar."""


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
    owner: int = NOBODY
    """The uid of the only user whom it served."""


class VerdictKind(StrEnum):
    """Why an earlier attempt at this fingerprint gave no artifact, and what may change that."""

    FAILED = "failed"  # something passing: tried again at `retry_at`
    TOO_LONG = "too_long"  # lasting
    TOO_SHORT = "too_short"  # until cache.min_tokens is lowered
    OVER_BUDGET = "over_budget"  # until there is room in cache.max_bytes
    UNCACHEABLE = "uncacheable"  # lasting, and true for every prompt of the model
    QUARANTINED = "quarantined"  # until `retry_at`, which is later each time


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of earlier attempts at one fingerprint.

    Only UNCACHEABLE says something about others.
    """

    fingerprint: str
    kind: VerdictKind
    trouble: Trouble
    attempts: Int64 = 1
    retry_at: float = 0.0
    """Unix seconds; for FAILED and QUARANTINED."""
    tokens: Int64 = 0
    needed_bytes: Int64 = 0
    model: str = ""
    """Identity of the model (file, runtime, parameters) that UNCACHEABLE was found for."""


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
