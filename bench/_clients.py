"""What the daemon costs with several clients, for each streamed token, and after many requests.

On the memory engine, which computes next to nothing, so that nearly all of the time is the daemon's
own.
"""

from __future__ import annotations

import http.client
import json
import statistics
import threading
from pathlib import Path
from typing import Any

import psutil
from _daemon import BenchError, Daemon, busy_ns
from _results import Figure, Target, of_median
from _workspaces import PROMPTS, Bench, memory

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
        daemon.ask(f"{MODEL}/{PROMPTS[0]}", "hello", max_tokens=4)
        return [*_shares(bench, daemon), _token_cpu(bench, daemon), _growth(daemon)]


def _shares(bench: Bench, daemon: Daemon) -> list[Figure]:
    """Accepted to written, less the turns of others and the engine's work, as the daemon reports them."""
    reports: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def client() -> None:
        own = daemon.client()
        try:
            asked = (f"{number:04d}" for number in range(bench.runs * ANSWERS_PER_RUN))
            reports.extend(
                own.ask(f"{MODEL}/{PROMPTS[0]}", question, max_tokens=8).report
                for question in asked
            )
        except Exception as error:  # noqa: BLE001 - it must leave the thread
            failures.append(error)
        finally:
            own.close()

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
    """Ask for a long answer, and read it with as little work as can be, for the machine is shared."""
    client = daemon.client()
    try:
        client.drain(f"{MODEL}/{PROMPTS[0]}", "go on", max_tokens=tokens)
    finally:
        client.close()


def _growth(daemon: Daemon) -> Figure:
    """Resident memory of the daemon before and after many plain requests, a new connection every hundred."""
    process = psutil.Process(daemon.pid)
    body = json.dumps(
        {
            "model": f"{MODEL}/{PROMPTS[0]}",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 1,
        }
    )
    connection = daemon.client().connection
    before = 0
    for number in range(WARM_UP + REQUESTS):
        if number == WARM_UP:
            before = process.memory_info().rss
        if number % 100 == 0:
            connection.close()
        connection.request("POST", "/v1/chat/completions", body)
        with connection.getresponse() as response:
            said = response.read()
            if response.status != http.client.OK:
                raise BenchError(f"HTTP {response.status}: {said[:200]!r}")
    connection.close()
    grown = (process.memory_info().rss - before) / 1e6
    note = (
        f"from {before / 1e6:.1f} MB, after {WARM_UP} to warm up; log {_size(daemon.workspace.log)}"
    )
    target = Target(limit=5)
    name = f"resident memory grown by {REQUESTS:,} requests"
    return Figure(part="clients", name=name, value=grown, unit="MB", target=target, note=note)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
