"""The words for states of prompts, of answers, and for actions: one table for every surface.

The commands, the page and the answers' reports show these words, in these colours, in this order.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from rkcached.plan.records import Action, Adopt, Blocked, Build, Remove, Retire, State

BUILDING: Final = "building"
"""The state that people are shown while a build runs, whatever the assessment is."""

LEARNED: Final = "learned"
"""It follows the state of a prompt that the daemon made of what requests repeat."""


class Tone(StrEnum):
    """How a word sounds; each surface has a colour for it."""

    GOOD = "good"
    WORK = "work"
    WARN = "warn"
    BAD = "bad"
    QUIET = "quiet"


# The places of states in lists for people: first what somebody should see to, then what is on its
# way, then what is as it should be, last what nobody declares.
_NEEDS_SOMEBODY, _ON_ITS_WAY, _AS_IT_SHOULD_BE, _UNDECLARED = range(4)


@dataclass(frozen=True, slots=True)
class _State:
    tone: Tone
    place: int
    meaning: str


STATES: Final[Mapping[str, _State]] = MappingProxyType(
    {
        State.BLOCKED: _State(
            Tone.BAD, _NEEDS_SOMEBODY, "something must change before its prompt cache can be built"
        ),
        State.QUARANTINED: _State(
            Tone.BAD, _NEEDS_SOMEBODY, "its prompt cache or its build failed three times"
        ),
        State.CORRUPT: _State(
            Tone.BAD, _NEEDS_SOMEBODY, "a file of its prompt cache was damaged; it is built again"
        ),
        State.UNCACHEABLE: _State(
            Tone.BAD, _NEEDS_SOMEBODY, "the state of this model cannot be saved"
        ),
        BUILDING: _State(Tone.WORK, _ON_ITS_WAY, "its prompt cache is being built"),
        State.MISSING: _State(Tone.WORK, _ON_ITS_WAY, "it has no prompt cache yet"),
        State.STALE: _State(
            Tone.WARN, _ON_ITS_WAY, "something that its prompt cache depends on changed"
        ),
        State.FRESH: _State(
            Tone.GOOD, _AS_IT_SHOULD_BE, "its prompt cache is of the present text and is used"
        ),
        State.UNCACHED: _State(
            Tone.QUIET, _AS_IT_SHOULD_BE, "it is too short to be worth a prompt cache"
        ),
        State.ORPHAN: _State(
            Tone.QUIET, _UNDECLARED, "nobody declares it, and its prompt cache is still in place"
        ),
        State.RETIRED: _State(
            Tone.QUIET, _UNDECLARED, "no prompt uses this prompt cache now; it is kept for a while"
        ),
    }
)
"""All states that a prompt is shown in, the most urgent first."""


@dataclass(frozen=True, slots=True)
class _Answer:
    tone: Tone
    kind: str
    """The median that its time to the first token counts for; empty: none."""
    meaning: str


ANSWERS: Final[Mapping[str, _Answer]] = MappingProxyType(
    {
        "hit": _Answer(Tone.GOOD, "cached", "the whole prompt came from a prompt cache"),
        "loaded": _Answer(
            Tone.GOOD, "cached", "a prompt cache was used, and nobody measured how much of it"
        ),
        "partial": _Answer(
            Tone.WARN, "partial", "only a part of a prompt, or of an earlier request, was reused"
        ),
        "miss": _Answer(Tone.BAD, "", "a prompt cache was loaded and did not help"),
        "cold": _Answer(Tone.WORK, "cold", "nothing was reused"),
    }
)
"""The states that an answer reports beside those of the prompt that it was asked of."""


@dataclass(frozen=True, slots=True)
class _Step:
    sign: str
    tone: Tone
    next_step: str
    """The sentence of the one prompt that it is about; empty where its reason has it."""


STEPS: Final[Mapping[str, _Step]] = MappingProxyType(
    {
        "build": _Step("+", Tone.GOOD, "the daemon builds it at its next check"),
        "adopt": _Step(
            "=",
            Tone.GOOD,
            "the daemon adopts that prompt cache at its next check, without a prefill",
        ),
        "rename": _Step(
            "=",
            Tone.GOOD,
            "the daemon renames that prompt cache at its next check, without a prefill",
        ),
        "retire": _Step("~", Tone.QUIET, "the daemon retires it at its next check"),
        "remove": _Step("-", Tone.BAD, "the daemon removes it at its next check"),
        "blocked": _Step("!", Tone.WARN, ""),
    }
)
"""The steps of a plan, in the order of its summary."""


def step_of(action: Action) -> str:
    """The word for an action. To adopt a prompt cache whose prompt is gone is to rename it."""
    match action:
        case Adopt(take=True, source=source) if source is not None:
            return "rename"
        case Adopt():
            return "adopt"
        case Build():
            return "build"
        case Retire():
            return "retire"
        case Remove():
            return "remove"
        case Blocked():
            return "blocked"


def urgency(state: str) -> int:
    """The place of a state in lists for people; within one they keep the manifest's order."""
    return STATES[state].place


def state_words(state: str, *, learned: bool) -> str:
    """The state of a prompt as people are shown it."""
    return f"{state}, {LEARNED}" if learned else state


def tone_of(state: str) -> Tone:
    """The tone of the state of a prompt or of an answer; other words are bad news."""
    known = STATES.get(state) or ANSWERS.get(state)
    return Tone.BAD if known is None else known.tone
