"""The queue of builds: it decides which is next, and which has to wait until when.

A look fills the queue with what its plan asks for. In between, an edit puts builds at its head, and
failures and new artifacts take builds out. `next` gives the first build that may begin: not one
whose text or model is still being written (`patience`), and not twice the same while others wait.
A build that waits for a retry is not in the queue: the planner blocks it until then, and
`next_retry_at` says when to look again.

On the event loop; starts nothing and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping

from rkcached.host.watch import Writing
from rkcached.plan.fingerprint import Fingerprint
from rkcached.plan.records import Action, Assessment, Blocked, Build
from rkcached.reconcile.patience import Patience
from rkcached.sources.records import Key

REQUESTED = "requested"
"""The reason of a build that somebody asked for and waits for."""


class BuildQueue:
    """The builds that wait, the first to be built first."""

    def __init__(self) -> None:
        self._builds: dict[Key, Build] = {}
        self._patience = Patience()
        self._last_started: Key | None = None

    def __len__(self) -> int:
        return len(self._builds)

    # Filling

    def plan(
        self, requested: Iterable[Build], actions: Iterable[Action], *, but: Key | None
    ) -> None:
        """Take over what a look found: requested builds first, then the plan's in its order.

        `but` was being built when the look saw the store. It may have ended since: what the look
        saw of it is then out of date, and the next look comes at once.
        """
        builds = {build.key: build for build in requested}
        for action in actions:
            if isinstance(action, Build):
                builds.setdefault(action.key, action)

        if but is not None:
            builds.pop(but, None)
        self._builds = builds

    def put_first(self, builds: Iterable[Build]) -> None:
        """Put these at the head, in place of older builds of the same prompts."""
        first = {build.key: build for build in builds}
        rest = {key: build for key, build in self._builds.items() if key not in first}
        self._builds = first | rest

    def step_aside(self, build: Build) -> None:
        """A build was interrupted by a request. It goes on before others."""
        self._builds = {build.key: build, **self._builds}
        self._last_started = None

    # Emptying

    def clear(self) -> None:
        self._builds.clear()

    def drop_model(self, name: str) -> None:
        """No prompt of this model can be built now."""
        self._builds = {key: build for key, build in self._builds.items() if key.model != name}

    def drop_twins(self, fingerprint: str) -> bool:
        """An artifact of this fingerprint was published: other prompts adopt it, and need no build.

        Requested builds stay. Returns whether there was any.
        """
        twins = [
            key
            for key, build in self._builds.items()
            if build.fingerprint.digest == fingerprint and build.reason != REQUESTED
        ]
        for key in twins:
            del self._builds[key]
        return bool(twins)

    # Taking

    def next(
        self,
        now: float,
        asked: Container[Key],
        files_of: Callable[[Key], Iterable[str]],
        writing: Mapping[str, Writing],
    ) -> tuple[Build | None, float]:
        """Take the first build that may begin now; if none may, say when one may (else: infinity).

        Times are the loop's. Somebody waits for the prompts in `asked`: they need no patience, and
        may be built twice in a row. `files_of` names the files that a prompt is made of.
        """
        again: Key | None = None
        due_at = math.inf
        for key in self._builds:
            due = 0.0 if key in asked else self._patience.due(key, files_of(key), writing)
            if due > now:
                due_at = min(due_at, due)
            elif key != self._last_started or key in asked:
                return self._builds.pop(key), now
            else:
                again = key  # the last one lets another go first

        if again is not None:
            return self._builds.pop(again), now
        return None, due_at

    def started(self, key: Key) -> None:
        self._last_started = key

    # What patience needs to know

    def observed(self, wanted: Callable[[Key], Fingerprint | None], now: float) -> None:
        """A look found what each prompt is to have: None if it cannot be built."""
        self._patience.observed(wanted, now)

    def stopped(self, key: Key, wanted: str, now: float) -> None:
        """A running build was stopped, because its prompt is to have this fingerprint instead."""
        self._patience.stopped(key, wanted, now)

    def built(self, key: Key) -> None:
        self._patience.built(key)


def next_retry_at(assessments: Iterable[Assessment]) -> float:
    """When the first blocked prompt may be tried again (Unix seconds); infinity if none may."""
    retries = [
        assessment.action.retry_at
        for assessment in assessments
        if isinstance(assessment.action, Blocked) and assessment.action.retry_at > 0
    ]
    return min(retries, default=math.inf)
