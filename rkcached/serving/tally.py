"""Counts answers and the use of prompts, and reports what the engine and serving measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rkcached.engines.base import RunStats
from rkcached.host.logs import log
from rkcached.reconcile.events import Events
from rkcached.reconcile.index import Match
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.job import End, Job
from rkcached.serving.ongoing import Ongoing
from rkcached.serving.report import CacheReport, decode_rate, usage_of
from rkcached.serving.reuse import Found, outcome
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact

OnAnswer = Callable[[Job, Found, RunStats], None]


@dataclass(slots=True, kw_only=True)
class PromptUse:
    """How requests used a prompt since the daemon started."""

    hits: int = 0
    misses: int = 0
    last_used: float = 0.0
    """Unix seconds."""


class SavedTime:
    """The prefill that prompt caches spared since midnight, by the local clock. Of all users."""

    def __init__(self) -> None:
        self._day = ""
        self._ms = 0.0
        # By model: milliseconds of prefill for each token, as the last cache's build measured them.
        self._rates: dict[str, float] = {}

    def add(
        self, model: str, artifact: StoredArtifact | None, stats: RunStats, load_ms: float
    ) -> None:
        """Count an answer: its reused tokens at the model's measured rate, less the load."""
        if artifact is not None and artifact.sidecar.tokens:
            self._rates[model] = artifact.sidecar.figures.prefill_ms / artifact.sidecar.tokens
        reused = stats.cached_tokens
        if reused is None:  # nobody measures it; what was loaded is what was spared
            reused = artifact.sidecar.tokens if artifact is not None else 0
        saved_ms = reused * self._rates.get(model, 0.0) - load_ms
        if saved_ms > 0:
            self._ms = self.today_ms() + saved_ms

    def today_ms(self) -> float:
        day = time.strftime("%Y-%m-%d")
        if day != self._day:
            self._day = day
            self._ms = 0.0
        return self._ms


class Tally:
    def __init__(
        self, reconciler: Reconciler, events: Events, on_answer: Sequence[OnAnswer]
    ) -> None:
        self._reconciler = reconciler
        self._events = events
        self._on_answer = on_answer
        self.answers: Counter[str] = Counter()
        """Answers by state of the cache, since the start."""
        self.uses: dict[Key, PromptUse] = {}
        self.saved = SavedTime()

    def end(self, ongoing: Ongoing, stats: RunStats) -> End:
        """The end of an answer: its report, which is published and counted, too."""
        now = time.monotonic()
        job = ongoing.job
        if ongoing.load_error is not None:
            loaded = None
            state, reason = "miss", ongoing.load_error.error
        else:
            loaded = ongoing.found.chosen
            state, reason = outcome(ongoing.found, job, stats)

        self.answers[state] += 1
        if loaded is not None:
            self._count_use(job, loaded, state, stats)
        self.saved.add(
            job.model.name, loaded.artifact if loaded is not None else None, stats, ongoing.load_ms
        )
        for tell in self._on_answer:
            tell(job, ongoing.found, stats)

        report = CacheReport(
            cache=None if loaded is None else loaded.key.prompt,
            state=state,
            reason=reason,
            cached_tokens=stats.cached_tokens,
            ttft_ms=_ms((ongoing.first_written or now) - job.accepted),
            queue_ms=_ms(ongoing.started - job.accepted),
            model_load_ms=_ms(ongoing.model_load_s),
            load_ms=round(ongoing.load_ms, 2),
            prefill_ms=round(stats.prefill_ms, 2),
            decode_tokens_per_s=decode_rate(stats),
            ignored=job.ignored,
        )
        self._events.publish(
            "answer",
            owner=job.owner,
            model=job.model.name,
            prompt=report.cache,
            state=state,
            ttft_ms=report.ttft_ms,
            queue_ms=report.queue_ms,
            cached_tokens=stats.cached_tokens,
            prefill_tokens=stats.prefill_tokens,
        )
        return End(finish=stats.finish, usage=usage_of(stats), report=report)

    def _count_use(self, job: Job, loaded: Match, state: str, stats: RunStats) -> None:
        if loaded.key != job.named:
            self._reconciler.demand.asks_for(loaded.key)
        use = self.uses.setdefault(loaded.key, PromptUse())
        use.last_used = time.time()
        if state in ("hit", "loaded"):
            use.hits += 1
            self._reconciler.artifact_served(loaded.artifact)
        elif state == "miss":
            use.misses += 1
            log.warning(
                "cache did not help",
                **loaded.key._asdict(),
                cached_tokens=stats.cached_tokens,
            )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
