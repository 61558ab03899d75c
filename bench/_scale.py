"""Measures how the daemon's own work grows, from ten prompts to ten thousand.

The memory engine computes next to nothing, so what is seen is the daemon: scanning, planning,
publishing, watching. Everything is read off from outside (its log, /proc), so that measuring adds
no work. `_pictures` draws it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
from _daemon import BenchError, Daemon, busy_ns
from _figures import Figure, of_median
from _workspaces import Bench, many

from rkcached.cli.launcher import Workspace

PROMPTS = (10, 100, 1000, 10_000)
MODELS = (1, 4, 16)
EDITS = 5

BUILD_ALL_TIMEOUT_S = 1800
LINE_TIMEOUT_S = 60
QUIET_S = 0.5
"""A daemon that used no CPU for this long has finished what it was asked to do."""


def measure_scale(bench: Bench) -> list[Figure]:
    """Each number of models over each size. The aims hold for the largest."""
    figures: list[Figure] = []
    for models in MODELS:
        for prompts in PROMPTS:
            if prompts < models:
                continue
            bench.say(f"{prompts:,} prompts over {models}")
            root = bench.root / f"many-{prompts}-{models}"
            figures += _Size(bench, many(root, prompts, models), prompts, models).measure()
            shutil.rmtree(root)
    return figures


class _Size:
    """One number of prompts over one number of models."""

    def __init__(self, bench: Bench, workspace: Workspace, prompts: int, models: int) -> None:
        self._bench = bench
        self._workspace = workspace
        self._prompts = prompts
        table = "1 model" if models == 1 else f"{models} models"
        place = {"part": "scale", "table": table, "column": f"{prompts:,} prompts"}
        self._figure = partial(Figure, **place)
        self._median = partial(of_median, **place)

    def measure(self) -> list[Figure]:
        return [*self._built(), *self._restarted()]

    def _built(self) -> Iterator[Figure]:
        """The first start, on an empty store."""
        with Daemon(self._workspace) as daemon:
            _Log(daemon).wait(" ready ")
            first_plan_s = time.perf_counter() - daemon.started
            daemon.wait_built(self._prompts, timeout_s=BUILD_ALL_TIMEOUT_S)
            daemon.wait_fresh()
            build_all_s = time.perf_counter() - daemon.started - first_plan_s
        each_ms = build_all_s / self._prompts * 1000
        yield self._figure(name="start to the first plan", value=first_plan_s, unit="s")
        yield self._figure(name="build of all", value=build_all_s, unit="s")
        yield self._figure(name="  each", value=each_ms, unit="ms")

    def _restarted(self) -> Iterator[Figure]:
        """The second start, on the filled store: passes with nothing to do, then edits."""
        aim = self._aim
        with Daemon(self._workspace) as daemon:
            log = _Log(daemon)
            log.wait(" ready ")
            ready_s = time.perf_counter() - daemon.started
            daemon.wait_fresh()
            fresh_s = time.perf_counter() - daemon.started
            _wait_quiet(daemon.pid)
            passes = [_nothing_to_do(daemon) for _ in range(self._bench.runs)]
            wall_ms, cpu_ms, read_bytes = zip(*passes, strict=True)
            memory = psutil.Process(daemon.pid).memory_info().rss / 1e6
            watches, descriptors = _watches(daemon.pid)
            edits = [self._edit(daemon, log, turn) for turn in range(EDITS)]
            planned, published = zip(*edits, strict=True)
            peak = _peak_mb(daemon.pid)
        yield self._figure(name="restart to ready", value=ready_s, unit="s")
        yield self._figure(name="restart to all seen fresh", value=fresh_s, unit="s")
        name = "nothing to do: SIGHUP to rest"
        yield self._median(name=name, samples=wall_ms, unit="ms", aim=aim(1000))
        yield self._median(name="  CPU", samples=cpu_ms, unit="ms")
        yield self._median(name="  bytes read", samples=read_bytes, unit="B")
        name = "edit to its build started"
        yield self._median(name=name, samples=planned, unit="ms", aim=aim(300))
        yield self._median(name="edit to published", samples=published, unit="ms")
        yield self._figure(name="resident memory", value=memory, unit="MB", aim=aim(150))
        yield self._figure(name="  at its peak", value=peak, unit="MB")
        yield self._figure(name="inotify watches", value=watches, unit="")
        yield self._figure(name="descriptors", value=descriptors, unit="")

    def _aim(self, limit: float) -> float | None:
        return limit if self._prompts == max(PROMPTS) else None

    def _edit(self, daemon: Daemon, log: _Log, turn: int) -> tuple[float, float]:
        """Save a prompt; milliseconds to the build that follows, and to its commit record."""
        number = self._prompts * turn // EDITS
        source = next(self._workspace.root.glob(f"prompts/*/prompt{number:05d}.md"))
        sidecar = self._workspace.store / source.parent.name / f"{source.stem}.json"
        before = sidecar.stat().st_ino
        text = f"{source.read_text()}Edition {turn}, {time.time_ns()}.\n"
        log.skip()
        started = time.perf_counter()
        source.write_text(text)
        log.wait(" build started ")
        planned = time.perf_counter()
        while sidecar.stat().st_ino == before:
            daemon.check_alive()
            time.sleep(0.001)
        published = time.perf_counter()
        _wait_quiet(daemon.pid)
        return (planned - started) * 1000, (published - started) * 1000


class _Log:
    """The daemon's log, read as it grows."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._at = daemon.log_start

    def skip(self) -> None:
        """Skip the lines that are there now."""
        self._at = self._daemon.workspace.log.stat().st_size

    def wait(self, words: str) -> None:
        """Until a line with these words is there. Errors: BenchError."""
        deadline = time.monotonic() + LINE_TIMEOUT_S
        with self._daemon.workspace.log.open("rb") as stream:
            while time.monotonic() < deadline:
                stream.seek(self._at)
                if words.encode() in stream.read():
                    return
                self._daemon.check_alive()
                time.sleep(0.002)
        raise BenchError(f"the log does not say{words}{self._daemon.last_words()}")


def _nothing_to_do(daemon: Daemon) -> tuple[float, float, float]:
    """Milliseconds, those of the CPU, and bytes read of a pass without work.

    It logs nothing, so its end is read off the CPU time.
    """
    process = psutil.Process(daemon.pid)
    read = process.io_counters().read_chars
    before = busy_ns(daemon.pid)
    started = time.perf_counter()
    daemon.hang_up()
    last, ended = _wait_quiet(daemon.pid)
    read_bytes = process.io_counters().read_chars - read
    return (ended - started) * 1000, (last - before) / 1e6, float(read_bytes)


def _wait_quiet(pid: int) -> tuple[int, float]:
    """Wait until the process used no CPU for QUIET_S.

    Its CPU time in ns, and the moment of its last use.
    """
    seen, moment = busy_ns(pid), time.perf_counter()
    while (now := time.perf_counter()) - moment < QUIET_S:
        if (busy := busy_ns(pid)) != seen:
            seen, moment = busy, now
        time.sleep(0.002)
    return seen, moment


def _watches(pid: int) -> tuple[int, int]:
    """Watches of inotify, and open descriptors."""
    infos = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    return sum(info.read_text().count("inotify wd:") for info in infos), len(infos)


def _peak_mb(pid: int) -> float:
    """The most memory that was resident at once (proc(5))."""
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) * 1024 / 1e6
