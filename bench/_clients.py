"""Measures the daemon's cost with several clients, for each token, and after many requests.

On the memory engine, which computes next to nothing, so that nearly all of the time is the daemon's
own.
"""

from __future__ import annotations

import statistics
import threading
from typing import Any

import psutil
from _daemon import BenchError, Daemon, busy_ns
from _results import Figure, Target, of_median
from _workspaces import PROMPTS, Bench, memory

from rkcached.cli.bench.asking import ask
from rkcached.cli.demo.runner import MODEL

CLIENTS = 8
ANSWERS_PER_RUN = 50
"""Of each client."""

STREAMS_PER_RUN = 3
STREAM_TOKENS = 2000
WARM_UP = 500
REQUESTS = 10_000


def measure_clients(bench: Bench) -> list[Figure]:
    """Shares with CLIENTS at once, CPU of a token, growth over REQUESTS."""
    with Daemon(bench.workspace(memory)) as daemon:
        daemon.wait_fresh()
        daemon.ask(_body("hello", max_tokens=4))
        return [*_shares(bench, daemon), _token_cpu(bench, daemon), _growth(daemon)]


def _shares(bench: Bench, daemon: Daemon) -> list[Figure]:
    """The daemon's own time: accepted to written, less queue and engine, by its own report."""
    reports: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def client() -> None:
        try:
            with daemon.client() as own:
                bodies = (
                    _body(f"{number:04d}", max_tokens=8)
                    for number in range(bench.runs * ANSWERS_PER_RUN)
                )
                reports.extend(ask(own, body).report for body in bodies)
        except Exception as error:  # noqa: BLE001 - it must leave the thread
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise BenchError(f"a client failed: {failures[0]}")
    if any(report["state"] != "hit" for report in reports):
        raise BenchError("an answer was no hit")
    shares = [r["ttft_ms"] - r["queue_ms"] - r["load_ms"] - r["prefill_ms"] for r in reports]
    p99 = statistics.quantiles(shares, n=100, method="inclusive")[-1]
    name = f"{CLIENTS} clients: accepted to written, less queue, load, prefill"
    return [
        of_median("clients", name, shares, "ms", target=Target(limit=2)),
        Figure(
            part="clients",
            name="  p99",
            value=p99,
            unit="ms",
            target=Target(limit=6),
            note=f"n={len(shares)}",
        ),
    ]


def _token_cpu(bench: Bench, daemon: Daemon) -> Figure:
    """CPU of the daemon alone, for each token of a stream."""
    costs = []
    for _ in range(bench.runs * STREAMS_PER_RUN):
        before = busy_ns(daemon.pid)
        _stream(daemon, STREAM_TOKENS)
        costs.append((busy_ns(daemon.pid) - before) / 1e6 / STREAM_TOKENS)
    return of_median(
        "clients", "daemon's CPU for a streamed token", costs, "ms", target=Target(limit=0.2)
    )


def _stream(daemon: Daemon, tokens: int) -> None:
    """Stream an answer and drop it. Errors: BenchError unless it has all of its tokens."""
    answer = daemon.ask(_body("go on", max_tokens=tokens))
    if answer.usage["completion_tokens"] != tokens:
        raise BenchError(f"the answer ended early{daemon.last_words()}")


def _growth(daemon: Daemon) -> Figure:
    """Memory of the daemon before and after many plain requests, a new connection every hundred."""
    process = psutil.Process(daemon.pid)
    body = _body("x", max_tokens=1)
    before = 0
    with daemon.client() as client:
        for number in range(WARM_UP + REQUESTS):
            if number == WARM_UP:
                before = process.memory_info().rss
            if number % 100 == 0:
                client.close()
            client.chat(body)
    grown = (process.memory_info().rss - before) / 1e6

    log_mb = daemon.workspace.log.stat().st_size / 1e6
    return Figure(
        part="clients",
        name=f"resident memory grown by {REQUESTS:,} requests",
        value=grown,
        unit="MB",
        target=Target(limit=5),
        note=f"from {before / 1e6:.1f} MB, after {WARM_UP} to warm up; log {log_mb:.1f} MB",
    )


def _body(question: str, *, max_tokens: int) -> dict[str, Any]:
    return {
        "model": f"{MODEL}/{PROMPTS[0]}",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
    }
