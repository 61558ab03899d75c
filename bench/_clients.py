"""Measures the daemon's cost with several clients, and after many requests.

On the memory engine, which computes next to nothing, so that nearly all of the time is the daemon's
own.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from _daemon import BenchError, Daemon
from _figures import Figure, of_median
from _workspaces import MODEL, PROMPTS, Bench, memory

from rkcached.cli.bench.asking import ask

CLIENTS = 8
ANSWERS_PER_RUN = 50
"""Of each client."""

WARM_UP = 500
REQUESTS = 10_000


def measure_clients(bench: Bench) -> list[Figure]:
    """Shares with CLIENTS at once, growth over REQUESTS."""
    with Daemon(bench.workspace(memory)) as daemon:
        daemon.wait_fresh()
        daemon.ask(_body("hello", max_tokens=4))
        return [*_shares(bench, daemon), _growth(daemon)]


def _shares(bench: Bench, daemon: Daemon) -> list[Figure]:
    """The daemon's own time: accepted to written, less queue and engine, by its own report."""

    def client(_: int) -> list[dict[str, Any]]:
        questions = [f"{number:04d}" for number in range(bench.runs * ANSWERS_PER_RUN)]
        with daemon.client() as own:
            return [ask(own, _body(question, max_tokens=8)).report for question in questions]

    with ThreadPoolExecutor(CLIENTS) as pool:
        reports = [report for reports in pool.map(client, range(CLIENTS)) for report in reports]
    if any(report["state"] != "hit" for report in reports):
        raise BenchError("an answer was no hit")

    shares = [r["ttft_ms"] - r["queue_ms"] - r["load_ms"] - r["prefill_ms"] for r in reports]
    name = f"{CLIENTS} clients: accepted to written, less queue, load, prefill"
    p99 = statistics.quantiles(shares, n=100, method="inclusive")[-1]
    return [
        of_median("clients", name, shares, "ms", aim=2),
        Figure(part="clients", name="  p99", value=p99, unit="ms", aim=6, note=f"n={len(shares)}"),
    ]


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

    return Figure(
        part="clients",
        name=f"resident memory grown by {REQUESTS:,} requests",
        value=(process.memory_info().rss - before) / 1e6,
        unit="MB",
        aim=5,
        note=f"from {before / 1e6:.1f} MB, after {WARM_UP} to warm up",
    )


def _body(question: str, *, max_tokens: int) -> dict[str, Any]:
    return {
        "model": f"{MODEL}/{PROMPTS[0]}",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
    }
