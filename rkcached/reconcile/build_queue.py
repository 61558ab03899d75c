"""The queue of builds: it decides which is next, and which has to wait until when.

A look fills the queue with what its plan asks for. In between, an edit puts builds at its head, and
failures and new artifacts take builds out. After those at the head come the prompts that requests
ask for most, then the others in the plan's order. `next` gives the first build that may begin: not
one whose text or model is still being written (`patience`), none while builds are held back
(`build_times`) unless somebody waits for it, and not twice the same while others wait.
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


Rank = Callable[[Key], tuple[float, ...]]
"""The place of a prompt by its use: the smaller, the more it is asked for."""


def _unranked(_: Key) -> tuple[float, ...]:
    return ()


class BuildQueue:
    """The builds that wait."""

    def __init__(self, rank: Rank = _unranked) -> None:
        self._rank = rank
        # Those that go before the others, in their order.
        self._head: dict[Key, Build] = {}
        self._rest: dict[Key, Build] = {}
        self._patience = Patience()
        self._last_started: Key | None = None

    def __len__(self) -> int:
        return len(self._head) + len(self._rest)

    # Filling

    def plan(
        self, requested: Iterable[Build], actions: Iterable[Action], *, but: Key | None
    ) -> None:
        """Take over what a look found: requested builds first, then the plan's in its order.

        `but` was being built when the look saw the store. It may have ended since: what the look
        saw of it is then out of date, and the next look comes at once.
        """
        self._head = {build.key: build for build in requested}
        self._rest = {}
        for action in actions:
            if isinstance(action, Build) and action.key not in self._head:
                self._rest[action.key] = action

        if but is not None:
            self._take(but)

    def put_first(self, builds: Iterable[Build]) -> None:
        """Put these at the head, in place of older builds of the same prompts."""
        first = {build.key: build for build in builds}
        for key in first:
            self._take(key)
        self._head = first | self._head

    def step_aside(self, build: Build) -> None:
        """A build was interrupted by a request. It goes on before others."""
        newer = self._take(build.key)
        self._head = {build.key: newer or build, **self._head}
        self._last_started = None

    # Emptying

    def clear(self) -> None:
        self._head.clear()
        self._rest.clear()

    def drop_model(self, name: str) -> None:
        """No prompt of this model can be built now."""
        for key in self._in_order():
            if key.model == name:
                self._take(key)

    def drop_twins(self, fingerprint: str) -> bool:
        """An artifact of this fingerprint was published: other prompts adopt it, and need no build.

        Requested builds stay. Returns whether there was any.
        """
        twins = [
            key
            for key, build in (self._head | self._rest).items()
            if build.fingerprint.digest == fingerprint and build.reason != REQUESTED
        ]
        for key in twins:
            self._take(key)
        return bool(twins)

    # Taking

    def next(
        self,
        now: float,
        asked: Container[Key],
        files_of: Callable[[Key], Iterable[str]],
        writing: Mapping[str, Writing],
        *,
        held_until: float = 0.0,
        hurried: Container[Key] = (),
    ) -> tuple[Build | None, float]:
        """Take the first build that may begin now; if none may, say when one may (else: infinity).

        Times are the loop's. `files_of` names the files that a prompt is made of. Builds are held
        back until `held_until`, but for those of the prompts in `asked` and `hurried`, for which
        somebody waits. Those in `asked` need no patience, and may be built twice in a row.
        """
        again: Key | None = None
        due_at = math.inf
        for key in self._in_order():
            if key in asked:
                due = 0.0
            elif held_until > now and key not in hurried:
                due = held_until
            else:
                due = self._patience.due(key, files_of(key), writing)

            if due > now:
                due_at = min(due_at, due)
            elif key != self._last_started or key in asked:
                return self._take(key), now
            else:
                again = key  # the last one lets another go first

        if again is not None:
            return self._take(again), now
        return None, due_at

    def _in_order(self) -> list[Key]:
        return [*self._head, *sorted(self._rest, key=self._rank)]

    def _take(self, key: Key) -> Build | None:
        """Take a build out, if it is there."""
        return self._head.pop(key, None) or self._rest.pop(key, None)

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
