"""Measures how the daemon's own work grows, from ten prompts to ten thousand.

The memory engine computes next to nothing, so what is seen is the daemon: scanning, planning,
publishing, watching. Everything is read off from outside (its log, /proc), so that measuring adds
no work. `_pictures` draws it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from _daemon import BenchError, Daemon, busy_ns
from _results import Figure, Target, of_median
from _workspaces import Bench, many

from rkcached.cli.launcher import Workspace
from rkcached.reconcile.wake import SETTLE_S

PROMPTS = (10, 100, 1000, 10_000)
MODELS = (1, 4, 16)
EDITS = 5

BUILD_ALL_TIMEOUT_S = 1800
LINE_TIMEOUT_S = 60
QUIET_S = 0.5
"""A daemon that used no CPU for this long has finished what it was asked to do."""

_AIMED_AT = max(PROMPTS)


def measure_scale(bench: Bench) -> list[Figure]:
    """Each size over each number of models. The aims hold for the largest."""
    figures: list[Figure] = []
    for prompts in PROMPTS:
        for models in MODELS:
            if prompts < models:
                continue
            bench.say(f"{prompts:,} prompts over {models}")
            root = bench.root / f"many-{prompts}-{models}"
            figures += _Size(bench, many(root, prompts, models), prompts, models).measure()
            shutil.rmtree(root)
    return figures


@dataclass(slots=True, kw_only=True)
class _Pass:
    wall_ms: float
    cpu_ms: float
    read_bytes: int


class _Size:
    """One number of prompts over one number of models."""

    def __init__(self, bench: Bench, workspace: Workspace, prompts: int, models: int) -> None:
        self._bench = bench
        self._workspace = workspace
        self._prompts = prompts
        self._name = f"{prompts:,} over {models}"

    def measure(self) -> list[Figure]:
        return [*self._built(), *self._restarted()]

    def _built(self) -> Iterator[Figure]:
        """The first start, on an empty store."""
        with Daemon(self._workspace) as daemon:
            _Log(daemon).wait(" ready ")
            first_plan_s = time.perf_counter() - daemon.started
            while sum(1 for _ in self._sidecars()) < self._prompts:
                daemon.check_alive()
                if time.perf_counter() - daemon.started > BUILD_ALL_TIMEOUT_S:
                    raise BenchError(
                        f"not all built after {BUILD_ALL_TIMEOUT_S} s{daemon.last_words()}"
                    )
                time.sleep(0.2)
            daemon.wait_fresh()
            build_all_s = time.perf_counter() - daemon.started - first_plan_s
        yield self._figure("start to the first plan", first_plan_s, "s")
        yield self._figure("build of all", build_all_s, "s")
        yield self._figure("  each", build_all_s / self._prompts * 1000, "ms")

    def _restarted(self) -> Iterator[Figure]:
        """The second start, on the filled store: passes with nothing to do, then edits."""
        with Daemon(self._workspace) as daemon:
            log = _Log(daemon)
            log.wait(" ready ")
            yield self._figure("restart to ready", time.perf_counter() - daemon.started, "s")
            daemon.wait_fresh()
            yield self._figure(
                "restart to all seen fresh", time.perf_counter() - daemon.started, "s"
            )
            _wait_quiet(daemon.pid)
            passes = [_nothing_to_do(daemon) for _ in range(self._bench.runs)]
            memory = psutil.Process(daemon.pid).memory_info().rss
            watches, descriptors = _watches(daemon.pid)
            planned, published = zip(
                *(self._edit(daemon, log, turn) for turn in range(EDITS)), strict=True
            )
            most = _status_bytes(daemon.pid, "VmHWM")
        yield self._median(
            "nothing to do: SIGHUP to rest", [p.wall_ms for p in passes], "ms", limit=1000
        )
        yield self._median("  CPU", [p.cpu_ms for p in passes], "ms")
        yield self._median(
            "  bytes read",
            [float(p.read_bytes) for p in passes],
            "B",
            note="rchar; nothing is hashed anew",
        )
        yield self._median(
            "edit to its build started",
            planned,
            "ms",
            limit=300,
            note=f"{SETTLE_S * 1000:.0f} settle",
        )
        yield self._median("edit to published", published, "ms")
        yield self._figure(
            "resident memory", memory / 1e6, "MB", limit=150, note=f"peak {most / 1e6:.0f}"
        )
        yield self._figure("inotify watches", watches, "")
        yield self._figure("descriptors", descriptors, "")

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

    def _sidecars(self) -> Iterator[str]:
        for folder in self._workspace.store.glob("model*"):
            yield from (path.name for path in folder.glob("prompt*.json"))

    def _figure(
        self, name: str, value: float, unit: str, *, limit: float | None = None, note: str = ""
    ) -> Figure:
        return Figure(
            part="scale",
            name=f"{self._name}: {name}",
            value=value,
            unit=unit,
            target=self._target(limit),
            note=note,
        )

    def _median(
        self,
        name: str,
        samples: list[float] | tuple[float, ...],
        unit: str,
        *,
        limit: float | None = None,
        note: str = "",
    ) -> Figure:
        return of_median(
            "scale", f"{self._name}: {name}", samples, unit, target=self._target(limit), note=note
        )

    def _target(self, limit: float | None) -> Target | None:
        return None if limit is None or self._prompts < _AIMED_AT else Target(limit=limit)


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


def _nothing_to_do(daemon: Daemon) -> _Pass:
    """Time a pass without work: it logs nothing, so its end is read off the CPU time."""
    read, before = _io_bytes(daemon.pid, "rchar"), busy_ns(daemon.pid)
    started = time.perf_counter()
    daemon.hang_up()
    last, ended = _wait_quiet(daemon.pid)
    return _Pass(
        wall_ms=(ended - started) * 1000,
        cpu_ms=(last - before) / 1e6,
        read_bytes=_io_bytes(daemon.pid, "rchar") - read,
    )


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


def _io_bytes(pid: int, name: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path(f"/proc/{pid}/io").read_text().splitlines()
        if name in line
    )


def _status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
