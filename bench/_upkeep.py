"""Measures what the daemon does on its own: follow an edit, and rest.

Its work is watched from outside (files of the store, CPU time, memory), so that watching adds none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from _daemon import BenchError, Daemon, busy_ns
from _figures import Figure, of_median
from _workspaces import MODEL, PROMPTS, Bench, llama

from rkcached.sources.records import Key

EDIT_TIMEOUT_S = 120
IDLE_SETTLE_S = 3.0


# From an edit to the published artifact


def measure_edit(bench: Bench) -> list[Figure]:
    """A saved prompt file, until the status shows its new artifact, minus the build itself.

    After an edit at the end of a prompt of 1,100 tokens only the end is read; after one at its
    beginning, everything.
    """
    workspace = bench.workspace(llama)
    source = workspace.root / "prompts" / f"{PROMPTS[1]}.md"
    original = source.read_text()
    figures: list[Figure] = []
    with Daemon(workspace) as daemon:
        daemon.wait_fresh()
        _edit(daemon, source, f"{original}\nEdition 0.\n")  # this one starts the worker too
        for place, form in (("end", "{1}\nEdition {0}.\n"), ("beginning", "Edition {0}.\n{1}")):
            figures += _measure_edits(
                daemon, source, place, [form.format(run + 1, original) for run in range(bench.runs)]
            )
        _edit(daemon, source, original)
    return figures


def _measure_edits(daemon: Daemon, source: Path, place: str, texts: Sequence[str]) -> list[Figure]:
    totals, builds, rest = [], [], []
    for text in texts:
        total_ms, build_ms = _edit(daemon, source, text)
        totals.append(total_ms)
        builds.append(build_ms)
        rest.append(total_ms - build_ms)
    note = f"at most {max(rest):.0f}"
    return [
        of_median("edit", f"edit at the {place} to published", totals, "ms"),
        of_median("edit", "  of that, the build", builds, "ms"),
        of_median("edit", "  the rest", rest, "ms", aim=500, note=note),
    ]


def _edit(daemon: Daemon, source: Path, text: str) -> tuple[float, float]:
    """Milliseconds to the status that shows it, and of the build.

    The sidecar's rename is waited for on the disk, so that nothing is asked of the daemon while it
    builds.
    """
    key = Key(MODEL, source.stem)
    sidecar = daemon.workspace.store / key.model / f"{key.prompt}.json"
    before = sidecar.stat().st_ino, sidecar.stat().st_mtime_ns
    started = time.perf_counter()
    source.write_text(text)
    while (sidecar.stat().st_ino, sidecar.stat().st_mtime_ns) == before:
        daemon.check_alive()
        if time.perf_counter() - started > EDIT_TIMEOUT_S:
            raise BenchError(f"an edit was not published within {EDIT_TIMEOUT_S} s")
        time.sleep(0.005)
    written = json.loads(sidecar.read_bytes())
    while not _shows(daemon.status(), key, written["built_at"]):
        time.sleep(0.001)
    return (time.perf_counter() - started) * 1000, float(written["build_ms"])


def _shows(status: dict[str, Any], key: Key, built_at: float) -> bool:
    return any(
        (shown["model"], shown["prompt"], shown["state"]) == (*key, "fresh")
        and shown["artifact"]["built_at"] == built_at
        for shown in status["prompts"]
    )


# Doing nothing


def measure_idle(bench: Bench) -> list[Figure]:
    """A daemon started on a filled store, all fresh, no model loaded."""
    with Daemon(bench.workspace(llama)) as daemon:  # fills the store if no other part did
        daemon.wait_fresh()
    with Daemon(bench.workspace(llama)) as daemon:
        status = daemon.wait_fresh()
        process = psutil.Process(daemon.pid)
        if any(model["pid"] for model in status["models"]):
            raise BenchError("a model is loaded though nothing was to build")
        time.sleep(IDLE_SETTLE_S)
        busy = busy_ns(daemon.pid)
        started = time.perf_counter()
        time.sleep(bench.idle_s)
        own_s = (busy_ns(daemon.pid) - busy) / 1e9
        seconds = time.perf_counter() - started
        memory = process.memory_info().rss / 1e6
    percent = own_s / seconds * 100
    note = f"{own_s:.3f} s in {seconds:.0f} s"
    return [
        Figure(part="idle", name="CPU of one core", value=percent, unit="%", aim=0.5, note=note),
        Figure(part="idle", name="resident memory (RSS)", value=memory, unit="MB", aim=80),
    ]
