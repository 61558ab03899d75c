"""Prometheus metrics: counters that listen to events, and gauges that are read on request.

Names are part of the interface. Labels have few values: models, states, kinds of reasons; never a
prompt's text.
"""

from __future__ import annotations

import os
from collections import Counter as Counts
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.snapshot import Published
from rkcached.serving.dispatcher import Serving
from rkcached.worker.held import NOBODY
from rkcached.worker.pool import Workers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
_LOAD_SECONDS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    def __init__(
        self, events: Events, published: Published, serving: Serving, workers: Workers
    ) -> None:
        self._registry = CollectorRegistry()
        model_state = ("model", "state")
        self._requests = Counter(
            "rkcached_requests", "Answered requests.", model_state, registry=self._registry
        )
        self._ttft = Histogram(
            "rkcached_ttft_seconds",
            "Request accepted to first token written.",
            model_state,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._queue = Histogram(
            "rkcached_queue_seconds",
            "Request accepted to its turn.",
            model_state,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._model_load = Histogram(
            "rkcached_model_load_seconds",
            "Loading a model, from the start of its process.",
            ("model",),
            buckets=_LOAD_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "rkcached_prompt_tokens",
            "Tokens of prompts, cached or prefilled.",
            ("model", "source"),
            registry=self._registry,
        )
        self._builds = Counter(
            "rkcached_builds",
            "Ended builds.",
            ("model", "reason", "result"),
            registry=self._registry,
        )
        self._deaths = Counter(
            "rkcached_worker_deaths", "Workers that died.", ("model",), registry=self._registry
        )
        self._tcp = Counter(
            "rkcached_tcp_requests",
            "Requests over TCP that were answered, by key and status; `key` is empty for requests "
            "without a valid key.",
            ("key", "status"),
            registry=self._registry,
        )
        self._registry.register(_Now(published, serving, workers))
        ProcessCollector(registry=self._registry)
        events.listen(self._take)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def count_tcp(self, key: str, status: int) -> None:
        """Count an answer over TCP, to a request with this key."""
        self._tcp.labels(key, str(status)).inc()

    def _take(self, event: Event) -> None:
        fields = event.fields
        match event.kind:
            case "answer":
                labels = (fields["model"], fields["state"])
                self._requests.labels(*labels).inc()
                self._ttft.labels(*labels).observe(fields["ttft_ms"] / 1000)
                self._queue.labels(*labels).observe(fields["queue_ms"] / 1000)
                self._tokens.labels(fields["model"], "cached").inc(fields["cached_tokens"] or 0)
                self._tokens.labels(fields["model"], "prefilled").inc(fields["prefill_tokens"] or 0)
            case "build":
                self._builds.labels(
                    fields["model"], _kind_of(fields["reason"]), fields["result"]
                ).inc()
            case "worker" if fields["loaded_ms"] is not None:
                self._model_load.labels(fields["model"]).observe(fields["loaded_ms"] / 1000)
            case "worker" if fields["state"] == "backoff":
                self._deaths.labels(fields["model"]).inc()
            case _:
                pass


def _kind_of(reason: str) -> str:
    """The kind of a reason. The reason itself has digests and values: too many for a label."""
    first = reason.partition(":")[0]
    return first if first in ("missing", "requested", "corrupt") else "stale"


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process; None if it has just ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class _Now(Collector):
    """Gauges, read when Prometheus asks."""

    def __init__(self, published: Published, serving: Serving, workers: Workers) -> None:
        self._published = published
        self._serving = serving
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        snapshot = self._published.now
        for_all = snapshot.seen_by(NOBODY)
        states: Counts[tuple[str, str]] = Counts()
        for key, assessment in for_all.assessments.items():
            states[key.model, assessment.state.value] += 1
        artifacts = GaugeMetricFamily(
            "rkcached_artifacts", "Prompts by state.", labels=("model", "state")
        )
        for (model, state), count in sorted(states.items()):
            artifacts.add_metric((model, state), count)
        yield artifacts

        yield GaugeMetricFamily(
            "rkcached_cache_bytes",
            "What counts against cache.max_bytes.",
            value=snapshot.used_bytes(),
        )
        yield GaugeMetricFamily(
            "rkcached_retired_bytes",
            "The part of it that is kept for prompts that return.",
            value=snapshot.retired_bytes(),
        )
        if (budget := snapshot.manifest.cache.max_bytes) is not None:
            yield GaugeMetricFamily("rkcached_cache_max_bytes", "What they may take.", value=budget)

        waiting = GaugeMetricFamily(
            "rkcached_requests_waiting", "Requests that wait for their turn.", labels=["model"]
        )
        for model in snapshot.desired.models:
            waiting.add_metric([model], self._serving.waiting(model))
        yield waiting

        memory = GaugeMetricFamily(
            "rkcached_worker_resident_bytes", "Memory of a worker.", labels=["model"]
        )
        for worker in self._workers.all():
            if worker.pid is None:
                continue
            if (size := resident_bytes(worker.pid)) is not None:
                memory.add_metric([worker.model.name], size)
        yield memory

        good = snapshot.manifest_error is None
        yield GaugeMetricFamily(
            "rkcached_manifest_good", "1 if the manifest on disk is in force.", value=float(good)
        )
