"""The rows of the page, by its address: the search, the state and the order. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from rkcached.api.status import state_of
from rkcached.plan.vocabulary import urgency
from rkcached.reconcile.snapshot import Snapshot
from rkcached.serving.tally import PromptUse
from rkcached.sources.records import Key

ROWS: Final = 200
"""So many prompts are shown at first: more take the browser long at each change."""

_MOST_LETTERS: Final = 200

ORDERS: Final = ("name", "tokens", "size", "cold", "warm", "hits", "used")
"""How prompts may be sorted; without a word for it, those that need attention come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The choices that the address has."""

    words: tuple[str, ...] = ()
    """Each must be in a prompt's name, its description or its reason."""
    state: str = ""
    sort: str = ""
    everything: bool = False
    """Show all rows."""
    prompt: str = ""
    """MODEL/PROMPT whose own view is shown."""

    @property
    def query(self) -> str:
        return " ".join(self.words)

    def address(self, **changes: str) -> str:
        """The address of this view with some of its parts changed; empty parts are left out."""
        parts = {
            "q": self.query,
            "state": self.state,
            "sort": self.sort,
            "all": "1" if self.everything else "",
            "prompt": self.prompt,
        } | changes
        shown = {name: value for name, value in parts.items() if value}
        return f"?{urlencode(shown)}" if shown else "./"


def view_of(parameters: Mapping[str, str]) -> View:
    """Unknown values are passed over, as in an address that somebody has kept."""
    sort = parameters.get("sort", "")
    return View(
        words=tuple(parameters.get("q", "")[:_MOST_LETTERS].casefold().split()),
        state=parameters.get("state", "")[:_MOST_LETTERS],
        sort=sort if sort in ORDERS else "",
        everything=parameters.get("all") == "1",
        prompt=parameters.get("prompt", "")[:_MOST_LETTERS],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    keys: Sequence[Key]
    """Those that are shown, in order."""
    matching: int
    """So many fit the search; more than are shown where there are many."""
    total: int
    states: Mapping[str, int]
    """How many prompts are in each state, whatever is searched for."""


def rows_of(view: View, snapshot: Snapshot, uses: Mapping[Key, PromptUse]) -> Rows:
    """The prompts that fit, sorted. None of them is described for that: there may be thousands."""
    fitting = [key for key in snapshot.assessments if _fits(view, key, snapshot)]
    fitting.sort(key=lambda key: _place(view.sort, key, snapshot, uses))
    return Rows(
        keys=fitting if view.everything else fitting[:ROWS],
        matching=len(fitting),
        total=len(snapshot.assessments),
        states=Counter(state_of(key, snapshot) for key in snapshot.assessments),
    )


def _fits(view: View, key: Key, snapshot: Snapshot) -> bool:
    if view.state and state_of(key, snapshot) != view.state:
        return False
    if not view.words:
        return True
    assessment = snapshot.assessments[key]
    text = f"{key}\n{assessment.description}\n{assessment.reason}".casefold()
    return all(word in text for word in view.words)


def _place(
    sort: str, key: Key, snapshot: Snapshot, uses: Mapping[Key, PromptUse]
) -> tuple[float, Key | tuple[()]]:
    """Its place: the largest figure first, and last what has none; equal ones by their names."""
    if not sort:
        return urgency(state_of(key, snapshot)), ()  # within a state as the manifest has them
    use = uses.get(key)
    if sort == "hits":
        return -(use.hits if use else 0), key
    if sort == "used":
        return -(use.last_used if use else 0.0), key
    artifact = snapshot.artifacts.get(key)
    if sort == "name" or artifact is None:
        return 0.0, key

    sidecar = artifact.sidecar
    figures = {
        "tokens": sidecar.tokens,
        "size": sidecar.size_bytes,
        "cold": sidecar.figures.cold_ttft_ms,
        "warm": sidecar.figures.warm_ttft_ms,
    }
    return -figures[sort], key
